"""Distillation through softened outputs: Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import AlphaDistillation
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.checks import check_choice, check_number


def kd(student: Tensor, teacher: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    """T²·KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch.

    T² keeps the gradient's size when T changes (section 2.1 of the paper).

    Args:
        student: logits, float [N, classes].
        teacher: logits, float [N, classes].
        temperature: T, above 0.
        standardize: whether both networks' logits are standardised before T divides them, see `standardized`.
    """
    student, teacher = wide(student), wide(teacher)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def standardized(logits: Tensor) -> Tensor:
    """Logits [N, classes] less their mean, divided by their standard deviation, image by image.

    The student then learns how the teacher's logits relate, whatever their size: Sun et al. 2024,
    https://arxiv.org/abs/2403.01427. As in the authors' code the variance is the sum of squares over classes − 1 (the
    paper's is over classes), and 1e-7 is added to its root.
    """
    logits = wide(logits)
    deviation = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / (deviation + 1e-7)


class KD(AlphaDistillation):
    """(1 − alpha)·CE + alpha·T²·KL(teacher ‖ student).

    Raises:
        ValueError: alpha outside of [0, 1], a temperature that is not above 0, or `standardize` neither true nor false.
    """

    name = "kd"
    distillation_term: Callable[[Tensor, Tensor, float], Tensor] = staticmethod(kd)

    def __init__(self, alpha: float, temperature: float, standardize: bool = False) -> None:
        super().__init__(alpha)
        check_number("loss.temperature", temperature, above=0)
        check_choice("loss.standardize", standardize, [True, False])
        self.temperature = temperature
        self.standardize = standardize

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        logits, targets = student.logits, teacher.logits
        if self.standardize:  # here and not by the term: those of subclasses take three arguments
            logits, targets = standardized(logits), standardized(targets)
        return self.distillation_term(logits, targets, self.temperature)
