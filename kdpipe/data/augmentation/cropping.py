"""Crops and flips."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import Interpolation, Positive, PositiveInt, PositiveShare, Share, checked
from kdpipe.system.padding import boxes, is_padded

TRIES = 10  # of torchvision, to find a box that fits
BOX_DRAWS = 2 * TRIES + 2
AreaRange = Annotated[
    list[PositiveShare], Field(min_length=2, max_length=2, description="two numbers above 0 up to 1, the smaller first")
]
RatioRange = Annotated[
    list[Positive], Field(min_length=2, max_length=2, description="two numbers above 0, the smaller first")
]
Box = tuple[Tensor, Tensor, Tensor, Tensor]  # top, left, height, width of each image's box, int64 [N]


class CropFlip:
    """Pad with zeros by an eighth of the side, crop to the original size at random; with `flip`, also flip half of the
    images horizontally."""

    draws = 3  # row, column, flip

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


class Flip:
    """Mirror images with these probabilities: `horizontal` swaps left and right, `vertical` top and bottom."""

    draws = 2

    @checked
    def __init__(self, horizontal: Share = 0.5, vertical: Share = 0) -> None:
        self.horizontal, self.vertical = horizontal, vertical

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        for place, (probability, axis) in enumerate(((self.horizontal, 3), (self.vertical, 2))):
            if probability > 0:
                chosen = draws[:, place] < probability
                images = torch.where(chosen[:, None, None, None], images.flip(axis), images)
        return images


class RandomResizedCrop:
    """Crop a box of a random area and shape and resize it to one size (Szegedy et al. 2015,
    https://arxiv.org/abs/1409.4842), as torchvision does: antialiased, and the centre where none of 10 boxes fits.
    Of photos of several sizes (`system.padding`) it makes images of one size.

    Args:
        size: height and width of the views in pixels; None for those of the images, if they have one size.
        scale: the smallest and the largest area, as a share of the image's.
        ratio: the smallest and the largest width divided by height.
    """

    draws = BOX_DRAWS

    @checked
    def __init__(
        self,
        scale: AreaRange = [0.08, 1.0],  # noqa: B006
        ratio: RatioRange = [3 / 4, 4 / 3],  # noqa: B006
        interpolation: Interpolation = "bilinear",
        size: PositiveInt | None = None,
    ) -> None:
        check_order(scale=scale, ratio=ratio)
        self.size = size
        self.scale, self.ratio, self.interpolation = scale, ratio, interpolation

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        count, _, height, width = images.shape
        size = (self.size or height, self.size or width)
        if not is_padded(images):
            heights, widths = (torch.full((count,), side, device=images.device) for side in (height, width))
            box = boxes_to_resize(draws, heights, widths, self.scale, self.ratio)
            return resized(images, box, size, self.interpolation)
        if self.size is None:
            raise ConfigError("size", None, "pixels, such as 224", "photos of several sizes become images of one")
        first_row, first_column, heights, widths = boxes(images).unbind(dim=1)
        top, left, tall, wide = boxes_to_resize(draws, heights, widths, self.scale, self.ratio)
        return resized(images[:, :3], (first_row + top, first_column + left, tall, wide), size, self.interpolation)


def check_order(**ranges: list[float]) -> None:
    """Raise ConfigError for a range whose first number is the larger one."""
    for key, (low, high) in ranges.items():
        if low > high:
            raise ConfigError(key, [low, high], "the smaller number first")


def random_boxes(
    draws: Tensor, heights: Tensor, widths: Tensor, scale: list[float], ratio: list[float]
) -> tuple[Tensor, Tensor]:
    """The heights and widths of random boxes, int64 [N, TRIES], which may be larger than their images.

    Args:
        draws: float [N, BOX_DRAWS] in [0, 1).
        heights, widths: of the images, int64 [N].
        scale: area, as a share of the image's.
        ratio: of one side to the other, drawn on a logarithmic scale; the first of the results is the shorter side
            where it is above 1.
    """
    low, high = (math.log(limit) for limit in ratio)
    area = (heights * widths)[:, None] * (scale[0] + draws[:, :TRIES] * (scale[1] - scale[0]))
    root = torch.exp(low + draws[:, TRIES : 2 * TRIES] * (high - low))
    return (area / root).sqrt().round().long(), (area * root).sqrt().round().long()


def first_that_fits(fits: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    """Of tries [N, TRIES], whether one fits, and the sides of the first that does, int64 [N]."""
    first = fits.int().argmax(dim=1, keepdim=True)
    return fits.any(dim=1), *(side.gather(1, first)[:, 0] for side in sides)


def placed(draws: Tensor, free: Tensor) -> Tensor:
    """A place from 0 to `free`, int64 [N], for draws [N] in [0, 1)."""
    return torch.minimum((draws * (free + 1)).long(), free)  # a product with a draw near 1 may be rounded up


def boxes_to_resize(draws: Tensor, heights: Tensor, widths: Tensor, scale: list[float], ratio: list[float]) -> Box:
    """The boxes of torchvision's RandomResizedCrop in images of these heights and widths, int64 [N], which may differ.

    Args:
        draws: float [N, BOX_DRAWS] in [0, 1).
        ratio: width divided by height.
    """
    tall, wide = random_boxes(draws, heights, widths, scale, ratio)
    fits = (tall > 0) & (tall <= heights[:, None]) & (wide > 0) & (wide <= widths[:, None])
    found, tall, wide = first_that_fits(fits, tall, wide)
    # The largest box in the middle whose shape is in the range.
    shape = widths / heights
    limited_tall = torch.where(shape < ratio[0], (widths / ratio[0]).round().long().clamp(min=1), heights)
    limited_wide = torch.where(shape > ratio[1], (heights * ratio[1]).round().long().clamp(min=1), widths)
    tall = torch.where(found, tall, limited_tall)
    wide = torch.where(found, wide, limited_wide)
    top, left = placed(draws[:, -2], heights - tall), placed(draws[:, -1], widths - wide)
    return torch.where(found, top, (heights - tall) // 2), torch.where(found, left, (widths - wide) // 2), tall, wide


def resized(images: Tensor, box: Box, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """The box of each image, uint8 [N, C, H, W], as uint8 [N, C, *size], antialiased. Sums of a few elementwise
    products, and not a product of matrices, whose rounding could depend on the other images of the batch."""
    top, left, tall, wide = box
    values = images.float()
    for axis, first, length in ((2, top, tall), (3, left, wide)):
        places, weights = _taps(first, length, values.shape[axis], size[axis - 2], interpolation)
        shape = [-1, 1, 1, 1]
        shape[axis] = size[axis - 2]
        total: Tensor | None = None
        for place, weight in zip(places, weights, strict=True):
            index = place.view(shape).expand(*(values.shape[n] if n != axis else size[axis - 2] for n in range(4)))
            term = values.gather(axis, index) * weight.view(shape)
            total = term if total is None else total + term
        assert total is not None
        values = total
    return values.round_().clamp_(0, 255).to(images.dtype)


def _taps(first: Tensor, length: Tensor, limit: int, size: int, interpolation: Interpolation) -> tuple[Tensor, Tensor]:
    """Which pixels make each pixel of a resized axis, int64 [taps, N, size], and their weights, float of that shape:
    those of PyTorch's `interpolate(antialias=True)` on pixels `first` to `first + length` of `limit`."""
    scale = (length / size)[:, None]
    reach, kernel = (1, _triangle) if interpolation == "bilinear" else (2, _cubic)
    stretch = scale.clamp(min=1)
    centre = scale * (torch.arange(size, device=first.device) + 0.5)
    start = (centre - reach * stretch + 0.5).long().clamp(min=0)
    taps = math.ceil(2 * reach * max(limit / size, 1))
    inner = start + torch.arange(taps, device=first.device)[:, None, None]
    weights = kernel((inner - centre + 0.5) / stretch)
    weights = torch.where(inner < length[:, None], weights, 0)
    weights = weights / weights.sum(dim=0)
    return (inner + first[:, None]).clamp(max=limit - 1), weights


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys's kernel with a = −0.5, PyTorch's where it is antialiased."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
