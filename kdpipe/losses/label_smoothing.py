"""Softened labels, without a teacher: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.

The control that distillation has to beat: it is distillation from a teacher that finds all classes equally likely, and
may account for much of a weak teacher's help (Yuan et al. 2020, https://arxiv.org/abs/1909.11723).
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kdpipe.losses.base import Loss, Parts, cross_entropy
from kdpipe.losses.outputs import Outputs
from kdpipe.settings.values import checked


def label_smoothing(student: Tensor, labels: Tensor, smoothing: float, class_weights: Tensor | None = None) -> Tensor:
    """`cross_entropy` with (1 − smoothing)·labels + smoothing / classes; smoothing is ε of the paper."""
    return cross_entropy(student, labels, smoothing, class_weights)


class LabelSmoothing(Loss):
    """Cross-entropy with smoothed labels; its part `ce` uses the labels as they are.

    Raises:
        ConfigError: smoothing outside (0, 1).
    """

    uses_teacher = False

    @checked
    def __init__(self, smoothing: Annotated[float, Field(gt=0, lt=1)]) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        loss = label_smoothing(student.logits, labels, self.smoothing, self.class_weights)
        return {"loss": loss, "ce": self.cross_entropy(student.logits, labels)}
