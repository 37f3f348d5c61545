"""Distillation through hard labels: Touvron et al. 2021 (DeiT), https://arxiv.org/abs/2012.12877, equation 3."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import AlphaLoss
from kdpipe.losses.outputs import Outputs, wide


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's logits [N, classes] with the class that the teacher finds likeliest, averaged over
    the batch. Only the labels are smoothed (`loss.label_smoothing`), not the teacher's decision."""
    return F.cross_entropy(wide(student), wide(teacher).argmax(dim=1))


class Hard(AlphaLoss):
    """(1 − alpha)·CE + alpha·CE(the teacher's prediction).

    Raises:
        ConfigError: alpha outside [0, 1].
    """

    name = "hard"

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return hard(student.logits, teacher.logits)
