"""The true labels alone."""

from torch import Tensor

from kdpipe.losses.base import Loss, Parts, cross_entropy
from kdpipe.losses.outputs import Outputs


class CrossEntropy(Loss):
    """Trains a teacher, or the student alone."""

    uses_teacher = False

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        ce = cross_entropy(student.logits, labels, self.label_smoothing, self.class_weights)
        return {"loss": ce, "ce": ce}
