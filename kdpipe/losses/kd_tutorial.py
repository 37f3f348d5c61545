"""The distillation term as the tutorial computed it, kept for comparison."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.kd import KD, kd, standardized
from kdpipe.losses.large_temperature import LARGE_TEMPERATURE
from kdpipe.losses.outputs import Outputs, wide


def kd_tutorial(student: Tensor, teacher: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    """T²·KL, averaged over the batch and the classes: `kd` divided by the number of classes.

    PyTorch's reduction "mean" divides by the number of elements, not of images, so with 10 classes the term is ten
    times weaker than its formula. Arguments as for `kd`.
    """
    if temperature > LARGE_TEMPERATURE:
        return kd(student, teacher, temperature, standardize) / student.shape[1]
    student, teacher = wide(student), wide(teacher)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    log_student = F.log_softmax(student / temperature, dim=1)
    soft_targets = F.softmax(teacher / temperature, dim=1)
    # kl_div with reduction="mean", without the warning that PyTorch gives for it.
    return temperature**2 * F.kl_div(log_student, soft_targets, reduction="none").mean()


class KDTutorial(KD):
    """(1 − alpha)·CE + alpha·T²·KL / classes."""

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return kd_tutorial(student.logits, teacher.logits, self.temperature, self.standardize)
