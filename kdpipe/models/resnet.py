"""ResNets for small images: He, Zhang, Ren & Sun 2015, section 4.2, https://arxiv.org/abs/1512.03385."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch.nn.functional as F
import torchvision.models
from pydantic import Field
from torch import Tensor, nn

from kdpipe.models.torchvision import resnet_roles
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import PositiveInt, checked

DEPTHS = "6n + 2, such as 20, 32, 44, 56, 110"
Widths = Annotated[
    Sequence[PositiveInt],
    Field(min_length=4, max_length=4, description="four whole numbers from 1, such as [16,16,32,64]"),
]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the shortcut around them; [N, in, H, W] to [N, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.shortcut = nn.Sequential()
        if shortcut == "B" and (stride != 1 or self.new_channels):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(inputs)))))
        return self.relu(outputs + self.skip(inputs))

    def skip(self, inputs: Tensor) -> Tensor:
        if len(self.shortcut) or (self.stride == 1 and not self.new_channels):
            return self.shortcut(inputs)
        # Option A: every second pixel, zero-padded on both sides of the channels.
        before = self.new_channels // 2
        sampled = inputs[:, :, :: self.stride, :: self.stride]
        return F.pad(sampled, (0, 0, 0, 0, before, self.new_channels - before))


class ResNet(nn.Module):
    """ResNet-`depth` for small images: three stages of (depth − 2) / 6 blocks.

    Parameters are named as in the published weight files of Y. Idelbayev's pytorch_resnet_cifar10.

    Args:
        shortcut: "A" (no parameters, the paper's choice for CIFAR) or "B" (1×1 convolution with BatchNorm). With B it
            is the network of the benchmark of Tian et al. 2020 (https://arxiv.org/abs/1910.10699), initialised like
            theirs; with A it is initialised like Idelbayev's.
        widths: channels of the first convolution and of each stage; 32, 64, 128, 256 are the benchmark's "x4".

    Raises:
        ConfigError: another depth or shortcut, or not four widths.
    """

    head_name = "linear"

    @checked
    def __init__(
        self,
        depth: Annotated[int, Field(ge=8, description=DEPTHS)],
        num_classes: int,
        shortcut: Literal["A", "B"] = "A",
        widths: Widths = (16, 16, 32, 64),
    ) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ConfigError("depth", depth, DEPTHS)
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.conv1 = nn.Conv2d(3, stem, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = self._stage(stem, stages[0], blocks, 1, shortcut)
        self.layer2 = self._stage(stages[0], stages[1], blocks, 2, shortcut)
        self.layer3 = self._stage(stages[1], stages[2], blocks, 2, shortcut)
        self.linear = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in" if shortcut == "A" else "fan_out")
            elif isinstance(module, nn.Linear) and shortcut == "A":
                nn.init.kaiming_normal_(module.weight)
        names = [f"layer{number}" for number in (1, 2, 3)]
        self.roles = {"stages": names, "preactivations": [f"{name}.{blocks - 1}.relu" for name in names]}

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, shortcut)
        rest = [BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, images: Tensor) -> Tensor:
        outputs = F.relu(self.bn1(self.conv1(images)))
        outputs = self.layer3(self.layer2(self.layer1(outputs)))
        return self.linear(outputs.mean(dim=(2, 3)))


def resnet50(num_classes: int) -> nn.Module:
    """torchvision's ResNet-50 for images of 32×32 pixels, as in the benchmark of Tian et al. 2020.

    Its first convolution is 3×3 with stride 1, without pooling after it.
    """
    network: Any = torchvision.models.resnet50(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out")
    network.maxpool = nn.Identity()
    network.head_name = "fc"
    network.roles = resnet_roles(network)
    return network
