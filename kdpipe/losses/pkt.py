"""Probabilistic knowledge transfer: Passalis & Tefas 2018, https://arxiv.org/abs/1803.10837."""

import torch
from torch import Tensor

from kdpipe.losses.base import Distillation
from kdpipe.losses.outputs import Outputs, wide

EPSILON = 1e-7  # the authors'


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the student's probabilities that two images are neighbours from the teacher's.

    The probabilities are the cosine similarities, brought to [0, 1], of an image with all of the batch, at sum 1. The
    paper sums over the pairs, the authors' code averages over all N² (the benchmark's weight is 30,000); here as in the
    code.

    Args:
        student: embeddings, float [N, D].
        teacher: embeddings, float [N, D'].
    """
    outputs, targets = _probabilities(student), _probabilities(teacher)
    return (targets * ((targets + EPSILON) / (outputs + EPSILON)).log()).mean()


def _probabilities(embeddings: Tensor) -> Tensor:
    """float [N, N]"""
    embeddings = wide(embeddings)
    # The gradient of a length of 0 is 0, not NaN.
    directions = embeddings / (torch.linalg.vector_norm(embeddings, dim=1, keepdim=True) + EPSILON)
    # Rounding leads below 0 for opposite vectors.
    similarities = ((directions @ directions.T + 1) / 2).clamp(min=0)
    return similarities / similarities.sum(dim=1, keepdim=True)


class PKT(Distillation):
    """ce_weight·CE + weight·pkt of the embeddings.

    Raises:
        ValueError: a weight below 0.
    """

    roles = ("embedding",)
    name = "pkt"
    compares_images = True

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        assert student.embedding is not None and teacher.embedding is not None
        return pkt(student.embedding, teacher.embedding)
