"""More images to learn from, without labels: of them a student learns what the teacher says alone."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from kdpipe.data.dataset import ImageDataset
from kdpipe.data.decode import decoded_source, files_below, image_file

log = logging.getLogger("kdpipe")


@dataclass(frozen=True)
class Joined:
    """Two tensors [n, …] and [m, …] that are indexed as one of [n + m, …], without a copy: they may be mapped."""

    first: Tensor
    second: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.first) + len(self.second), *self.first.shape[1:]])

    @property
    def nbytes(self) -> int:
        return int(self.first.nbytes + self.second.nbytes)

    def __getitem__(self, positions: Tensor | slice) -> Tensor:
        if isinstance(positions, slice):
            positions = torch.arange(len(self.first) + len(self.second), device=self.first.device)[positions]
        is_second = positions >= len(self.first)
        rows = self.first.new_empty([len(positions), *self.first.shape[1:]])
        rows[~is_second] = self.first[positions[~is_second]]
        rows[is_second] = self.second[positions[is_second] - len(self.first)]
        return rows

    def to(self, device: torch.device) -> "Joined":
        return Joined(self.first.to(device), self.second.to(device))


def shared(images: Tensor, positions: Tensor, others: Tensor) -> int:
    """How many of the others [m, C, H, W] are, pixel by pixel, among the images [n, C, H, W] at these positions."""
    middle = images.shape[2] // 2  # a row tells most images apart, and little is read of what is mapped
    places: dict[bytes, list[int]] = {}
    for place, row in zip(positions.tolist(), images[:, :, middle][positions].numpy(), strict=True):
        places.setdefault(row.tobytes(), []).append(place)
    rows = others[:, :, middle].contiguous().numpy()
    return sum(
        any(torch.equal(images[place], other) for place in places.get(row.tobytes(), ()))
        for row, other in zip(rows, others, strict=True)
    )


def with_unlabelled(data: ImageDataset, root: str, on_bad_image: str, cache_dir: str) -> ImageDataset:
    """The data set with all images below `root` among its training images, with the label −1.

    They are decoded to the size of the others, and come after them.

    Raises:
        ValueError: no such folder, no readable image in it, or a data set of images that are not square and in colour.
    """
    top = Path(root).expanduser()
    key = f"dataset.unlabelled_root={root}"
    _, channels, height, width = data.images.shape
    if channels != 3 or height != width:
        raise ValueError(f"{key}: beside square images in colour it is accepted, these are {width}×{height}×{channels}")
    if not top.is_dir():
        raise ValueError(f"{key}: there is no such folder; a folder with images is accepted")
    try:
        files = [image_file(path, top, label=0) for path in files_below(top)]
        if not files:
            raise ValueError(f"{key}: there is no file in it; a folder with images is accepted")
        source = decoded_source(
            files, ("unlabelled",), image_size=height, on_bad_image=on_bad_image, cache_dir=cache_dir
        )
    except ValueError as error:  # readers of images speak of the data set's own
        raise ValueError(re.sub(r"^dataset\.root\b", key, str(error))) from error
    held_out = torch.cat([positions for name, positions in data.splits.items() if name != "train"])
    if known := shared(data.images, held_out, source.images):
        log.warning(
            "%s: %d of its %d images are validation or test images, too: what is measured on those says little",
            *(key, known, len(source.images)),
        )
    labelled = len(data.labels)
    new = torch.arange(labelled, labelled + len(source.labels))
    return replace(
        data,
        images=cast(Tensor, Joined(data.images, source.images)),
        labels=torch.cat([data.labels, torch.full_like(source.labels, -1)]),
        splits=data.splits | {"train": torch.cat([data.splits["train"], new])},
        unlabelled=source.fingerprint,
    )
