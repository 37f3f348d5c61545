"""The teacher's last map predicted from the student's, as in PyTorch's Knowledge Distillation Tutorial."""

from torch import Tensor, nn

from kdpipe.losses.base import WeightedLoss, smaller
from kdpipe.losses.hint import hint
from kdpipe.losses.outputs import Outputs


class MapMSE(WeightedLoss):
    """ce_weight·CE + weight·hint of the maps after the last stage.

    The tutorial's regressor is a 3×3 convolution of the student's map to the teacher's channels, without the BatchNorm
    and ReLU of `Hint`. Where the maps differ in size, which the tutorial's do not, the larger is averaged down.

    Raises:
        ConfigError: a negative weight.
    """

    roles = ("stages",)
    name = "map_mse"
    regressor: nn.Module

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        channels, to_channels = (outputs.stages[-1].shape[1] for outputs in (student, teacher))
        self.regressor = nn.Conv2d(channels, to_channels, kernel_size=3, padding=1)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return hint(*smaller(self.regressor(student.stages[-1]), teacher.stages[-1]))
