"""Distillation through softened outputs: Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.checks import check_number
from kdpipe.features import Outputs
from kdpipe.losses.base import Distillation, cross_entropy


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch.

    T² keeps the gradient's size when T changes (section 2.1 of the paper).

    Args:
        student: logits, float [N, classes].
        teacher: logits, float [N, classes].
        temperature: T, above 0.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


class KD(Distillation):
    """(1 − alpha)·CE + alpha·T²·KL(teacher ‖ student).

    Raises:
        ValueError: alpha outside of [0, 1], or a temperature that is not above 0.
    """

    name = "kd"
    distillation_term = staticmethod(kd)

    def __init__(self, alpha: float, temperature: float) -> None:
        check_number("loss.alpha", alpha, low=0, high=1)
        check_number("loss.temperature", temperature, above=0)
        super().__init__(weight=alpha, ce_weight=1 - alpha)
        self.alpha = alpha
        self.temperature = temperature

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return self.distillation_term(student.logits, teacher.logits, self.temperature)

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        if teacher is None:
            assert self.alpha == 0, "a teacher may be missing at alpha 0 only"
            ce = cross_entropy(student.logits, labels)
            return {"loss": ce, "ce": ce}
        return super().forward(student, teacher, labels, indices, epoch)
