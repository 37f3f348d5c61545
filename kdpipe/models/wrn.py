"""Wide residual networks: Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1605.07146."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import PositiveInt, checked

DEPTHS = "6n + 4, such as 16, 28, 40"


class WideBlock(nn.Module):
    """Two 3×3 convolutions, BatchNorm and ReLU before each; [N, in, H, W] to [N, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        activated = self.relu(self.bn1(inputs))
        outputs: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return outputs + (inputs if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-`depth`-`width`: three stages of (depth − 4) / 6 blocks with 16, 32 and 64 channels, `width` times as many.

    Layers, first weights and roles are those of the benchmark of Tian et al. 2020 (https://arxiv.org/abs/1910.10699):
    a stage's output is a sum, its preactivation the output of the next BatchNorm.

    Raises:
        ConfigError: another depth or width.
    """

    head_name = "fc"

    @checked
    def __init__(
        self, depth: Annotated[int, Field(ge=10, description=DEPTHS)], width: PositiveInt, num_classes: int
    ) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ConfigError("depth", depth, DEPTHS)
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.block1 = self._stage(16, 16 * width, blocks, 1)
        self.block2 = self._stage(16 * width, 32 * width, blocks, 2)
        self.block3 = self._stage(32 * width, 64 * width, blocks, 2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        last = ["block2.0.relu", "block3.0.relu", "relu"]
        self.roles = {"stages": ["block1", "block2", "block3"], "preactivations": last}

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(WideBlock(in_channels, out_channels, stride), *rest)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.relu(self.bn(outputs)).mean(dim=(2, 3)))
