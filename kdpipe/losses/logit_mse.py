"""Matching the logits themselves: Kim et al. 2021, https://arxiv.org/abs/2105.08919."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import AlphaLoss
from kdpipe.losses.outputs import Outputs, wide


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the logits [N, classes], averaged over the batch and the classes.

    The paper writes the squared norm, a sum over classes; like the authors' code, this averages over them.
    """
    return F.mse_loss(wide(student), wide(teacher))


class LogitMSE(AlphaLoss):
    """(1 − alpha)·CE + alpha·MSE; the authors train with alpha 1.

    Raises:
        ConfigError: alpha outside [0, 1].
    """

    name = "logit_mse"

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return logit_mse(student.logits, teacher.logits)
