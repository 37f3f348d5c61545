"""Attention transfer: Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdpipe.losses.base import Plan, WeightedLoss, idle_caveats, last_pairs, smaller
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, checked

LARGE_POWER = 8


def attention(student: Tensor, teacher: Tensor, p: float = 2) -> Tensor:
    """Mean squared difference of attention maps: where in an image a layer's activations are large.

    An attention map is the mean of |x|^p over the channels, scaled to length 1 over an image's positions. The paper
    sums over positions; like the authors' code, this averages (the benchmark's weight is 1,000). Maps of different
    sizes are first averaged down to the smaller, as in the benchmark (Tian et al. 2020,
    https://arxiv.org/abs/1910.10699). A larger p, from 1, gives more weight to the largest activations.

    Args:
        student, teacher: maps, float [N, C, H, W] and [N, C', H', W'].
    """
    student, teacher = smaller(wide(student), wide(teacher))
    return F.mse_loss(_attention_map(student, p), _attention_map(teacher, p))


def _attention_map(maps: Tensor, p: float) -> Tensor:
    """float [N, H·W]"""
    if p > LARGE_POWER:  # the scale does not matter, and |x|^p of a larger or smaller x leaves float32
        maps = maps / maps.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return F.normalize(maps.abs().pow(p).mean(dim=1).flatten(1))


class Attention(WeightedLoss):
    """ce_weight·CE + weight·attention, summed over the stages that both networks have.

    Raises:
        ConfigError: a negative weight, or p below 1.
    """

    roles = ("stages",)
    name = "attention"

    @checked
    def __init__(
        self, p: Annotated[float, Field(ge=1, allow_inf_nan=False)], weight: NonNegative, ce_weight: NonNegative
    ) -> None:
        super().__init__(weight, ce_weight)
        self.p = p

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        pairs = [smaller(*pair) for pair in last_pairs(student.stages, teacher.stages)]
        points = [number for number, (ours, _) in enumerate(pairs, start=1) if ours[0, 0].numel() == 1]
        if not points:
            return []
        stages = "all stages" if len(points) == len(pairs) else f"stages {', '.join(map(str, points))} of {len(pairs)}"
        problem = f"maps of 1×1, of {stages}, show no place where activations are large"
        if len(points) == len(pairs):
            return idle_caveats({"weight": self.weight}, {"weight": problem})
        return [ConfigError("weight", self.weight, problem=problem)]

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        pairs = last_pairs(student.stages, teacher.stages)
        return torch.stack([attention(*pair, self.p) for pair in pairs]).sum()
