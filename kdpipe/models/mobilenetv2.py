"""MobileNetV2 for small images: Sandler, Howard, Zhu, Zhmoginov & Chen 2018, https://arxiv.org/abs/1801.04381."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from kdpipe.settings.values import checked

# For each group of blocks: expansion, channels at full width, number of blocks, stride of the first.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1×1, depthwise 3×3 and linear 1×1 convolutions; added to the input where shapes agree.

    [N, in, H, W] to [N, out, H / stride, W / stride].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = expansion * in_channels
        self.layers = nn.Sequential(
            *_convolution(in_channels, inside, 1),
            *_convolution(inside, inside, 3, stride, groups=inside),
            nn.Conv2d(inside, out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return inputs + outputs if self.adds else outputs


class MobileNetV2(nn.Module):
    """MobileNetV2 whose second group of blocks has stride 1, so that 32×32 images end as 2×2 maps.

    Layers, first weights and roles are those of the benchmark of Tian et al. 2020 (https://arxiv.org/abs/1910.10699),
    whose "MobileNetV2" has half the width; its stages end without a ReLU.

    Args:
        width: multiplies the paper's numbers of channels; the last convolution has at least 1280.

    Raises:
        ConfigError: a width below 0.1.
    """

    head_name = "classifier"

    @checked
    def __init__(self, num_classes: int, width: Annotated[float, Field(ge=0.1, allow_inf_nan=False)] = 1.0) -> None:
        super().__init__()
        channels, last = int(32 * width), max(1280, int(1280 * width))
        self.conv1 = nn.Sequential(*_convolution(3, channels, 3, stride=2))
        self.blocks = nn.Sequential()
        for expansion, full, number, stride in GROUPS:
            out = int(full * width)
            first = InvertedResidual(channels, out, stride, expansion)
            rest = (InvertedResidual(out, out, 1, expansion) for _ in range(number - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            channels = out
        self.conv2 = nn.Sequential(*_convolution(channels, last, 1))
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.roles = {"stages": ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]}

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.conv2(self.blocks(self.conv1(images)))
        return self.classifier(outputs.mean(dim=(2, 3)))


def _convolution(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    """A convolution that divides height and width by `stride`, with BatchNorm and ReLU."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=False)
    return layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
