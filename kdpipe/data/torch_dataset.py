"""A user's own `torch.utils.data.Dataset`, read once."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from kdpipe.data.dataset import Source
from kdpipe.data.decode import ImageSize, OnBadImage, stored
from kdpipe.data.listed import SPLITS, Listed, arranged
from kdpipe.data.photos import Photos, PhotoWriter, kept
from kdpipe.data.pixels import as_rgb
from kdpipe.settings.errors import ConfigError, flat, shortened
from kdpipe.settings.values import Resize, StoredResize, checked
from kdpipe.system.progress import progress

log = logging.getLogger("kdpipe")

ITEM = "(image, label) or (image, label, name)"
PICTURE = "a PIL image, a uint8 tensor [C, H, W] or a uint8 array [H, W, C], of 1 or 3 channels"


@checked
def torch_source(
    parts: Mapping[str, Any],
    class_names: list[str] | None,
    image_size: ImageSize | None,
    on_bad_image: OnBadImage,
    cache_dir: str,
    resize: StoredResize = "squeeze",
) -> Source:
    """The images of map-style data sets as uint8 [N, 3, H, W], read in their order.

    Nothing tells whether the images of such a data set have changed, so they are read at each start, into a file that
    ends with the process: there may be more of them than fit into memory.

    Args:
        parts: the data sets by the split, "train" and perhaps "validation" and "test", whose items are `ITEM`. The
            image is `PICTURE`; the label is a class or its number, in `.classes` if the data set has them, and −1 or
            None where there is none.
        class_names: the classes in their order; None for `.classes`, or the sorted labels.
        image_size: side in pixels of the stored squares; None keeps the images' size, which must be the same for all
            unless `resize` is "keep" (see `kept`).
        cache_dir: folder of that file.

    Raises ConfigError for items of another form, for one that raises an error (unless `on_bad_image` is "skip"), and
    for images that differ when they are read again.
    """
    for split, part in parts.items():
        _check_part(part, split)
    items = _Items(image_size, resize, Path(cache_dir).expanduser(), sum(map(len, parts.values())))
    for split in SPLITS:
        if split in parts:
            _read(parts[split], split, class_names, on_bad_image == "skip", items)
    order = class_names or next((list(named) for part in parts.values() if (named := _classes_of(part))), None)
    plan = arranged(items.listed, order, "_target_", _name_of(parts["train"]))
    images = items.stored()
    names = [str(one.name) for one in items.listed]
    is_named = all(one.name is not None for one in items.listed)

    def source(positions: Sequence[int], labels: Sequence[int], classes: tuple[str, ...], **more: Any) -> Source:
        if isinstance(images, Photos):
            pixels: Tensor | Photos = images.at(positions)
        else:
            in_order = list(positions) == list(range(len(images)))
            pixels = torch.from_numpy(images if in_order else images[list(positions)])
        known = [names[position] for position in positions] if is_named else ()
        return Source(pixels, torch.tensor(labels, dtype=torch.int64), classes, names=known, **more)

    splits = np.array([items.listed[position].split for position in plan.labelled])
    given = {name: torch.from_numpy(np.flatnonzero(splits == name)) for name in SPLITS[1:] if name in splits}
    without = plan.unlabelled
    more = (lambda: source(without, [0] * len(without), ("unlabelled",))) if without else None
    return source(plan.labelled, plan.classes, plan.class_names, given=given, more=more)


@dataclass
class _Items:
    """What was read."""

    image_size: int | None
    resize: StoredResize
    folder: Path
    count: int  # at most
    images: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 3, 1, 1), np.uint8))  # [count, 3, H, W]
    writer: PhotoWriter | None = None  # of photos that keep their shape
    listed: list[Listed] = field(default_factory=list)

    def add(self, image: Image.Image, listed: Listed, called: str) -> None:
        if self.resize == "keep":
            if not self.writer:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.writer = PhotoWriter(tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115 - `stored` closes it
            self.writer.add(len(self.listed), kept(image, self.image_size))
        else:
            self._add_at_one_size(image, called, self.resize)
        self.listed.append(listed)

    def stored(self) -> NDArray[np.uint8] | Photos:
        """What was read, in its order."""
        if not self.writer:
            return self.images[: len(self.listed)]
        places = self.writer.table()
        with self.writer.file as file:
            return Photos(torch.from_numpy(np.memmap(file, np.uint8, "c")), places)

    def _add_at_one_size(self, image: Image.Image, called: str, resize: Resize) -> None:
        if not self.listed:
            width, height = (self.image_size, self.image_size) if self.image_size else image.size
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                self.images = np.memmap(file, np.uint8, "w+", shape=(self.count, 3, height, width))
        height, width = self.images.shape[2:]
        if not self.image_size and image.size != (width, height):
            problem = f"the first image has {width}×{height} pixels, but {called} {image.width}×{image.height}"
            raise ConfigError("image_size", None, "the side in pixels, such as 128", problem)
        self.images[len(self.listed)] = stored(image, (width, height), resize)


def check_map_style(dataset: Any, target: str) -> None:
    """Raise ConfigError for what is no map-style data set."""
    expected = "a map-style torch.utils.data.Dataset, with __len__ and __getitem__"
    is_type = isinstance(dataset, type)
    if issubclass(dataset, IterableDataset) if is_type else isinstance(dataset, IterableDataset):
        problem = "an IterableDataset has no images by number; one that lists its items once is a map-style one"
        raise ConfigError("_target_", target, expected, problem)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ConfigError("_target_", target, expected)


def _check_part(dataset: Any, split: str) -> None:
    target = _name_of(dataset)
    check_map_style(dataset, target)
    if not len(dataset):
        raise ConfigError("_target_", target, "at least one image", f"the {split} data set is empty")


def _read(dataset: Any, split: str, class_names: Sequence[str] | None, skips: bool, items: _Items) -> None:
    target, count = _name_of(dataset), len(dataset)
    classes = _classes_of(dataset) or class_names
    bad: dict[int, str] = {}
    with progress("reading images", count) as bar:
        for index in range(count):
            called = f"{split} image {index}"
            try:
                item = dataset[index]
            except MemoryError:
                raise
            except Exception as error:  # the user's code raises whatever it likes
                bad[index] = f"{type(error).__name__}: {flat(error)}"
                if not skips:
                    problem = f"{called} raised {bad[index]}; dataset.on_bad_image=skip leaves such images out"
                    raise ConfigError("_target_", target, problem=problem) from error
                continue
            image, listed = _understood(item, split, classes, target, called)
            if not index:
                _check_repeats(dataset, image, target, called)
            items.add(image, listed, called)
            bar.advance(1)
    if bad:
        named = shortened(f"{split} image {index} ({reason})" for index, reason in bad.items())
        message = "dataset.on_bad_image=skip: %d of %d %s images raised errors, left out: %s"
        log.warning(message, len(bad), count, split, named)


def _understood(
    item: Any, split: str, classes: Sequence[str] | None, target: str, called: str
) -> tuple[Image.Image, Listed]:
    """The RGB image of an item, and what is known of it."""
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        what = type(item).__name__ + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
        raise ConfigError("_target_", target, ITEM, f"{called} is a {what}")
    image, label, *name = item
    return _picture(image, target, called), Listed(
        _label(label, classes, target, called), split, str(name[0]) if name else None
    )


def _picture(image: Any, target: str, called: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if isinstance(image, Tensor | np.ndarray):
        pixels = np.asarray(image.permute(1, 2, 0) if isinstance(image, Tensor) and image.ndim == 3 else image)
        if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (1, 3) and pixels.size:
            return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).convert("RGB")
        if pixels.dtype == np.uint8 and pixels.ndim == 2 and pixels.size:
            return Image.fromarray(pixels).convert("RGB")
        found = f"{image.dtype} {list(image.shape)}".removeprefix("torch.")
        problem = f"{called} is {'a tensor' if isinstance(image, Tensor) else 'an array'} {found}"
        if pixels.dtype.kind == "f":
            problem += "; leave ToTensor and Normalize out, networks normalise for themselves"
        raise ConfigError("_target_", target, PICTURE, problem)
    raise ConfigError("_target_", target, PICTURE, f"{called} is a {type(image).__name__}")


def _label(label: Any, classes: Sequence[str] | None, target: str, called: str) -> int | str | None:
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if isinstance(label, Integral):
        number = int(label)
        if number == -1:
            return None
        if classes is None:
            return number
        if 0 <= number < len(classes):
            return classes[number]
        problem = f"{called} has the label {number}"
        raise ConfigError("_target_", target, f"a label from 0 to {len(classes) - 1}, or -1 for none", problem)
    if isinstance(label, str | None):
        return label
    raise ConfigError("_target_", target, "a class or its number as the label", f"{called} has {flat(repr(label), 80)}")


def _check_repeats(dataset: Any, image: Image.Image, target: str, called: str) -> None:
    """Raise ConfigError where an image is not the same when it is read again."""
    again, _ = _understood(dataset[0], "train", None, target, called)
    if again.tobytes() != image.tobytes():
        problem = f"{called} differs when it is read again: leave random transforms out"
        raise ConfigError("_target_", target, "the same image each time; augmentation=crop_flip draws views", problem)


def _classes_of(dataset: Any) -> list[str] | None:
    """The class names that a data set knows, as those of torchvision do."""
    classes = getattr(dataset, "classes", None)
    return list(map(str, classes)) if isinstance(classes, list | tuple) and classes else None


def _name_of(dataset: Any) -> str:
    found = dataset if isinstance(dataset, type) else type(dataset)
    return f"{found.__module__}.{found.__qualname__}"
