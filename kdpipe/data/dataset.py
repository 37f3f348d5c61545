"""What a source of images gives, and how it is split."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from kdpipe.data.duplicates import Comparable, Duplicates, duplicates_of
from kdpipe.data.photos import Photos
from kdpipe.settings.errors import ConfigError, shortened
from kdpipe.settings.values import SplitSeed, TestShare, TrainShare, ValidationShare, check_shares, checked


@dataclass(frozen=True)
class Source:
    """All the images of a data set, before they are split. Raises ValueError for a tensor of another type or shape, a
    label without a class name, and splits that overlap."""

    images: Tensor | Photos  # uint8 [N, C, H, W] at their stored size, in memory or memory-mapped
    labels: Tensor  # int64 [N]
    class_names: tuple[str, ...]
    given: dict[str, Tensor] = field(default_factory=dict)  # "validation" and "test", if any, as positions int64 [n]
    fingerprint: str = ""  # 16 hex digits that identify all of the above; computed by default
    names: Sequence[str] = ()  # of the images' files
    more: "Callable[[], Source] | None" = None  # reads its training images without a label, if it has some

    def __post_init__(self) -> None:
        if not isinstance(self.images, Photos):
            _check_tensor("images", self.images, torch.uint8, 4)
        _check_tensor("labels", self.labels, torch.int64, 1, below=len(self.class_names))
        if len(self.labels) != len(self.images):
            raise ValueError(f"data source: {len(self.labels)} labels for {len(self.images)} images")
        if self.names and len(self.names) != len(self.images):
            raise ValueError(f"data source: {len(self.names)} names for {len(self.images)} images")
        for name, positions in self.given.items():
            if name not in ("validation", "test"):
                raise ValueError(f"data source: it brings a split {name!r}; expected validation or test")
            _check_tensor(f"{name} positions", positions, torch.int64, 1, below=len(self.images))
        brought = torch.cat([*self.given.values(), self.labels[:0]])
        if len(brought.unique()) < len(brought):
            raise ValueError("data source: an image is more than once in the validation and test splits it brings")
        if not self.fingerprint:
            digest = hashlib.sha256(json.dumps([list(self.images.shape), self.class_names]).encode())
            if isinstance(self.images, Photos):
                digest.update(self.images.places[:, 1:].contiguous().numpy().data)
                for photo in self.images:
                    digest.update(photo.data)
            else:
                digest.update(self.images.contiguous().numpy().data)
            digest.update(self.labels.numpy().data)
            for name, positions in sorted(self.given.items()):
                digest.update(name.encode())
                digest.update(positions.numpy().data)
            object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])


def _check_tensor(name: str, found: object, dtype: torch.dtype, ndim: int, below: int | None = None) -> None:
    """Raise ValueError unless `found` is a tensor of that type and number of axes, with values from 0 to `below`."""
    if not isinstance(found, Tensor) or found.dtype != dtype or found.ndim != ndim:
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        axes = "[N, C, H, W]" if ndim == 4 else "[N]"
        raise ValueError(f"data source: its {name} are {what}; expected {dtype} {axes}")
    if below is not None and len(found) and not 0 <= int(found.min()) <= int(found.max()) < below:
        limits = f"{int(found.min())} to {int(found.max())}"
        raise ValueError(f"data source: its {name} go from {limits}; expected 0 to {below - 1}")


class Images(Protocol):
    """Images, or what stands for them: [N, …], indexed by positions int64 [n]. A tensor is one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, positions: Tensor, /) -> Tensor: ...

    def to(self, device: torch.device, /) -> Self: ...


@dataclass(frozen=True)
class PerImageValues:
    """Values for some images of a data set, such as a teacher's logits, indexed by the images' positions there."""

    positions: Tensor  # int64 [n], sorted
    values: Tensor  # [n, …]

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes)

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        return self.values[torch.searchsorted(self.positions, positions.to(self.positions.device))]

    def to(self, device: torch.device, /) -> Self:
        return type(self)(self.positions.to(device), self.values.to(device))


