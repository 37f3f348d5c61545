"""ShuffleNet for small images: Zhang, Zhou, Lin & Sun 2017, https://arxiv.org/abs/1707.01083."""

import torch
from torch import Tensor, nn

STEM = 24
STAGES = ((240, 4), (480, 8), (960, 4))  # channels and units
GROUPS = 3


class ShuffleUnit(nn.Module):
    """1×1, depthwise 3×3 and 1×1 convolutions, in groups whose channels are shuffled.

    With stride 1 the result is added to the input, with stride 2 concatenated with the pooled input:
    [N, in, H, W] to [N, out, H / stride, W / stride].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        own = out_channels if stride == 1 else out_channels - in_channels
        middle = own // 4
        groups = 1 if in_channels == STEM else GROUPS  # the paper has no groups where channels are few
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, middle, kernel_size=1, groups=groups, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.ChannelShuffle(groups),
            nn.Conv2d(middle, middle, kernel_size=3, stride=stride, padding=1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),  # the paper has none here
            nn.Conv2d(middle, own, kernel_size=1, groups=GROUPS, bias=False),
            nn.BatchNorm2d(own),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layers(inputs)
        joined = outputs + inputs if self.pool is None else torch.cat([outputs, self.pool(inputs)], dim=1)
        return self.relu(joined)


class ShuffleNetV1(nn.Module):
    """ShuffleNet 1× with 3 groups; its first convolution is 1×1 with stride 1, without pooling after it.

    Layers, first weights (PyTorch's) and roles are those of the benchmark of Tian et al. 2020,
    https://arxiv.org/abs/1910.10699.
    """

    head_name = "linear"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, STEM, kernel_size=1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())
        self.stages = nn.Sequential()
        channels = STEM
        for out, units in STAGES:
            rest = (ShuffleUnit(out, out, 1) for _ in range(units - 1))
            self.stages.append(nn.Sequential(ShuffleUnit(channels, out, 2), *rest))
            channels = out
        self.linear = nn.Linear(channels, num_classes)
        last = [f"stages.{number}.{units - 1}.relu" for number, (_, units) in enumerate(STAGES)]
        self.roles = {"stages": ["stages.0", "stages.1", "stages.2"], "preactivations": last}

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.stages(self.stem(images)).mean(dim=(2, 3)))
