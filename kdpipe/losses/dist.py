"""Distillation from a stronger teacher, by correlation: Huang et al. 2022, https://arxiv.org/abs/2205.10536."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import WeightedLoss
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.values import NonNegative, Positive, checked


def dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, tau: float) -> Tensor:
    """tau²·(beta·d(each image's probabilities) + gamma·d(each class's probabilities over the batch)).

    d is `pearson_distance`: it compares how probabilities relate, not their size. tau² is in the authors' code, not in
    the paper.

    Args:
        student, teacher: logits, float [N, classes].
        beta: weight of the relation between the classes of an image.
        gamma: weight of the relation between the images of a batch; for a batch of 1 its distance is 1.
        tau: the temperature that divides the logits, above 0.
    """
    soft_outputs, soft_targets = F.softmax(wide(student) / tau, dim=1), F.softmax(wide(teacher) / tau, dim=1)
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

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return dist(student.logits, teacher.logits, self.beta, self.gamma, self.temperature)
