"""Softened labels, without a teacher: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.

The control that distillation has to be better than: it is distillation from a teacher that finds all classes equally
likely, and may be what much of a weak teacher's help comes to (Yuan et al. 2020, https://arxiv.org/abs/1909.11723).
"""

from torch import Tensor, nn

from kdpipe.losses.base import cross_entropy
from kdpipe.losses.outputs import Outputs
from kdpipe.settings.checks import check_number


def label_smoothing(student: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with (1 − smoothing)·labels + smoothing / classes, averaged over the images that have a label.

    Args:
        student: logits, float [N, classes].
        labels: int64 [N], −1 for an image without a label; or the classes' shares, float [N, classes], of mixed images.
        smoothing: ε of the paper, the share of each label that is spread evenly over all classes.
    """
    return cross_entropy(student, labels, smoothing)


class LabelSmoothing(nn.Module):
    """Cross-entropy with smoothed labels; its part `ce` is with the labels as they are.

    Raises:
        ValueError: smoothing outside of (0, 1).
    """

    uses_teacher = False

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        check_number("loss.smoothing", smoothing, above=0, below=1)
        self.smoothing = smoothing

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        smoothed = label_smoothing(student.logits, labels, self.smoothing)
        return {"loss": smoothed, "ce": cross_entropy(student.logits, labels)}
