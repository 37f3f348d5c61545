"""The CIFAR ResNets: He, Zhang, Ren & Sun 2015, section 4.2, https://arxiv.org/abs/1512.03385."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.checks import as_typed, check_choice


class Block(nn.Module):
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

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = F.relu(self.bn1(self.conv1(inputs)))
        outputs = self.bn2(self.conv2(outputs))
        return F.relu(outputs + self.skip(inputs))

    def skip(self, inputs: Tensor) -> Tensor:
        if len(self.shortcut) or (self.stride == 1 and not self.new_channels):
            shortcut: Tensor = self.shortcut(inputs)
            return shortcut
        # Option A: every second pixel, and zeros on both sides of the channels.
        before = self.new_channels // 2
        sampled = inputs[:, :, :: self.stride, :: self.stride]
        return F.pad(sampled, (0, 0, 0, 0, before, self.new_channels - before))


class ResNet(nn.Module):
    """ResNet-`depth` for small images: three stages of (depth − 2) / 6 blocks with 16, 32 and 64 channels.

    Takes float images [N, 3, H, W], gives logits [N, num_classes]. Parameters are named as in the published weight
    files of Y. Idelbayev's pytorch_resnet_cifar10.

    Args:
        depth: 6n + 2, such as 20, 32, 44, 56, 110.
        shortcut: "A" (no parameters, the paper's choice for CIFAR) or "B" (1×1 convolution with BatchNorm).

    Raises:
        ValueError: another depth or shortcut.
    """

    head_name = "linear"

    def __init__(self, depth: int, num_classes: int, shortcut: str = "A") -> None:
        super().__init__()
        check_choice("model.shortcut", shortcut, ["A", "B"])
        if not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
            raise ValueError(f"model.depth={as_typed(depth)}: 6n + 2 is accepted, such as 20, 32, 44, 56, 110")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1, shortcut)
        self.layer2 = self._stage(16, 32, blocks, 2, shortcut)
        self.layer3 = self._stage(32, 64, blocks, 2, shortcut)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        first = Block(in_channels, out_channels, stride, shortcut)
        rest = [Block(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, images: Tensor) -> Tensor:
        outputs = F.relu(self.bn1(self.conv1(images)))
        outputs = self.layer3(self.layer2(self.layer1(outputs)))
        logits: Tensor = self.linear(outputs.mean(dim=(2, 3)))
        return logits
