"""The frozen network that teaches."""

from typing import Self

import torch
from torch import Tensor, nn

from kdpipe.models import Classifier


class Teacher(nn.Module):
    """Cannot be trained by accident: no gradients, and in evaluation mode whatever `train()` is called around it."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier: Classifier = classifier.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return self

    # Not inference_mode: a loss may save the teacher's outputs for its backward pass.
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of uint8 images [N, C, H, W]."""
        logits: Tensor = self.classifier(images)
        return logits
