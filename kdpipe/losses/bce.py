"""Binary cross-entropy: each class is a question of its own. Wightman, Touvron & Jégou 2021 ("ResNet strikes back",
RSB), https://arxiv.org/abs/2110.00476, after Beyer et al. 2020, https://arxiv.org/abs/2006.07159."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import Loss, Parts
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.values import PositiveShare, checked


def bce(
    student: Tensor,
    labels: Tensor,
    label_smoothing: float = 0,
    threshold: float | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy with each class's share in an image, averaged over the classes and the labelled images; 0
    where no image has a label. The same as timm's `BinaryCrossEntropy`, which knows no images without a label.

    Args:
        student: logits, float [N, classes].
        labels: int64 [N], −1 for unlabelled images; or class shares of mixed images, float [N, classes].
        label_smoothing: shares become (1 − label_smoothing)·share + label_smoothing / classes.
        threshold: smoothed shares above it count as 1, others as 0, so that both classes of a mixed image are right;
            None for the shares as they are.
        class_weights: how much the images of each class count, float [classes], above 0, as in `cross_entropy`; None
            for all alike.
    """
    student = wide(student)
    classes = student.shape[1]
    shares = labels.to(student.dtype)
    if not labels.is_floating_point():
        shares = F.one_hot(labels.clamp(min=0), classes).to(student.dtype) * (labels >= 0)[:, None]
    targets = (1 - label_smoothing) * shares + label_smoothing / classes
    if threshold is not None:
        targets = (targets > threshold).to(student.dtype)
    of_images = F.binary_cross_entropy_with_logits(student, targets, reduction="none").mean(dim=1)
    weights = shares.sum(dim=1) if class_weights is None else shares @ class_weights.to(student.dtype)
    return (of_images * weights).sum() / weights.sum().clamp(min=torch.finfo(student.dtype).tiny)


class BCE(Loss):
    """Binary cross-entropy; its part `ce` is the cross-entropy, as a measure.

    Raises:
        ConfigError: a threshold outside (0, 1].
    """

    uses_teacher = False

    @checked
    def __init__(self, threshold: PositiveShare | None = None) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        loss = bce(student.logits, labels, self.label_smoothing, self.threshold, self.class_weights)
        return {"loss": loss, "ce": self.cross_entropy(student.logits, labels)}
