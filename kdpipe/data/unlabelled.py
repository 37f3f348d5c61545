"""Additional training images without labels, from which the student learns by the teacher's answers alone."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from kdpipe.data.dataset import ImageDataset, Source, shape_of_one
from kdpipe.data.decode import decoded_source, image_file
from kdpipe.data.duplicates import Comparable, duplicates_of, examples_of
from kdpipe.data.folders import LeftOut, files_below
from kdpipe.data.photos import Photos
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import StoredResize

log = logging.getLogger("kdpipe")


@dataclass(frozen=True)
class Concatenated:
    """Images [n, …] and [m, …] as one sequence of n + m, without copying either: they may be memory-mapped."""

    first: Tensor | Photos
    second: Tensor | Photos

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.first) + len(self.second), *map(max, self.first.shape[1:], self.second.shape[1:])])

    @property
    def image_shape(self) -> tuple[int, ...]:
        return shape_of_one(self.first)

    @property
    def nbytes(self) -> int:
        return int(self.first.nbytes + self.second.nbytes)

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        is_second = positions >= len(self.first)
        first, second = self.first[positions[~is_second]], self.second[positions[is_second] - len(self.first)]
        # Of photos each part is padded to its own largest one.
        rows = first.new_zeros([len(positions), *map(max, first.shape[1:], second.shape[1:])])
        for part, belongs in ((first, ~is_second), (second, is_second)):
            place: tuple[Tensor | slice, ...] = (belongs, *map(slice, part.shape[1:]))
            rows[place] = part
        return rows

    def to(self, device: torch.device, /) -> Self:
        return type(self)(self.first.to(device), self.second.to(device))


def with_unlabelled(
    data: ImageDataset,
    root: str,
    on_bad_image: str,
    cache_dir: str,
    resize: StoredResize = "squeeze",
    image_size: int | None = None,
) -> ImageDataset:
    """The data set with all images below `root` among its training images: after the others, decoded to their size,
    with the label −1.

    Args:
        image_size: the shorter side of photos that keep their ratio; squares have the size of the data set's.

    Raises ConfigError if there are none, or if the data set's images are not square or not RGB."""
    top = Path(root).expanduser()
    channels, height, width = data.image_shape
    if channels != 3 or height != width:
        problem = f"the images with labels are {width}×{height}×{channels}"
        raise ConfigError("unlabelled_root", root, "a data set of square RGB images", problem)
    try:
        left_out = LeftOut("dataset.unlabelled_root", top)
        files = [image_file(path, top, label=0) for path in files_below(top, left_out)]
        left_out.report()
        if not files:
            problem = "no file in this folder" if top.is_dir() else "no such folder"
            raise ConfigError("root", problem=problem, expected="a folder with images")
        size = image_size if resize == "keep" else height
        source = decoded_source(files, ("unlabelled",), size, on_bad_image, cache_dir, resize)
    except ConfigError as error:
        if error.key != "root":
            raise
        raise ConfigError("unlabelled_root", root, error.expected, error.problem) from error
    return _joined(data, source, f"dataset.unlabelled_root={root}")


def with_its_unlabelled(data: ImageDataset) -> ImageDataset:
    """The data set with the images among its training images that its source has without a label, in the same way.
    Raises ConfigError for images of another size, as where all are kept as they are."""
    assert data.more
    source = data.more()
    (*_, height, width), (*_, own_height, own_width) = source.images.shape, data.images.shape
    if (height, width) != (own_height, own_width) and not isinstance(source.images, Photos):
        problem = f"the images with labels have {own_width}×{own_height} pixels, those without {width}×{height}"
        raise ConfigError("image_size", None, "the side in pixels, such as 128", problem)
    return _joined(data, source, f"data set {data.name}, images without labels")


def _joined(data: ImageDataset, source: Source, called: str) -> ImageDataset:
    images = data.images
    assert isinstance(images, Tensor | Photos)  # as a source gives them
    everything, held_out = torch.arange(len(source.images)), {**data.splits}
    del held_out["train"]
    known, more = Comparable(images), Comparable(source.images)
    if pairs := more.twins(everything, known, torch.cat(list(held_out.values()))):
        message = "%s: %d of its %d images are also validation or test images, which biases results (%s)"
        log.warning(message, called, len(pairs), len(everything), examples_of(pairs, source.names, data.names))
    duplicates = [
        duplicates_of(name, "unlabelled", pairs, len(positions), data.names, source.names)
        for name, positions in held_out.items()
        if (pairs := known.twins(positions, more, everything))
    ]
    new = torch.arange(len(data.labels), len(data.labels) + len(source.labels))
    return replace(
        data,
        images=Concatenated(images, source.images),
        labels=torch.cat([data.labels, torch.full_like(source.labels, -1)]),
        splits=data.splits | {"train": torch.cat([data.splits["train"], new])},
        unlabelled=source.fingerprint,
        names=(*data.names, *source.names) if data.names else (),
        duplicates=(*data.duplicates, *duplicates),
    )
