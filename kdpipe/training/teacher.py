"""What stands in the teacher's place: a frozen network, a file of its answers, or a second student."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from kdpipe.data import ImageDataset, PerImageValues
from kdpipe.data.dataset import fits_on_gpu
from kdpipe.losses.outputs import Outputs
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.weights import weights_digest
from kdpipe.training.observed import Observed


class Teacher(nn.Module):
    """What the loss compares the student with.

    Attributes:
        learns: whether it is trained as well.
        role: "teacher" or "peer": the prefix of its metrics.
        remedy: what to do about one that knows nothing.
    """

    learns = False
    role = "teacher"
    remedy = "train it longer, or use other teacher.weights"

    @property
    def is_rearranged(self) -> bool:
        """Whether its features have another order of axes inside the network; known after its first answer."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether its answers for the training images are known."""
        return False

    @property
    def digest(self) -> str:
        """16 hex digits that identify what it answers from."""
        raise NotImplementedError

    def observe(self, roles: Sequence[str]) -> None:
        """Answer with the features of these roles as well, of `kdpipe.losses.outputs.ROLES`, from now on.

        Raises:
            ConfigError: it cannot.
        """
        raise NotImplementedError

    def covers(self, positions: Tensor) -> bool:
        """Whether it can answer for all of these images of the data set, int64 [n]."""
        return True

    def stay_near(self, device: torch.device) -> None:
        """Keep the answers that it remembers on a GPU, where they fit."""

    def forward(self, images: Tensor, indices: Tensor, epoch: int) -> Outputs:
        """Its outputs for what an epoch, counted from 1, sees of some images of the data set.

        Args:
            images: the views, uint8 [N, C, H, W].
            indices: the positions of the images in the data set, int64 [N].
        """
        raise NotImplementedError


class NetworkTeacher(Teacher):
    """A network that answers for any images."""

    def __init__(self, classifier: Classifier | Ensemble) -> None:
        super().__init__()
        self.classifier: Classifier | Ensemble = classifier
        self._observed = Observed(classifier)

    @property
    def digest(self) -> str:
        return weights_digest(self.classifier.network)

    def observe(self, roles: Sequence[str]) -> None:
        """Answer with the features of these roles as well, of `kdpipe.losses.outputs.ROLES`, from now on.

        Raises:
            ConfigError: the network does not name its submodules with that role.
        """
        self._observed.remove()
        self._observed = Observed(self.classifier, self.classifier.network, roles, key="teacher")

    @property
    def is_rearranged(self) -> bool:
        return self._observed.is_rearranged

    def answer(self, images: Tensor) -> Outputs:
        """Its outputs for uint8 images [N, C, H, W]."""
        return self._observed(images)

    def forward(self, images: Tensor, indices: Tensor, epoch: int) -> Outputs:
        return self.answer(images)


@dataclass(frozen=True)
class RecordedAccuracy:
    """How accurate a network was in the run that trained it.

    Attributes:
        key, address: where its weights stand in the config, and what they are there.
        split: of which images, that are the same here: "test" or "validation".
        accuracy: a fraction.
    """

    key: str
    address: str
    classifier: Classifier
    split: str
    accuracy: float


class FileTeacher(Teacher):
    """Logits from a file, in place of a network; the same for every view of an image.

    Args:
        answers: logits, float32 [n, classes].
        digest: of the file.
    """

    remedy = "are the rows of teacher.file about these images, and its columns in the order of these classes?"

    def __init__(self, answers: PerImageValues, digest: str) -> None:
        super().__init__()
        self.answers = self._near = answers
        self._digest = digest

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def remembers(self) -> bool:
        return True

    def observe(self, roles: Sequence[str]) -> None:
        assert not roles, f"a file has no {', '.join(roles)}"

    def covers(self, positions: Tensor) -> bool:
        return bool(torch.isin(positions, self.answers.positions).all())

    def accuracy(self, data: ImageDataset, split: str) -> float | None:
        """The share of a split's images that it gets right; None where it does not answer for all of them."""
        positions = data.splits.get(split)
        if positions is None or not self.covers(positions):
            return None
        return float((self.answers[positions].argmax(dim=1) == data.labels[positions]).double().mean())

    def stay_near(self, device: torch.device) -> None:
        self._near = self.answers.to(device) if fits_on_gpu(self.answers, device) else self.answers

    def forward(self, images: Tensor, indices: Tensor, epoch: int) -> Outputs:
        return Outputs(self._near[indices].to(images.device))


class Peer(NetworkTeacher):
    """A second student: it learns while it teaches."""

    learns = True
    role = "peer"


class FrozenTeacher(NetworkTeacher):
    """Cannot be trained by accident: no gradients, and in evaluation mode whatever `train()` is called around it.

    Attributes:
        recorded: what is known of it, or of the members of an ensemble, from the runs that trained them.
    """

    def __init__(self, classifier: Classifier | Ensemble) -> None:
        super().__init__(classifier.requires_grad_(False).eval())
        self.recorded: Sequence[RecordedAccuracy] = ()
        self.observe(())

    def train(self, mode: bool = True) -> Self:
        return self

    def observe(self, roles: Sequence[str]) -> None:
        """As of any teacher; the answers that it remembers are forgotten."""
        super().observe(roles)
        self._known: list[PerImageValues] = []
        self._like: Outputs | None = None

    @property
    def observed(self) -> dict[str, list[str]]:
        """The roles that it answers with, each with the names of its submodules."""
        return self._observed.places

    def remember(self, known: Sequence[PerImageValues], like: Outputs | None = None) -> None:
        """Answer with these from now on, one set for each view of the images; epochs take one after the other.

        Args:
            known: logits [n, classes], or packed outputs.
            like: outputs of any images, with the shapes of the packed ones.
        """
        self._known, self._like = list(known), like

    def stay_near(self, device: torch.device) -> None:
        self._known = [rows.to(device) if fits_on_gpu(rows, device) else rows for rows in self._known]

    @property
    def remembers(self) -> bool:
        return bool(self._known)

    # Not inference_mode: a loss may save the teacher's outputs for its backward pass.
    @torch.no_grad()
    def answer(self, images: Tensor) -> Outputs:
        return super().answer(images)

    @torch.no_grad()
    def forward(self, images: Tensor, indices: Tensor, epoch: int) -> Outputs:
        """As of any teacher; the images are not looked at where the answers are known."""
        if self._known:
            rows = self._known[(epoch - 1) % len(self._known)][indices].to(images.device)
            return self._like.unpack(rows) if self._like else Outputs(rows)
        return self.answer(images)
