"""The frozen network that teaches."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from kdpipe.data import PerImageValues
from kdpipe.data.dataset import fits_on_gpu
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.models import Classifier, Ensemble
from kdpipe.training.observed import Observed


class Peer(nn.Module):
    """A second student in the teacher's place: it learns while it teaches."""

    remembers = False

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def answer(self, images: Tensor) -> Outputs:
        """What it makes of uint8 images [N, C, H, W]."""
        return Outputs(wide(self.classifier(images)))

    def forward(self, images: Tensor, indices: Tensor, epoch: int) -> Outputs:
        """As a teacher's, with gradients."""
        return self.answer(images)


class Teacher(nn.Module):
    """Cannot be trained by accident: no gradients, and in evaluation mode whatever `train()` is called around it."""

    def __init__(self, classifier: Classifier | Ensemble) -> None:
        super().__init__()
        self.classifier: Classifier | Ensemble = classifier.requires_grad_(False).eval()
        self._observed = Observed(classifier)
        self.ask_for(())

    def train(self, mode: bool = True) -> Self:
        return self

    def ask_for(self, roles: Sequence[str]) -> None:
        """From now on answer with these roles beside logits, of `ROLES`; what is known is forgotten.

        Raises:
            ValueError: the network does not say what has that role.
        """
        self._observed.remove()
        self._observed = Observed(self.classifier, self.classifier.network, roles, key="teacher")
        self._known: list[PerImageValues] = []
        self._like: Outputs | None = None

    @property
    def asked_for(self) -> dict[str, list[str]]:
        """The roles that it answers with beside logits, each with the submodules that have it."""
        return self._observed.places

    def remember(self, known: Sequence[PerImageValues], like: Outputs | None = None) -> None:
        """From now on answer with these, one set for each view of the images, seen in turn.

        Args:
            known: logits [n, classes], or packed outputs.
            like: outputs of any images, of which packed ones have the shapes.
        """
        self._known, self._like = list(known), like

    def stay_near(self, device: torch.device) -> None:
        """Keep what is remembered on a GPU, where it fits."""
        self._known = [rows.to(device) if fits_on_gpu(rows, device) else rows for rows in self._known]

    @property
    def remembers(self) -> bool:
        return bool(self._known)

    # Not inference_mode: a loss may save the teacher's outputs for its backward pass.
    @torch.no_grad()
    def answer(self, images: Tensor) -> Outputs:
        """What it makes of uint8 images [N, C, H, W]."""
        return self._observed(images)

    @torch.no_grad()
    def forward(self, images: Tensor, indices: Tensor, epoch: int) -> Outputs:
        """What it makes of what an epoch, counted from 1, sees of some images of the data set.

        Args:
            images: the views, uint8 [N, C, H, W]; not looked at where the answers are known.
            indices: the images' positions in the data set, int64 [N].
        """
        if self._known:
            rows = self._known[(epoch - 1) % len(self._known)][indices].to(images.device)
            return self._like.unpack(rows) if self._like else Outputs(rows)
        return self.answer(images)
