"""Images of data sets in Python, as a training takes them: a map-style `Dataset`, a `DataLoader`, or batches."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from kdpipe.data.dataset import ImageDataset
from kdpipe.settings.errors import ConfigError
from kdpipe.system.randomness import derive_seed

SPLITS = ("train", "validation", "test")
Given = Dataset | DataLoader | Iterable[tuple[Tensor, Tensor]]


class Examples:
    """The images of several data sets one after the other, read when they are asked for.

    A data set's own transforms run each time, with random numbers that depend on the seed, the epoch and the image
    only, so that all arms of a seed see the same views.

    Args:
        parts: map-style data sets of (image tensor, label).
        seed: of the views.

    Attributes:
        epoch: the one whose views are read of the first part; the others have the same views in all epochs.
    """

    def __init__(self, parts: Sequence[Any], seed: int) -> None:
        self._parts, self._seed = parts, seed
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.epoch = 1
        self._sample = self[torch.tensor([0])]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([int(self._starts[-1]), *self._sample.shape[1:]])

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self._sample.element_size()

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        with _restored_random_state():
            images = [self._image(position) for position in positions.tolist()]
        return default_collate(images)

    def to(self, device: torch.device, /) -> Self:
        """Itself: a data set is not moved."""
        return self

    def _image(self, position: int) -> Tensor:
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        seed = derive_seed(self._seed, f"view/{self.epoch if part == 0 else 0}/{position}")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also prepares GPUs, which takes a millisecond
        random.seed(seed)
        np.random.seed(seed % 2**32)
        image = self._parts[part][position - int(self._starts[part])][0]
        return torch.as_tensor(image)


class _Pairs(Dataset):
    """Images and labels in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.images[place], self.labels[place]


def examples(given: Mapping[str, Given], seed: int, num_classes: int | None = None) -> ImageDataset:
    """The data set of these splits, "train" first.

    Args:
        given: a map-style `Dataset` or a `DataLoader` of one, whose transforms run anew in each epoch; or an iterable
            of batches (images, labels), which is read into memory once.
        num_classes: None for the largest label and one.

    Raises:
        ConfigError: a split that is none of these, or is empty.
    """
    parts = {split: _part(split, some) for split, some in given.items()}
    labels = [_labels(split, part) for split, part in parts.items()]
    every = torch.cat(labels)
    classes = num_classes or int(every.max()) + 1
    splits, start = {}, 0
    for split, some in zip(parts, labels, strict=True):
        splits[split] = torch.arange(start, start + len(some))
        start += len(some)
    images: Any = Examples(list(parts.values()), seed)
    if all(isinstance(part, _Pairs) for part in parts.values()):  # nothing is random, and nothing is to be read
        images = torch.cat([part.images for part in parts.values()])
    digest = hashlib.sha256(every.numpy().tobytes()).hexdigest()[:16]
    return ImageDataset("python", images, every, tuple(map(str, range(classes))), splits, digest)


def _part(split: str, given: Any) -> Any:
    """A map-style data set of a split."""
    if isinstance(given, DataLoader):
        given = given.dataset
    if type(given) is TensorDataset and len(given.tensors) == 2:
        images, labels = given.tensors
        given = _Pairs(images, labels.long())
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, list | tuple):
        if len(given) == 0:
            raise ConfigError(split, expected="at least one image")
        return given
    if not isinstance(given, Iterable):
        raise ConfigError(split, type(given).__name__, "a Dataset, a DataLoader, or batches of (images, labels)")
    try:
        batches = [(torch.as_tensor(images), torch.as_tensor(labels)) for images, labels in given]
    except (TypeError, ValueError) as error:
        raise ConfigError(split, type(given).__name__, "batches of (images, labels)") from error
    if not batches:
        raise ConfigError(split, expected="at least one batch")
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return _Pairs(images, labels.long())


def _labels(split: str, part: Any) -> Tensor:
    """The labels of a map-style data set, int64 [N]: its `targets`, as torchvision's have them, or one by one."""
    if isinstance(part, _Pairs):
        return part.labels
    known = getattr(part, "targets", None)
    if known is None or len(known) != len(part):
        known = [int(part[place][1]) for place in range(len(part))]
    labels = torch.as_tensor(known).long()
    if labels.ndim != 1 or int(labels.min()) < 0:
        raise ConfigError(split, expected="a label from 0 for each image")
    return labels


@contextmanager
def _restored_random_state() -> Iterator[None]:
    """Leave the random numbers outside of the block as they were."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
    ]
    try:
        yield
    finally:
        for restore, state in states:
            restore(state)
