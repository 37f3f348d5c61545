"""ShuffleNetV2 for small images: Ma, Zhang, Zheng & Sun 2018, https://arxiv.org/abs/1807.11164."""

import torch
from torch import Tensor, nn

STEM, LAST = 24, 1024
STAGES = ((116, 4), (232, 8), (464, 4))  # channels and units


class SplitUnit(nn.Module):
    """Half of the channels pass through three convolutions, the other half is kept; then both are shuffled.

    [N, channels, H, W] to the same shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = _branch(channels // 2, channels // 2, 1)
        self.relu = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, inputs: Tensor) -> Tensor:
        kept, passed = inputs.chunk(2, dim=1)
        # The kept half is the output of a ReLU, so another one does not change it.
        return self.shuffle(self.relu(torch.cat([kept, self.layers(passed)], dim=1)))


class DownsamplingUnit(nn.Module):
    """All channels pass through two branches with stride 2; [N, in, H, W] to [N, out, H / 2, W / 2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.left = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2, padding=1, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, half, kernel_size=1, bias=False),
            nn.BatchNorm2d(half),
        )
        self.right = _branch(in_channels, half, 2)
        self.relu = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.shuffle(self.relu(torch.cat([self.left(inputs), self.right(inputs)], dim=1)))


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 1×; its first convolution is 1×1 with stride 1, without pooling after it.

    Layers, first weights (PyTorch's) and roles are those of the benchmark of Tian et al. 2020
    (https://arxiv.org/abs/1910.10699): a stage's output is shuffled, its preactivation is not.
    """

    head_name = "linear"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, STEM, kernel_size=1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())
        self.stages = nn.Sequential()
        channels = STEM
        for out, units in STAGES:
            rest = (SplitUnit(out) for _ in range(units - 1))
            self.stages.append(nn.Sequential(DownsamplingUnit(channels, out), *rest))
            channels = out
        self.last = nn.Sequential(nn.Conv2d(channels, LAST, kernel_size=1, bias=False), nn.BatchNorm2d(LAST), nn.ReLU())
        self.linear = nn.Linear(LAST, num_classes)
        last = [f"stages.{number}.{units - 1}.relu" for number, (_, units) in enumerate(STAGES)]
        self.roles = {"stages": ["stages.0", "stages.1", "stages.2"], "preactivations": last}

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.last(self.stages(self.stem(images)))
        return self.linear(outputs.mean(dim=(2, 3)))


def _branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """1×1, depthwise 3×3 and 1×1 convolutions, without the last ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=stride, padding=1, groups=out_channels, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )
