"""The true labels alone."""

from torch import Tensor, nn

from kdpipe.losses.base import cross_entropy
from kdpipe.losses.outputs import Outputs


class CrossEntropy(nn.Module):
    """What trains a teacher, and a student alone."""

    uses_teacher = False

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        ce = cross_entropy(student.logits, labels)
        return {"loss": ce, "ce": ce}
