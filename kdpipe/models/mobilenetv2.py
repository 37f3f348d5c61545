"""MobileNetV2 for small images: Sandler, Howard, Zhu, Zhmoginov & Chen 2018, https://arxiv.org/abs/1801.04381."""

from torch import Tensor, nn

from kdpipe.settings.checks import check_number

# Of each group of blocks: how many times wider they are inside, channels at full width, blocks, stride of the first.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class Block(nn.Module):
    """1×1, depthwise 3×3 and 1×1 convolutions, nothing after the last; added to the input where shapes agree.

    [N, in, H, W] to [N, out, H / stride, W / stride].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = expansion * in_channels
        self.layers = nn.Sequential(
            *convolution(in_channels, inside, 1),
            *convolution(inside, inside, 3, stride, groups=inside),
            nn.Conv2d(inside, out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return inputs + outputs if self.adds else outputs


class MobileNetV2(nn.Module):
    """MobileNetV2 whose second group of blocks has a stride of 1, so that 2×2 of 32×32 pixels remain.

    Takes float images [N, 3, H, W], gives logits [N, num_classes]. Layers, first weights and roles are those of the
    benchmark of Tian et al. 2020 (https://arxiv.org/abs/1910.10699), whose "MobileNetV2" has half the width; its stages
    end without a ReLU.

    Args:
        width: times the paper's numbers of channels; the last convolution has 1280 at least.

    Raises:
        ValueError: a width below 0.1.
    """

    head_name = "classifier"

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        check_number("model.width", width, low=0.1)
        channels, last = int(32 * width), max(1280, int(1280 * width))
        self.conv1 = nn.Sequential(*convolution(3, channels, 3, stride=2))
        self.blocks = nn.Sequential()
        for expansion, full, number, stride in GROUPS:
            out = int(full * width)
            first = Block(channels, out, stride, expansion)
            self.blocks.append(nn.Sequential(first, *(Block(out, out, 1, expansion) for _ in range(number - 1))))
            channels = out
        self.conv2 = nn.Sequential(*convolution(channels, last, 1))
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.roles = {"stages": ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]}

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.conv2(self.blocks(self.conv1(images)))
        logits: Tensor = self.classifier(outputs.mean(dim=(2, 3)))
        return logits


def convolution(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    """A convolution whose output has the size of its input divided by `stride`, with BatchNorm and ReLU."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=False)
    return layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
