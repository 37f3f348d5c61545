"""Photos of several sizes as one batch: uint8 [N, 4, H, W], padded with zeros, whose last channel is 255 where a photo
is and 0 elsewhere. It is indexed, moved and flipped like any other batch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHANNELS = 4  # red, green, blue, where the photo is


def padded(photos: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """A batch of photos, uint8 [3, height, width] each, of the height and width of the largest ones; padded at the
    right and at the bottom."""
    height, width = (max((photo.shape[axis] for photo in photos), default=0) for axis in (1, 2))
    batch = torch.zeros(len(photos), CHANNELS, height, width, dtype=torch.uint8, device=device)
    on_cpu = batch.device.type == "cpu"  # NumPy copies there: PyTorch would start its threads for each photo
    places = batch.numpy() if on_cpu else batch
    for place, photo in zip(places, (photo.numpy() if on_cpu else photo for photo in photos), strict=True):
        room = place[:, : photo.shape[1], : photo.shape[2]]
        room[:3], room[3] = photo, 255
    return batch


def is_padded(images: Tensor) -> bool:
    """Whether images [N, C, H, W] may be such a batch."""
    return images.shape[1] == CHANNELS


def boxes(images: Tensor) -> Tensor:
    """Where each photo of a batch is: top, left, height and width in pixels, int64 [N, 4], on the images' device. Only
    in a flipped or shifted batch is top or left not 0. Raises ValueError for images that are not such a batch."""
    where = images[:, -1]
    rows, columns = where.amax(dim=2) > 0, where.amax(dim=1) > 0
    top, left = (some.int().argmax(dim=1) for some in (rows, columns))
    height, width = rows.sum(dim=1), columns.sum(dim=1)
    is_box = torch.equal(where.sum(dim=(1, 2)), 255 * height * width)
    if not is_box or not bool((height * width > 0).all()):
        raise ValueError(f"images have {CHANNELS} channels, the last of which does not say where a photo is")
    return torch.stack([top, left, height, width], dim=1)


def cut_out(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The photos of a batch by their place in it: positions int64 [n], and those photos, uint8 [n, 3, height, width],
    of one size."""
    places: dict[tuple[int, ...], list[int]] = {}
    for number, box in enumerate(boxes(images).tolist()):
        places.setdefault(tuple(box), []).append(number)
    for (top, left, height, width), numbers in places.items():
        positions = torch.tensor(numbers, device=images.device)
        whole = images if len(numbers) == len(images) else images[positions]
        yield positions, whole[:, :3, top : top + height, left : left + width]


def each_photo(images: Tensor) -> list[Tensor]:
    """Each photo of a batch, uint8 [3, height, width]."""
    return [photo for one in images.split(1) for _, photos in cut_out(one) for photo in photos]
