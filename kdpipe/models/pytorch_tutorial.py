"""The networks of PyTorch's Knowledge Distillation Tutorial, https://docs.pytorch.org/tutorials."""

from collections.abc import Sequence

from torch import Tensor, nn

from kdpipe.settings.values import PositiveInt, checked


class TutorialNetwork(nn.Module):
    """Two blocks of 3×3 convolutions, a max pooling after each, and two linear layers with dropout between them.

    Takes float images [N, 3, 32, 32], gives logits [N, num_classes].

    Args:
        channels: of the convolutions of each block.
        hidden: width of the first linear layer.

    Raises:
        ConfigError: a width that is not a whole number from 1.
    """

    head_name = "classifier.3"

    @checked
    def __init__(self, channels: Sequence[Sequence[PositiveInt]], hidden: PositiveInt, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        stages = []
        before = 3
        for block in channels:
            for width in block:
                self.features.extend([nn.Conv2d(before, width, kernel_size=3, padding=1), nn.ReLU()])
                before = width
            self.features.append(nn.MaxPool2d(2))
            stages.append(f"features.{len(self.features) - 1}")
        side = 32 // 2 ** len(channels)
        self.classifier = nn.Sequential(
            *(nn.Linear(before * side**2, hidden), nn.ReLU(), nn.Dropout(0.1)),
            nn.Linear(hidden, num_classes),
        )
        # Its stages end with pooling, so the ReLUs before it are not preactivations.
        self.roles = {"stages": stages}

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))
