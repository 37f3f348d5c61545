"""The tutorial's student."""

from typing import ClassVar

from torch import Tensor, nn


class StudentCNN(nn.Module):
    """Three convolutions and three linear layers; 0.19 M parameters with 10 classes.

    Takes float images [N, 3, 128, 128], gives logits [N, num_classes].
    """

    head_name = "classifier"
    # Its stages end with pooling, so the ReLUs before it are not preactivations.
    roles: ClassVar = {"stages": ["features.2", "features.5", "features.8"], "embedding": "classifier.5"}

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, kernel_size=5, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),  # [16, 31, 31]
            *(nn.Conv2d(16, 32, kernel_size=5, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),  # [32, 7, 7]
            *(nn.Conv2d(32, 64, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),  # [64, 3, 3]
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(64 * 3 * 3, 250), nn.ReLU()),
            *(nn.Linear(250, 50), nn.ReLU()),
            nn.Linear(50, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