@dataclass(frozen=True)
class ImageDataset:
    """Images, labels and the positions of each split: "train", "test", and "validation" unless it is empty.

    Images keep their position in all splits and subsamples, so that a position names an image in every run.
    """

    name: str
    images: Images  # uint8 [N, C, H, W], padded where they are `Photos`, or a frozen backbone's features of them
    labels: Tensor  # int64 [N]
    class_names: tuple[str, ...]
    splits: dict[str, Tensor]  # positions, int64 [n]
    fingerprint: str
    unlabelled: str = ""  # fingerprint of the training images that have no label (−1); "" without such images
    names: Sequence[str] = ()  # of the images' files
    duplicates: tuple[Duplicates, ...] = ()  # images of the test and validation splits that are also in another
    more: Callable[[], Source] | None = None  # reads training images without a label, if the source has some

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images that an exported network takes."""
        return shape_of_one(self.images)

    @property
    def keeps_shapes(self) -> bool:
        """Whether its images are photos of several sizes, in padded batches."""
        return self.images.shape[1] != self.image_shape[0]

    def moved_to(self, device: torch.device) -> "ImageDataset":
        """The data set on a GPU, if it fits there; the same one otherwise."""
        if not fits_on_gpu(self.images, device):
            return self
        splits = {name: positions.to(device) for name, positions in self.splits.items()}
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), splits=splits)


def shape_of_one(images: Images) -> tuple[int, ...]:
    """(C, H, W) of the images, which photos of several sizes choose."""
    return getattr(images, "image_shape", None) or tuple(images.shape[1:])


def fits_on_gpu(images: Images, device: torch.device) -> bool:
    """Whether the device is a GPU, of whose free memory the images take less than half."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return bool(images.nbytes < (free + kept_by_torch) / 2)


@checked
def split(
    source: Source,
    name: str,
    train_fraction: TrainShare,
    val_fraction: ValidationShare,
    test_fraction: TestShare | None,
    split_seed: SplitSeed,
) -> ImageDataset:
    """Split what the source has not split itself, at random and stratified by class.

    Args:
        train_fraction: share of the training images that is kept.
        val_fraction, test_fraction: shares of the images outside the given splits. They have no effect on a split that
            the source brings itself; `test_fraction` None requires that it brings a test split.

    Raises ConfigError for a fraction out of its range, or too few images for it.
    """
    check_shares(val_fraction, test_fraction)
    given = {key: positions for key, positions in source.given.items() if len(positions)}
    if test_fraction is None and "test" not in given:
        problem = f"{name} has no test images of its own"
        raise ConfigError("test_fraction", None, "a number above 0 below 1", problem)
    outside = torch.ones(len(source.labels), dtype=torch.bool)
    for positions in given.values():
        outside[positions] = False
    train, splits = outside.nonzero().squeeze(1), dict(given)
    whole = len(train)
    # Of as many parts are these images, and as many images of each class are needed.
    parts = 1 + bool(test_fraction and "test" not in given) + bool(val_fraction and "validation" not in given)
    parts += train_fraction < 1

    def divide(key: str, fraction: float, count: int) -> tuple[Tensor, Tensor]:
        try:
            return _divide(source.labels, train, count, split_seed)
        except ValueError as error:
            raise _indivisible(key, fraction, count, source, train, parts) from error

    if test_fraction and "test" not in given:
        train, splits["test"] = divide("test_fraction", test_fraction, round(test_fraction * whole))
    if val_fraction and "validation" not in given:
        train, splits["validation"] = divide("val_fraction", val_fraction, round(val_fraction * whole))
    if train_fraction < 1:
        train, _ = divide("train_fraction", train_fraction, len(train) - round(train_fraction * len(train)))
    splits["train"] = train
    return ImageDataset(
        name,
        source.images,
        source.labels,
        source.class_names,
        splits,
        source.fingerprint,
        names=source.names,
        duplicates=_find_duplicates(source, splits),
        more=source.more,
    )


def _divide(labels: Tensor, positions: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The positions that stay, and `count` that go; both sorted, each class in both by its share. Raises ValueError
    where that is not possible."""
    classes = labels[positions].numpy()
    stay, go = train_test_split(positions.numpy(), test_size=count, stratify=classes, random_state=seed)
    return torch.from_numpy(stay).sort().values, torch.from_numpy(go).sort().values


def _indivisible(key: str, fraction: float, count: int, source: Source, positions: Tensor, parts: int) -> ConfigError:
    """The error for positions that cannot be divided; it names the classes that no share would divide."""
    left = source.labels[positions].bincount(minlength=len(source.class_names)).tolist()
    problem = f"{count} of {len(positions)} images leave a part without some of the {sum(map(bool, left))} classes"
    single = [name for name, number in zip(source.class_names, left, strict=True) if number == 1]
    if not single:
        return ConfigError(key, fraction, "another share, or more images", problem)
    problem += f", and no share works: of {shortened(single)} one image is left to divide"
    return ConfigError(key, fraction, f"at least {parts} images of each class, one for each part", problem)


def _find_duplicates(source: Source, splits: Mapping[str, Tensor]) -> tuple[Duplicates, ...]:
    found, images = [], Comparable(source.images)
    for one, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        if one in splits and other in splits and (pairs := images.twins(splits[one], images, splits[other])):
            among = "training" if other == "train" else other
            found.append(duplicates_of(one, among, pairs, len(splits[one]), source.names, source.names))
    return tuple(found)


def subsample(positions: Tensor, count: int) -> Tensor:
    """At most `count` of the positions [n], sorted, from all over them: images may lie class by class."""
    chosen = torch.linspace(0, len(positions) - 1, min(len(positions), count)).round().long()
    return positions.sort().values[chosen]
