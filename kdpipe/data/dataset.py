"""What a source of images gives, and how it is split."""

import hashlib
import json
from dataclasses import dataclass, field, replace

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from kdpipe.settings.checks import check_number


@dataclass(frozen=True)
class Source:
    """All the images of a data set, before they are split.

    Args:
        images: uint8 [N, C, H, W] at their stored size, in memory or memory-mapped.
        labels: int64 [N].
        class_names: what label 0, 1, … mean.
        given: the splits that the source brings itself, "validation" or "test", as positions int64 [n].
        fingerprint: 16 hex digits that stand for all of the above; computed where it is not given.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    given: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8 and self.images.ndim == 4, "images are uint8 [N, C, H, W]"
        assert self.labels.dtype == torch.int64 and len(self.labels) == len(self.images), "labels are int64 [N]"
        assert self.labels.min() >= 0 and self.labels.max() < len(self.class_names), "labels name classes"
        if not self.fingerprint:
            digest = hashlib.sha256(json.dumps([list(self.images.shape), self.class_names]).encode())
            digest.update(self.images.contiguous().numpy().data)
            digest.update(self.labels.numpy().data)
            for name, positions in sorted(self.given.items()):
                digest.update(name.encode())
                digest.update(positions.numpy().data)
            object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])


@dataclass(frozen=True)
class Rows:
    """Something known of some images of a data set, by their positions there.

    Args:
        positions: int64 [n], sorted.
        values: [n, …].
    """

    positions: Tensor
    values: Tensor

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self.values[torch.searchsorted(self.positions, positions.to(self.positions.device))]

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.positions.to(device), self.values.to(device))


@dataclass(frozen=True)
class ImageDataset:
    """Images, labels and the positions of each split: "train", "test", and "validation" unless it is empty.

    Images keep their position in all splits and subsamples, so that a position names an image in every run.
    """

    name: str
    images: Tensor  # uint8 [N, C, H, W]; or Joined ones, or Rows of what a frozen backbone makes of them
    labels: Tensor  # int64 [N]
    class_names: tuple[str, ...]
    splits: dict[str, Tensor]  # positions, int64 [n]
    fingerprint: str
    unlabelled: str = ""  # fingerprint of those training images that have no label (−1), where there are such

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def near(self, device: torch.device) -> "ImageDataset":
        """The same on a GPU, where it takes less than half of the GPU's free memory."""
        if device.type != "cuda":
            return self
        values = self.images.values if isinstance(self.images, Rows) else self.images
        if not fits(values, device):
            return self
        splits = {name: positions.to(device) for name, positions in self.splits.items()}
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), splits=splits)


def fits(values: Tensor, device: torch.device) -> bool:
    """Whether a tensor takes less than half of what is free on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return bool(values.nbytes < (free + kept_by_torch) / 2)


def split(
    source: Source,
    name: str,
    train_fraction: float,
    val_fraction: float,
    test_fraction: float | None,
    split_seed: int,
) -> ImageDataset:
    """Split what the source has not split itself, by a seeded shuffle that keeps the classes' shares.

    Args:
        train_fraction: share of the training images that is kept.
        val_fraction, test_fraction: shares of the images outside of the given splits. They are unused where the
            source brings that split itself; `test_fraction` None says that it has to.

    Raises:
        ValueError: a fraction out of its range, or too few images for it.
    """
    check_fractions(train_fraction, val_fraction, test_fraction, split_seed)
    given = {key: positions for key, positions in source.given.items() if len(positions)}
    if test_fraction is None and "test" not in given:
        raise ValueError(
            f"dataset.test_fraction=null: {name} has no test images of its own; a number above 0 below 1 is accepted"
        )
    outside = torch.ones(len(source.labels), dtype=torch.bool)
    for positions in given.values():
        outside[positions] = False
    train = outside.nonzero().squeeze(1)
    splits = dict(given)
    whole = len(train)
    for key, fraction in (("test", test_fraction), ("val", val_fraction)):
        split_name = "validation" if key == "val" else key
        if split_name not in given and fraction:
            train, splits[split_name] = _divide(
                train, source.labels, round(fraction * whole), split_seed, f"dataset.{key}_fraction={fraction}"
            )
    if train_fraction < 1:
        train, _ = _divide(
            train,
            source.labels,
            len(train) - round(train_fraction * len(train)),
            split_seed,
            f"dataset.train_fraction={train_fraction}",
        )
    splits["train"] = train
    return ImageDataset(name, source.images, source.labels, source.class_names, splits, source.fingerprint)


def check_fractions(train_fraction: object, val_fraction: object, test_fraction: object, split_seed: object) -> None:
    """Raise ValueError for a fraction outside of its range."""
    check_number("dataset.train_fraction", train_fraction, above=0, high=1)
    check_number("dataset.val_fraction", val_fraction, low=0, below=1)
    check_number("dataset.split_seed", split_seed, low=0, high=2**32 - 1, integer=True)
    if test_fraction is not None:
        check_number("dataset.test_fraction", test_fraction, above=0, below=1)
        if val_fraction + test_fraction >= 1:  # type: ignore[operator]
            raise ValueError(
                f"dataset.val_fraction={val_fraction}, dataset.test_fraction={test_fraction}: a sum below 1 is accepted"
            )


def _divide(positions: Tensor, labels: Tensor, count: int, seed: int, setting: str) -> tuple[Tensor, Tensor]:
    """Those that stay, and `count` that go; both sorted, each class in both by its share."""
    classes = labels[positions]
    try:
        stay, go = train_test_split(positions.numpy(), test_size=count, stratify=classes.numpy(), random_state=seed)
    except ValueError as error:
        number = len(classes.unique())
        raise ValueError(
            f"{setting}: {count} of {len(positions)} images, with every one of {number} classes on both sides, "
            f"cannot be; another share or more images are accepted"
        ) from error
    return torch.from_numpy(stay).sort().values, torch.from_numpy(go).sort().values
