"""Cosine distance of hidden representations, as in PyTorch's Knowledge Distillation Tutorial."""

import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import WeightedLoss
from kdpipe.losses.outputs import Outputs, wide


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cos of the angle between two representations of an image, averaged over the images.

    Args:
        student, teacher: vectors, float [N, D].
    """
    return (1 - F.cosine_similarity(wide(student), wide(teacher))).mean()


class HiddenCosine(WeightedLoss):
    """ce_weight·CE + weight·hidden_cosine of the flattened maps after the last stage.

    Nothing is learnt to bring two networks together. As in the tutorial, the longer of two vectors is averaged along
    its values (channel by channel, row by row) to the length of the shorter one.

    Raises:
        ConfigError: a negative weight.
    """

    roles = ("stages",)
    name = "hidden_cosine"

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        first, second = (wide(outputs.stages[-1]).flatten(1) for outputs in (student, teacher))
        length = min(first.shape[1], second.shape[1])
        return hidden_cosine(F.adaptive_avg_pool1d(first, length), F.adaptive_avg_pool1d(second, length))
