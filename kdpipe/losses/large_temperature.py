"""The softened outputs of large temperatures, without the differences of nearly equal numbers.

At T 1e5 all probabilities are 1/classes up to the sixth digit, which is where float32 ends: what the usual form of a
divergence leaves of them is rounding, and T² makes it large. Up to `LARGE_TEMPERATURE` the losses use the usual forms,
whose error there is below a thousandth, so that their results stay as they are; above it they use these.
"""

import math

import torch
from torch import Tensor

from kdpipe.settings.values import LARGE_TEMPERATURE

__all__ = ["LARGE_TEMPERATURE", "centred_probabilities", "stable_divergence"]
LIMIT = 1e9  # from here on the result is that of T → ∞ to the last digit of float32, and T² stays finite


def stable_divergence(differences: Tensor, log_targets: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) of each image, float [N].

    With w the difference of the softened logits minus its mean over the teacher's probabilities p, this is
    T²·log(Σ p·e^w) = T²·log(1 + Σ p·(e^w − 1 − w)), and e^w − 1 − w = w²/2 + w³/6 + …; for T → ∞ half the variance of
    the differences.

    Args:
        differences: the student's logits minus the teacher's, not softened, float [N, classes].
        log_targets: log(softmax(teacher / T)), float [N, classes].
        temperature: T; above `LIMIT` the result is that at `LIMIT`.
    """
    temperature = min(temperature, LIMIT)
    targets = log_targets.exp()
    shifts = (differences - (targets * differences).sum(dim=1, keepdim=True)) / temperature
    is_near = (shifts.abs() < 1).all(dim=1, keepdim=True)
    near = torch.where(is_near, shifts, 0)  # zeros, so that what is not used has no infinite gradient
    series = torch.zeros_like(near)
    for power in range(11, 1, -1):
        series = series * near + 1 / math.factorial(power)
    of_near = (targets * near**2 * series).sum(dim=1).log1p()
    of_far = (log_targets + torch.where(is_near, 0, shifts)).logsumexp(dim=1)
    return temperature**2 * torch.where(is_near.squeeze(1), of_near, of_far)


def centred_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """T·(classes·softmax(logits / T) − 1), float [N, classes]; for T → ∞ the logits minus their mean."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    shifts = centred / temperature
    is_near = (shifts.abs() < 1).all(dim=1, keepdim=True)
    near = torch.where(is_near, shifts, 0)
    of_near = (near - near.expm1().mean(dim=1, keepdim=True).log1p()).expm1()
    of_far = logits.shape[1] * torch.where(is_near, 0, shifts).softmax(dim=1) - 1
    return temperature * torch.where(is_near, of_near, of_far)
