"""Decoupled distillation: Zhao et al. 2022, https://arxiv.org/abs/2203.08679."""

import torch
from torch import Tensor

from kdpipe.losses.base import Plan, WeightedLoss, temperature_caveats, warmup_caveats, warmup_factor
from kdpipe.losses.kd import kd
from kdpipe.losses.large_temperature import LARGE_TEMPERATURE, stable_divergence
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, Positive, checked


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """T²·(alpha·KL of the target class against all others + beta·KL among the others), averaged over the batch.

    An image's KD is this with alpha 1 and beta 1 − (the teacher's probability of the target class), equation 7 of the
    paper: the surer the teacher is of the target, the less the other classes count.

    Both parts are computed from logits; the authors' code takes the logarithm of probabilities, which is −∞ for one
    that underflows. Among the others the target class is left out; their code subtracts 1,000 from its softened logit,
    which is equivalent unless that is hundreds above the others. At T above 100, the same in a form that does not
    cancel (see `kdpipe.losses.large_temperature`).

    Args:
        student, teacher: logits, float [N, classes].
        labels: the target classes, int64 [N].
        temperature: T, above 0.
    """
    if temperature > LARGE_TEMPERATURE:
        return _dkd_at_large_temperature(wide(student), wide(teacher), labels, alpha, beta, temperature)
    student_target, student_others = _target_and_others(wide(student) / temperature, labels)
    teacher_target, teacher_others = _target_and_others(wide(teacher) / temperature, labels)
    of_target, of_others = kd(student_target, teacher_target, 1), kd(student_others, teacher_others, 1)
    return temperature**2 * (alpha * of_target + beta * of_others)


def _dkd_at_large_temperature(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    (student_target, student_others), (teacher_target, teacher_others) = (
        (logits.gather(1, labels.unsqueeze(1)), _others(logits, labels)) for logits in (student, teacher)
    )
    differences, log_targets = student_others - teacher_others, (teacher_others / temperature).log_softmax(dim=1)
    of_others = stable_divergence(differences, log_targets, temperature)
    # The difference of T·log Σ e^(logits / T) among the others: the mean difference, and what their divergence adds.
    shift = (log_targets.exp() * differences).sum(dim=1) + of_others / temperature
    log_binary, _ = _target_and_others(teacher / temperature, labels)
    differences = torch.cat([student_target - teacher_target, shift.unsqueeze(1)], dim=1)
    of_target = stable_divergence(differences, log_binary.log_softmax(dim=1), temperature)
    return (alpha * of_target + beta * of_others).mean()


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [N, classes] without that of the target class, [N, classes − 1]."""
    numbers = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, numbers + (numbers >= labels.unsqueeze(1)))


def _target_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] as target against all others, [N, 2], and among the others, [N, classes − 1]."""
    others = _others(logits, labels)
    return torch.cat([logits.gather(1, labels.unsqueeze(1)), others.logsumexp(dim=1, keepdim=True)], dim=1), others


class DKD(WeightedLoss):
    """ce_weight·CE + weight·min(epoch / warmup, 1)·DKD.

    Args:
        alpha: weight of the target class's part; above 0, since alpha 0 means no teacher in all losses.
        warmup: epochs over which the term grows linearly to its full weight; 0 for none.

    Raises:
        ConfigError: alpha or the temperature not above 0, or a negative beta, warmup or weight.
    """

    name = "dkd"
    one_label = True

    @checked
    def __init__(
        self,
        alpha: Positive,
        beta: NonNegative,
        temperature: Positive,
        warmup: NonNegative,
        weight: NonNegative,
        ce_weight: NonNegative,
    ) -> None:
        super().__init__(weight, ce_weight)
        self.alpha, self.beta, self.temperature, self.warmup = alpha, beta, temperature, warmup

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        found = temperature_caveats(self.temperature)
        if plan.classes == 2 and self.beta > 0:
            problem = "of two classes only one is not the target, so that its part is 0"
            found.append(ConfigError("beta", self.beta, problem=problem))
        return found + warmup_caveats(self.warmup, plan.epochs)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        term = dkd(student.logits, teacher.logits, labels, self.alpha, self.beta, self.temperature)
        return warmup_factor(epoch, self.warmup) * term
