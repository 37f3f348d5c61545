"""Distillation from a stronger teacher, by correlation: Huang et al. 2022, https://arxiv.org/abs/2205.10536."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import Plan, WeightedLoss, idle_caveats, temperature_caveats, too_few
from kdpipe.losses.large_temperature import LARGE_TEMPERATURE, centred_probabilities
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, Positive, checked

LARGEST_TEMPERATURE = 1e6


def dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, tau: float) -> Tensor:
    """tau²·(beta·d(each image's probabilities) + gamma·d(each class's probabilities over the batch)).

    d is `pearson_distance`: it compares how probabilities relate, not their size. tau² is in the authors' code, not in
    the paper. At tau above 100, of `centred_probabilities`, which correlate alike and do not cancel.

    Args:
        student, teacher: logits, float [N, classes].
        beta: weight of the relation between the classes of an image.
        gamma: weight of the relation between the images of a batch; for a batch of 1 its distance is 1.
        tau: the temperature that divides the logits, above 0.
    """
    student, teacher = wide(student), wide(teacher)
    if tau > LARGE_TEMPERATURE:
        soft_outputs, soft_targets = centred_probabilities(student, tau), centred_probabilities(teacher, tau)
    else:
        soft_outputs, soft_targets = F.softmax(student / tau, dim=1), F.softmax(teacher / tau, dim=1)
    of_images = pearson_distance(soft_outputs, soft_targets)
    of_classes = pearson_distance(soft_outputs.T, soft_targets.T)
    return tau**2 * (beta * of_images + gamma * of_classes)


def pearson_distance(one: Tensor, other: Tensor) -> Tensor:
    """1 − Pearson's correlation of the rows of two tensors [R, n], averaged over the rows: from 0 to 2.

    1e-8 is added to the product of the rows' norms, as in the authors' code; the correlation with a constant row is 0.
    """
    one, other = one - one.mean(dim=1, keepdim=True), other - other.mean(dim=1, keepdim=True)
    correlation = (one * other).sum(dim=1) / (one.norm(dim=1) * other.norm(dim=1) + 1e-8)
    return 1 - correlation.mean()


class DIST(WeightedLoss):
    """ce_weight·CE + weight·DIST.

    Raises:
        ConfigError: a negative beta, gamma or weight, or a temperature not above 0.
    """

    name = "dist"
    compares_images = True

    @checked
    def __init__(
        self, beta: NonNegative, gamma: NonNegative, temperature: Positive, weight: NonNegative, ce_weight: NonNegative
    ) -> None:
        super().__init__(weight, ce_weight)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        found = temperature_caveats(self.temperature, LARGEST_TEMPERATURE)
        if self.temperature > LARGE_TEMPERATURE:
            problem = "the term is multiplied by T², and its distances do not shrink with T: the labels hardly count"
            found.append(ConfigError("temperature", self.temperature, problem=problem))
        lines = "two numbers always correlate by 1 or -1"
        idle = {
            "beta": f"there are 2 classes, and {lines}" if plan.classes == 2 else "",
            "gamma": too_few(plan.images, least=3),
        }
        return found + idle_caveats({"beta": self.beta, "gamma": self.gamma}, idle)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return dist(student.logits, teacher.logits, self.beta, self.gamma, self.temperature)
