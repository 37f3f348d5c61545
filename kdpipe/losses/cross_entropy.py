"""The true labels alone."""

import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the student's logits, float [N, classes], with the labels, int64 [N]; averaged over N."""
    return F.cross_entropy(student, labels)


class CrossEntropy(nn.Module):
    """What trains a teacher, and a student alone."""

    uses_teacher = False

    def forward(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        ce = cross_entropy(student, labels)
        return {"loss": ce, "ce": ce}
