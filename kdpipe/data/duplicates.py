"""Images that are in two splits, pixel by pixel: results on them say nothing about new images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdpipe.data.photos import Photos

SHOWN = 2  # examples in a message


@dataclass(frozen=True)
class Duplicates:
    """Images of a split that are also among others."""

    split: str  # "test" or "validation"
    others: str  # "training", "validation" or "unlabelled"
    positions: Tensor  # of the images of the split in the data set, int64 [n], sorted
    total: int  # images of the split
    examples: str

    def __str__(self) -> str:
        verb = "is" if len(self.positions) == 1 else "are"
        counted = f"{len(self.positions):,} of {self.total:,} {self.split} images {verb}"
        return f"{counted} also among the {self.others} images, pixel by pixel ({self.examples})"


def duplicates_of(
    split: str, among: str, pairs: Mapping[int, int], total: int, names: Sequence[str], other_names: Sequence[str]
) -> Duplicates:
    """What to say of `pairs`: the positions of a split's images, each with that of its twin.

    Args:
        names, other_names: of the files, by position; empty where images are not files.
    """
    return Duplicates(split, among, torch.tensor(sorted(pairs)), total, examples_of(pairs, names, other_names))


def examples_of(pairs: Mapping[int, int], names: Sequence[str], other_names: Sequence[str]) -> str:
    """The first pairs in words, `test/cat/1.jpg is train/cat/7.jpg, …`."""
    shown = [f"{_name(names, one)} is {_name(other_names, other)}" for one, other in list(pairs.items())[:SHOWN]]
    return ", ".join([*shown, "…"] if len(pairs) > SHOWN else shown)


class Comparable:
    """Images [N, C, H, W] to be compared with others, by one row first, which tells most apart: little of a
    memory-mapped array is read."""

    def __init__(self, images: Tensor | Photos) -> None:
        self.images = images
        each = images if isinstance(images, Photos) else images.numpy()
        self.keys = np.array([hash(image[:, image.shape[1] // 2].tobytes()) for image in each], np.int64)

    def twins(self, positions: Tensor, others: "Comparable", other_positions: Tensor) -> dict[int, int]:
        """Those of the positions whose pixels are also at one of the other images' positions, each with the first such
        position."""
        one, other = positions.numpy(), other_positions.numpy()
        suspects = one[np.isin(self.keys[one], others.keys[other])].tolist()
        first: dict[bytes, int] = {}
        for position in other[np.isin(others.keys[other], self.keys[suspects])].tolist():
            first.setdefault(others.digest(position), position)
        digests = ((position, self.digest(position)) for position in suspects)
        return {position: first[digest] for position, digest in digests if digest in first}

    def digest(self, position: int) -> bytes:
        if isinstance(self.images, Photos):
            (photo,) = self.images.at([position])
            shape = str(photo.shape).encode()  # one colour has the same pixels in 2×8 and 4×4
            return hashlib.sha256(shape + photo.tobytes()).digest()
        return hashlib.sha256(self.images[position].contiguous().numpy().data).digest()


def _name(names: Sequence[str], position: int) -> str:
    return names[position] if names else f"image {position}"
