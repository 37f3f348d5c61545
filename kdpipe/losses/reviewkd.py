"""Knowledge review, from all stages: Chen, Liu, Zhao & Jia 2021, https://arxiv.org/abs/2104.09044."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.losses.base import Plan, WeightedLoss, last_pairs, warmup_caveats, warmup_factor
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, checked


def reviewkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of two maps: their mean squared difference as they are, and pooled to 4×4, 2×2 and 1×1.

    The unpooled difference has weight 1, each pooled one half the weight before; sizes not below the maps' height are
    left out. The sum is divided by the sum of the weights.

    Args:
        student, teacher: a fusion's output and the teacher's maps, float [N, C, H, W].
    """
    student, teacher = wide(student), wide(teacher)
    loss = F.mse_loss(student, teacher)
    weight = total = 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            total += weight
            pooled = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
            loss = loss + weight * F.mse_loss(*pooled)
    return loss / total


class RunningBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that takes a single 1×1 image: one value has no variance, so the running statistics are used."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.numel() > inputs.shape[1]:
            return super().forward(inputs)
        return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Fusion(nn.Module):
    """Attention-based fusion of a student's stage with the result of the deeper stages, unless it is the deepest."""

    def __init__(self, channels: int, mixed_channels: int, teacher_channels: int, is_deepest: bool) -> None:
        super().__init__()
        self.inward = nn.Conv2d(channels, mixed_channels, kernel_size=1, bias=False)
        self.inward_norm = RunningBatchNorm(mixed_channels)
        self.attention = None if is_deepest else nn.Conv2d(2 * mixed_channels, 2, kernel_size=1)
        self.outward = nn.Conv2d(mixed_channels, teacher_channels, kernel_size=3, padding=1, bias=False)
        self.outward_norm = RunningBatchNorm(teacher_channels)
        for convolution in (self.inward, self.outward):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, maps: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """From the student's maps [N, channels, H, W] and the deeper level's [N, mixed_channels, h, w] to the maps that
        are compared with the teacher's, [N, teacher_channels, *size], and the maps to pass on."""
        mixed: Tensor = self.inward_norm(self.inward(maps))
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, size=maps.shape[2:])
            ours, theirs = self.attention(torch.cat([mixed, deeper], dim=1)).sigmoid().split(1, dim=1)
            mixed = ours * mixed + theirs * deeper
        if mixed.shape[2:] != torch.Size(size):
            mixed = F.interpolate(mixed, size=list(size))
        return self.outward_norm(self.outward(mixed)), mixed


class ReviewKD(WeightedLoss):
    """ce_weight·CE + weight·min(epoch / warmup, 1)·(hierarchical context loss, summed over levels).

    The levels are the stages and, deepest, the embedding as 1×1 maps. Starting from the deepest, each level of the
    student is fused with the result of the deeper ones and compared with the teacher's level; stages are paired from
    the last where one network has more. As in the authors' code, the student's maps are the outputs of its stages, the
    teacher's the inputs of their last ReLU. They count the epochs of the warm-up from 0, here it is from 1.

    Args:
        warmup: epochs over which the weight rises linearly; 0 for none.

    Raises:
        ConfigError: a negative value.
    """

    name = "reviewkd"
    roles = ("stages", "preactivations", "embedding")

    @checked
    def __init__(self, weight: NonNegative = 1, ce_weight: NonNegative = 1, warmup: NonNegative = 20) -> None:
        super().__init__(weight, ce_weight)
        self.warmup = warmup

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        pairs = _levels(student, teacher)
        mixed_channels = min(512, pairs[0][0].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(ours.shape[1], mixed_channels, theirs.shape[1], is_deepest=number == 0)
            for number, (ours, theirs) in enumerate(pairs)
        )

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        return warmup_caveats(self.warmup, plan.epochs)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        total = student.logits.new_zeros((), dtype=torch.float32)
        mixed = None
        for fusion, (ours, theirs) in zip(self.fusions, _levels(student, teacher), strict=True):
            outputs, mixed = fusion(wide(ours), mixed, theirs.shape[2:])
            total = total + reviewkd(outputs, theirs)
        return total * warmup_factor(epoch, self.warmup)


def _levels(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Pairs of maps [N, C, H, W] of the student and the teacher, the deepest first."""
    assert student.embedding is not None and teacher.embedding is not None
    embeddings = (student.embedding[:, :, None, None], teacher.embedding[:, :, None, None])
    return [embeddings, *reversed(last_pairs(student.stages, teacher.preactivations))]
