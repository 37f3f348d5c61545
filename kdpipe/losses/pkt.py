"""Probabilistic knowledge transfer: Passalis & Tefas 2018, https://arxiv.org/abs/1803.10837."""

import torch
from torch import Tensor

from kdpipe.losses.base import Plan, WeightedLoss, idle_caveats, only_a_sign, too_few
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError

EPSILON = 1e-7  # the authors'


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence between the teacher's and the student's probabilities that two images are neighbours.

    An image's probabilities are the cosine similarities of its embedding ([N, D] the student's, [N, D'] the teacher's)
    to those of the batch, mapped to [0, 1] and scaled to sum 1. The paper sums over the pairs; like the authors' code,
    this averages over all N² (the benchmark's weight is 30,000).
    """
    outputs, targets = _probabilities(student), _probabilities(teacher)
    return (targets * ((targets + EPSILON) / (outputs + EPSILON)).log()).mean()


def _probabilities(embeddings: Tensor) -> Tensor:
    """float [N, N]"""
    embeddings = wide(embeddings)
    # The gradient of a length of 0 is 0, not NaN.
    directions = embeddings / (torch.linalg.vector_norm(embeddings, dim=1, keepdim=True) + EPSILON)
    # For opposite vectors rounding can give values below 0.
    similarities = ((directions @ directions.T + 1) / 2).clamp(min=0)
    return similarities / similarities.sum(dim=1, keepdim=True)


class PKT(WeightedLoss):
    """ce_weight·CE + weight·pkt of the embeddings.

    Raises:
        ConfigError: a negative weight.
    """

    roles = ("embedding",)
    name = "pkt"
    compares_images = True

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        assert student.embedding is not None
        idle = only_a_sign(student.embedding.shape[1]) or too_few(plan.images, least=2)
        return idle_caveats({"weight": self.weight}, {"weight": idle})

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        assert student.embedding is not None and teacher.embedding is not None
        return pkt(student.embedding, teacher.embedding)
