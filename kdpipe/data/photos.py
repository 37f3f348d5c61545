"""Photos that keep their shape: stored one after the other in a file, batched with padding (see `system.padding`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdpipe.system.disk_cache import mapped_bytes
from kdpipe.system.padding import CHANNELS, padded

MAX_RATIO = 4  # of the sides: one panorama would pad a whole batch to its width
PIXELS, PLACES = "pixels.bin", "places.npy"


@dataclass(frozen=True)
class Photos:
    """Photos of several sizes, indexed as a tensor [N, 4, H, W] is: a batch is padded to its largest photo."""

    pixels: Tensor  # uint8 [bytes]: of each photo [3, height, width], in memory or memory-mapped
    places: Tensor  # int64 [N, 3]: where each photo starts, its height, its width

    @property
    def shape(self) -> torch.Size:
        """[N, 4, H, W], with the height and the width of the largest photos."""
        return torch.Size([len(self.places), CHANNELS, *self.places[:, 1:].amax(dim=0).tolist()])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, side, side) of the squares that an exported network takes: the median of the photos' shorter sides."""
        side = int(self.places[:, 1:].amin(dim=1).median())
        return 3, side, side

    @property
    def nbytes(self) -> int:
        return int(self.pixels.nbytes)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        """uint8 [n, 4, H, W], padded."""
        return padded([*self._cut(self.places[positions.cpu()])], self.pixels.device)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Each photo as [3, height, width]."""
        for photo in self._cut(self.places):
            yield photo.numpy()

    def _cut(self, places: Tensor) -> Iterator[Tensor]:
        for start, height, width in places.tolist():
            yield self.pixels[start : start + 3 * height * width].view(3, height, width)

    def at(self, positions: Sequence[int]) -> Self:
        """Some of the photos, without copying them."""
        return type(self)(self.pixels, self.places[list(positions)])

    def to(self, device: torch.device, /) -> Self:
        return type(self)(self.pixels.to(device), self.places)


class PhotoWriter:
    """Writes photos to a file, from several threads."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.places: dict[int, tuple[int, int, int]] = {}  # by the photo's number: its start, height and width
        self._end, self._lock = 0, Lock()

    def add(self, number: int, photo: Image.Image) -> None:
        pixels = np.ascontiguousarray(np.asarray(photo).transpose(2, 0, 1))
        with self._lock:  # appended, not mapped: on a full disk that is an error, and the process lives
            self.file.write(pixels.data)
            self.places[number] = (self._end, photo.height, photo.width)
            self._end += pixels.nbytes

    def table(self) -> Tensor:
        """`Photos.places`, in the order of the photos' numbers."""
        self.file.flush()
        return torch.tensor([place for _, place in sorted(self.places.items())], dtype=torch.int64).reshape(-1, 3)


def kept(photo: Image.Image, shorter_side: int | None) -> Image.Image:
    """A photo as it is stored: of a longer one the centre, `MAX_RATIO` to 1; made smaller until its shorter side has
    that many pixels, but never larger; None for its own size."""
    width, height = photo.size
    longest = MAX_RATIO * min(photo.size)
    if max(photo.size) > longest:
        left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
        photo = photo.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = photo.size
    if shorter_side is None or min(width, height) <= shorter_side:
        return photo
    scale = shorter_side / min(width, height)
    return photo.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)


def open_photos(folder: Path) -> Photos:
    """The photos that a folder of the cache holds. Raises ValueError where they are damaged, and OSError; NumPy's
    reader of headers raises errors of all kinds."""
    places = np.load(folder / PLACES)
    if places.dtype != np.int64 or places.ndim != 2 or places.shape[1] != 3 or not len(places):
        raise ValueError(f"{folder / PLACES}: not the places of photos")
    starts, heights, widths = places.astype(float).T  # damaged ones may be too large for a product
    size = (folder / PIXELS).stat().st_size
    if starts.min() < 0 or min(heights.min(), widths.min()) < 1 or (starts + 3 * heights * widths).max() > size:
        raise ValueError(f"{folder / PIXELS}: it does not hold all photos")
    return Photos(mapped_bytes(folder / PIXELS), torch.from_numpy(places))
