"""VGG for small images: Simonyan & Zisserman 2014, https://arxiv.org/abs/1409.1556."""

from typing import Literal

from torch import Tensor, nn

from kdpipe.settings.values import checked

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {8: 1, 13: 2}  # in each block, by depth


class VGG(nn.Module):
    """Five blocks of 3×3 convolutions with BatchNorm, and one linear layer in place of the paper's three.

    Layers, first weights and roles are those of the benchmark of Tian et al. 2020 (https://arxiv.org/abs/1910.10699):
    for 32×32 images the last two blocks work on 4×4, and the first block is not a stage.

    Args:
        depth: 8 or 13, counted as if there were three linear layers.

    Raises:
        ConfigError: another depth.
    """

    head_name = "classifier"

    @checked
    def __init__(self, depth: Literal[8, 13], num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        channels = 3
        for number, width in enumerate(WIDTHS):
            block = nn.Sequential()
            if number in (1, 2, 3):
                block.append(nn.MaxPool2d(2))
            for _ in range(CONVOLUTIONS[depth]):
                block.extend([nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.BatchNorm2d(width), nn.ReLU()])
                channels = width
            self.blocks.append(block)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        stages = [f"blocks.{number}" for number in (1, 2, 3, 4)]
        last = [f"{name}.{len(self.get_submodule(name)) - 1}" for name in stages]  # type: ignore[arg-type]
        self.roles = {"stages": stages, "preactivations": last}

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(images).mean(dim=(2, 3)))
