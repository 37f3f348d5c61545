"""Augmentation at the stored size, once per view, which student and teacher both see.

An augmentation is called as `augment(images, draws)`: uint8 [N, C, H, W] and float [N, DRAWS] in [0, 1), the random
numbers of each image. They depend on the seed, the epoch and the image only (see `Views`), so that views do not depend
on the order of the images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.settings.values import checked
from kdpipe.system.randomness import generator

DRAWS = 3  # random numbers for each image: row, column, flip
Augmentation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Views:
    """The augmented views of a data set's images in each epoch: new ones each time or, with a `number` K, the same K
    views over and over, independent of `seed`, so that all seeds can share a teacher's outputs for them."""

    augment: Augmentation
    described: str  # the augmentation and its settings
    num_images: int
    seed: int
    number: int | None = None

    def draws(self, epoch: int) -> Tensor:
        """The random numbers of every image in an epoch, counted from 1: float [num_images, DRAWS] in [0, 1)."""
        if self.number is None:
            stream = generator(self.seed, f"augmentation/{epoch}")
        else:
            stream = generator(0, f"view/{(epoch - 1) % self.number}")
        return torch.rand(self.num_images, DRAWS, generator=stream)


def no_augmentation() -> None:
    """Every epoch sees the same images."""
    return None


class CropFlip:
    """Pad with zeros by an eighth of the side, crop to the original size at random; with `flip`, also flip half of the
    images horizontally."""

    @checked
    def __init__(self, flip: bool = True) -> None:
        self.flip = flip

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        count, _, height, width = images.shape
        pad_rows, pad_columns = height // 8, width // 8
        padded = F.pad(images, (pad_columns, pad_columns, pad_rows, pad_rows))
        top = (draws[:, 0] * (2 * pad_rows + 1)).long()
        left = (draws[:, 1] * (2 * pad_columns + 1)).long()
        rows = top[:, None] + torch.arange(height, device=images.device)
        columns = left[:, None] + torch.arange(width, device=images.device)
        if self.flip:
            columns = torch.where(draws[:, 2, None] < 0.5, columns.flip(1), columns)
        image = torch.arange(count, device=images.device)
        # With indices on both sides of a slice, the indexed axes come first: [N, H, W, C].
        views = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return views.permute(0, 3, 1, 2)
