"""The frozen network that teaches."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from kdpipe.data import Rows
from kdpipe.data.dataset import fits
from kdpipe.models import Classifier


class Teacher(nn.Module):
    """Cannot be trained by accident: no gradients, and in evaluation mode whatever `train()` is called around it."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier: Classifier = classifier.requires_grad_(False).eval()
        self._known: list[Rows] = []

    def train(self, mode: bool = True) -> Self:
        return self

    def remember(self, known: Sequence[Rows]) -> None:
        """From now on answer with these logits [n, classes], one set for each view of the images, seen in turn."""
        self._known = list(known)

    def stay_near(self, device: torch.device) -> None:
        """Keep what is remembered on a GPU, where it fits."""
        if device.type == "cuda":
            self._known = [rows.to(device) if fits(rows.values, device) else rows for rows in self._known]

    @property
    def remembers(self) -> bool:
        return bool(self._known)

    # Not inference_mode: a loss may save the teacher's outputs for its backward pass.
    @torch.no_grad()
    def forward(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Logits [N, classes] of what an epoch, counted from 1, sees of some images of the data set.

        Args:
            images: the views, uint8 [N, C, H, W]; not looked at where the answers are known.
            indices: the images' positions in the data set, int64 [N].
        """
        if self._known:
            return self._known[(epoch - 1) % len(self._known)][indices].to(images.device)
        answer: Tensor = self.classifier(images)
        return answer
