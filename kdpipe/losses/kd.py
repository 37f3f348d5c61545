"""Distillation through softened outputs: Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import AlphaLoss, Plan, temperature_caveats
from kdpipe.losses.large_temperature import LARGE_TEMPERATURE, stable_divergence
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import Positive, Share, checked


def kd(student: Tensor, teacher: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    """T²·KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch.

    T² keeps the size of the gradient when T changes (section 2.1 of the paper). At T above 100, the same in a form that
    does not cancel (see `kdpipe.losses.large_temperature`).

    Args:
        student, teacher: logits, float [N, classes].
        temperature: T, above 0.
        standardize: whether to divide `standardized` logits by T.
    """
    student, teacher = wide(student), wide(teacher)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    if temperature > LARGE_TEMPERATURE:
        return stable_divergence(student - teacher, F.log_softmax(teacher / temperature, dim=1), temperature).mean()
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def standardized(logits: Tensor) -> Tensor:
    """Logits [N, classes] minus their mean, divided by their standard deviation, image by image.

    The student then learns how the teacher's logits relate, whatever their size: Sun et al. 2024,
    https://arxiv.org/abs/2403.01427. As in the authors' code, the variance is the sum of squares over classes − 1 (over
    classes in the paper), and 1e-7 is added to the standard deviation.
    """
    logits = wide(logits)
    deviation = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / (deviation + 1e-7)


class KD(AlphaLoss):
    """(1 − alpha)·CE + alpha·T²·KL(teacher ‖ student).

    Raises:
        ConfigError: alpha outside [0, 1], a temperature not above 0, or `standardize` neither true nor false.
    """

    name = "kd"

    def __init_subclass__(cls) -> None:
        if "distillation_term" in vars(cls):  # as of 0.4; ignored, it would train kd under the name of another method
            raise TypeError(f"{cls.__name__}: define term instead of distillation_term, see kdpipe.losses.Loss")

    @checked
    def __init__(self, alpha: Share, temperature: Positive, standardize: bool = False) -> None:
        super().__init__(alpha)
        self.temperature, self.standardize = temperature, standardize

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        if self.standardize and plan.classes == 2:
            problem = "standardised logits of two classes are 0.71 and -0.71 whatever a network answers"
            raise ConfigError("standardize", True, "false", problem)
        return temperature_caveats(self.temperature)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return kd(student.logits, teacher.logits, self.temperature, self.standardize)
