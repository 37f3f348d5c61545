"""The distillation term as the tutorial computed it, kept for comparison."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.kd import KD
from kdpipe.losses.outputs import wide


def kd_tutorial(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL, averaged over the batch and the classes: `kd` divided by the number of classes.

    PyTorch's reduction "mean" divides by every element, not by the images, so the term is weaker than its formula
    says; with 10 classes ten times.

    Args:
        student: logits, float [N, classes].
        teacher: logits, float [N, classes].
        temperature: T, above 0.
    """
    student, teacher = wide(student), wide(teacher)
    log_student = F.log_softmax(student / temperature, dim=1)
    soft_targets = F.softmax(teacher / temperature, dim=1)
    # kl_div with reduction="mean", said without the warning that PyTorch gives for it.
    return temperature**2 * F.kl_div(log_student, soft_targets, reduction="none").mean()


class KDTutorial(KD):
    """(1 − alpha)·CE + alpha·T²·KL / classes."""

    distillation_term = staticmethod(kd_tutorial)
