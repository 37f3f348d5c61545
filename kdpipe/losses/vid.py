"""Variational information distillation: Ahn, Hu, Damianou, Lawrence & Dai 2019, https://arxiv.org/abs/1904.05835."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.losses.base import WeightedLoss, last_pairs, smaller
from kdpipe.losses.outputs import Outputs, wide

FIRST_VARIANCE, SMALLEST_VARIANCE = 5.0, 1e-5  # the authors'


def vid(student: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's maps under a Gaussian around the student's prediction.

    ((student − teacher)² / variance + log variance) / 2, averaged over all elements; the paper sums and adds a
    constant, which the authors' code leaves out.

    Args:
        student, teacher: maps, the student's after a regressor (the mean), float [N, C, H, W].
        variance: of each channel, float [C], above 0.
    """
    student, teacher, variance = wide(student), wide(teacher), wide(variance).reshape(1, -1, 1, 1)
    return ((student - teacher) ** 2 / variance + variance.log()).mean() / 2


class VID(WeightedLoss):
    """ce_weight·CE + weight·vid, summed over the stages that both networks have; means and variances are learned.

    Maps of different sizes are averaged down to the smaller, as in the benchmark (Tian et al. 2020,
    https://arxiv.org/abs/1910.10699).

    Raises:
        ConfigError: a negative weight.
    """

    roles = ("stages",)
    name = "vid"
    regressors: nn.ModuleList
    log_scales: nn.ParameterList

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        channels = [(of.shape[1], to.shape[1]) for of, to in last_pairs(student.stages, teacher.stages)]
        first = math.log(math.expm1(FIRST_VARIANCE - SMALLEST_VARIANCE))
        self.regressors = nn.ModuleList(_regressor(*pair) for pair in channels)
        self.log_scales = nn.ParameterList(torch.full((number,), first) for _, number in channels)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        pairs = last_pairs(student.stages, teacher.stages)
        terms = []
        for pair, regressor, log_scale in zip(pairs, self.regressors, self.log_scales, strict=True):
            student_map, teacher_map = smaller(*pair)
            terms.append(vid(regressor(student_map), teacher_map, F.softplus(log_scale) + SMALLEST_VARIANCE))
        return torch.stack(terms).sum()


def _regressor(channels: int, to_channels: int) -> nn.Sequential:
    inputs = (channels, to_channels, to_channels)
    first, second, third = (nn.Conv2d(number, to_channels, kernel_size=1, bias=False) for number in inputs)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
