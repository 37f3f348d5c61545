"""Distillation of a review of all stages: Chen, Liu, Zhao & Jia 2021, https://arxiv.org/abs/2104.09044."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.losses.base import Distillation, last_pairs
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.checks import check_number


def reviewkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of two maps: their mean squared difference as they are, and pooled to 4×4, 2×2 and 1×1.

    The difference counts 1 as it is, and half as much at each next size; sizes that are not below the maps' height are
    left out. The sum is divided by the sum of these weights.

    Args:
        student: what a fusion makes of the student's maps, float [N, C, H, W].
        teacher: maps of the same shape.
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


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d which takes a single image of 1×1: one value has no deviation, so that of earlier batches is used."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.numel() > inputs.shape[1]:
            return super().forward(inputs)
        return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Fusion(nn.Module):
    """Attention-based fusion of a student's stage with what the deeper ones came to.

    Args:
        channels: of the student's maps.
        mixed_channels: of what is handed on from level to level.
        teacher_channels: of the teacher's maps.
        is_deepest: there is nothing deeper to fuse with.
    """

    def __init__(self, channels: int, mixed_channels: int, teacher_channels: int, is_deepest: bool) -> None:
        super().__init__()
        self.inward = nn.Conv2d(channels, mixed_channels, kernel_size=1, bias=False)
        self.inward_norm = BatchNorm(mixed_channels)
        self.attention = None if is_deepest else nn.Conv2d(2 * mixed_channels, 2, kernel_size=1)
        self.outward = nn.Conv2d(mixed_channels, teacher_channels, kernel_size=3, padding=1, bias=False)
        self.outward_norm = BatchNorm(teacher_channels)
        for convolution in (self.inward, self.outward):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, maps: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Maps of the student [N, channels, H, W], and what the level below hands on [N, mixed_channels, h, w]; to what
        is compared with the teacher's maps [N, teacher_channels, *size], and what is handed on."""
        mixed: Tensor = self.inward_norm(self.inward(maps))
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, size=maps.shape[2:])
            ours, theirs = self.attention(torch.cat([mixed, deeper], dim=1)).sigmoid().split(1, dim=1)
            mixed = ours * mixed + theirs * deeper
        if mixed.shape[2:] != torch.Size(size):
            mixed = F.interpolate(mixed, size=list(size))
        return self.outward_norm(self.outward(mixed)), mixed


class ReviewKD(Distillation):
    """ce_weight·CE + weight·min(epoch / warmup, 1)·(hierarchical context loss, summed over levels).

    The levels are the stages and, as the deepest, the embedding as maps of 1×1. From the deepest on, each level of the
    student is fused with what the deeper ones came to, and compared with that of the teacher; with different numbers
    of stages they are paired from the last. As in the authors' code the student gives what leaves its stages, the
    teacher what enters their last ReLU. There the epochs of the warm-up are counted from 0, here from 1.

    Args:
        warmup: epochs in which the weight rises; 0 for none.

    Raises:
        ValueError: a value below 0.
    """

    name = "reviewkd"
    roles = ("stages", "preactivations", "embedding")

    def __init__(self, weight: float = 1, ce_weight: float = 1, warmup: float = 20) -> None:
        super().__init__(weight, ce_weight)
        check_number("loss.warmup", warmup, low=0)
        self.warmup = warmup

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        pairs = levels(student, teacher)
        mixed_channels = min(512, pairs[0][0].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(ours.shape[1], mixed_channels, theirs.shape[1], is_deepest=number == 0)
            for number, (ours, theirs) in enumerate(pairs)
        )

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        total = student.logits.new_zeros((), dtype=torch.float32)
        mixed = None
        for fusion, (ours, theirs) in zip(self.fusions, levels(student, teacher), strict=True):
            outputs, mixed = fusion(wide(ours), mixed, theirs.shape[2:])
            total = total + reviewkd(outputs, theirs)
        return total * min(epoch / self.warmup, 1) if self.warmup else total


def levels(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """What is compared, maps [N, C, H, W] of the student and of the teacher, the deepest first."""
    assert student.embedding is not None and teacher.embedding is not None
    embeddings = (student.embedding[:, :, None, None], teacher.embedding[:, :, None, None])
    return [embeddings, *reversed(last_pairs(student.stages, teacher.preactivations))]
