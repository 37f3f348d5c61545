"""Similarity-preserving distillation: Tung & Mori 2019, https://arxiv.org/abs/1907.09682."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import Plan, WeightedLoss, idle_caveats, too_few
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently two networks see which images of a batch resemble each other.

    ‖G_t − G_s‖²_F / N², where G [N, N] are the dot products of the images' features, each row scaled to length 1.
    These are maps or vectors, float [N, …]; their sizes may differ.
    """
    return F.mse_loss(_similarities(student), _similarities(teacher))


def _similarities(features: Tensor) -> Tensor:
    """float [N, N]"""
    rows = wide(features).flatten(1)
    return F.normalize(rows @ rows.T)


class Similarity(WeightedLoss):
    """ce_weight·CE + weight·similarity, after the last stage.

    Raises:
        ConfigError: a negative weight.
    """

    roles = ("stages",)
    name = "similarity"
    compares_images = True

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        idle = too_few(plan.images, least=2)
        return idle_caveats({"weight": self.weight}, {"weight": idle})

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return similarity(student.stages[-1], teacher.stages[-1])
