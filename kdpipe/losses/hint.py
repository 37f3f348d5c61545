"""Hints from the maps in the middle of a network: Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.losses.base import WeightedLoss, last_pairs, smaller
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, PositiveInt, checked


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the student's regressed maps and the teacher's, over all elements.

    As in the benchmark (Tian et al. 2020, https://arxiv.org/abs/1910.10699); the authors' own code halves the squares
    and sums them over one axis.

    Args:
        student, teacher: maps, the student's after a regressor to the teacher's shape, float [N, C, H, W].
    """
    return F.mse_loss(wide(student), wide(teacher))


class Hint(WeightedLoss):
    """ce_weight·CE + weight·hint, after one pair of stages, in a single training as in the benchmark.

    The paper trains in two steps: the student's first half with the hint, then all of it with softened outputs. The
    regressor is the benchmark's: a convolution to the teacher's channels and size, BatchNorm and ReLU. Where the
    student's maps are smaller but not half the size of the teacher's, which the benchmark refuses, the teacher's are
    averaged down.

    Args:
        stage: counted from 1 among the stages that both networks have (the last ones, where one has more).

    Raises:
        ConfigError: a negative weight, or a stage that is not a whole number from 1.
    """

    roles = ("stages",)
    name = "hint"
    regressor: nn.Module

    @checked
    def __init__(self, stage: PositiveInt, weight: NonNegative, ce_weight: NonNegative) -> None:
        super().__init__(weight, ce_weight)
        self.stage = stage

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        pairs = last_pairs(student.stages, teacher.stages)
        if self.stage > len(pairs):
            raise ConfigError("stage", self.stage, f"a whole number from 1 to {len(pairs)}")
        student_map, teacher_map = pairs[self.stage - 1]
        convolution = _convolution(student_map, teacher_map)
        self.regressor = nn.Sequential(convolution, nn.BatchNorm2d(teacher_map.shape[1]), nn.ReLU())

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        student_map, teacher_map = last_pairs(student.stages, teacher.stages)[self.stage - 1]
        return hint(*smaller(self.regressor(student_map), teacher_map))


def _convolution(student: Tensor, teacher: Tensor) -> nn.Module:
    """From the student's channels and size to the teacher's; smaller maps keep their size unless it is half of that."""
    (_, channels, height, width), (_, to_channels, to_height, to_width) = student.shape, teacher.shape
    if (height, width) == (2 * to_height, 2 * to_width):
        return nn.Conv2d(channels, to_channels, kernel_size=3, stride=2, padding=1)
    if (2 * height, 2 * width) == (to_height, to_width):
        return nn.ConvTranspose2d(channels, to_channels, kernel_size=4, stride=2, padding=1)
    kernel_size = (1 + max(height - to_height, 0), 1 + max(width - to_width, 0))
    return nn.Conv2d(channels, to_channels, kernel_size)
