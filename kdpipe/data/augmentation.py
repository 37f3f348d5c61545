"""Augmentation: once per view, at the stored size; what comes out is what student and teacher both see.

An augmentation is called as `augment(images, draws)`: uint8 [N, C, H, W] and float [N, DRAWS] in [0, 1), the random
numbers of each image. They depend on the seed, the epoch and the image alone (see `epoch_draws`), so that any order
of images gives the same views.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.randomness import generator

DRAWS = 3  # random numbers for each image: row, column, flip
Augmentation = Callable[[Tensor, Tensor], Tensor]


def epoch_draws(seed: int, epoch: int, num_images: int) -> Tensor:
    """The random numbers of every image of a data set in one epoch: float [num_images, DRAWS] in [0, 1)."""
    return torch.rand(num_images, DRAWS, generator=generator(seed, f"augmentation/{epoch}"))


def no_augmentation() -> None:
    """Every epoch sees the same images."""
    return None


class CropFlip:
    """Zeros around the image, an eighth of its side; a random crop of the image's own size; a random mirroring.

    Args:
        flip: whether to mirror, left to right, half of the images.
    """

    def __init__(self, flip: bool = True) -> None:
        if not isinstance(flip, bool):
            raise ValueError(f"augmentation.flip={flip}: true or false is accepted")
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
        # Indices around a slice put the indexed axes first: [N, H, W, C].
        views = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return views.permute(0, 3, 1, 2)
