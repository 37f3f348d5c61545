"""Random operations of random strength: the search spaces of torchvision, with a draw for each image."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as operations

from kdpipe.data.augmentation.colour import (
    change_brightness,
    change_contrast,
    change_saturation,
    change_sharpness,
    check_channels,
    groups,
    per_image,
)
from kdpipe.settings.values import PositiveInt, checked

BINS = 31  # strengths of each operation
GridInterpolation = Literal["nearest", "bilinear"]


@dataclass(frozen=True)
class Strengths:
    """How strong each operation may become: shears as a slope, translations in pixels for an image of some height and
    width, rotations in degrees, factors of colour around 1, and the fewest bits that posterizing leaves."""

    shear: float
    translate: Callable[[int, int], tuple[float, float]]
    rotate: float
    colour: float
    fewest_bits: int


WIDE = Strengths(0.99, lambda height, width: (32, 32), 135, 0.99, 2)
RAND = Strengths(0.3, lambda height, width: (150 / 331 * height, 150 / 331 * width), 30, 0.9, 4)


class TrivialAugment:
    """One operation for each image, of any strength (Müller & Hutter 2021, https://arxiv.org/abs/2103.10158), from
    torchvision's `TrivialAugmentWide`: nothing, shear, translate, rotate, brightness, colour, contrast, sharpness,
    posterize, solarize, autocontrast or equalize. What moves in from outside is black."""

    draws = 3  # operation, strength, sign

    @checked
    def __init__(self, interpolation: GridInterpolation = "nearest") -> None:
        self.interpolation = interpolation

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        plan = draws.cpu()  # once, instead of for each operation
        operation, strength = ((plan[:, column] * number).long() for column, number in ((0, len(NAMES)), (1, BINS)))
        return operated(images, operation, strength, plan[:, 2] <= 0.5, WIDE, self.interpolation)


class RandAugment:
    """Several operations for each image, all of one strength (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719),
    from torchvision's `RandAugment`: those of `TrivialAugment`, in a narrower space.

    Args:
        num_ops: operations for each image.
        magnitude: their strength, 0 to 30.
    """

    @checked
    def __init__(
        self,
        num_ops: PositiveInt = 2,
        magnitude: Annotated[int, Field(ge=0, le=BINS - 1)] = 9,
        interpolation: GridInterpolation = "nearest",
    ) -> None:
        self.num_ops, self.magnitude, self.interpolation = num_ops, magnitude, interpolation
        self.draws = 2 * num_ops  # operation, sign

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        plan = draws.cpu()
        for number in range(self.num_ops):
            operation = (plan[:, 2 * number] * len(NAMES)).long()
            strength = torch.full_like(operation, self.magnitude)
            images = operated(images, operation, strength, plan[:, 2 * number + 1] <= 0.5, RAND, self.interpolation)
        return images


def operated(
    images: Tensor,
    operation: Tensor,
    strength: Tensor,
    negative: Tensor,
    space: Strengths,
    interpolation: GridInterpolation,
) -> Tensor:
    """Images, uint8 [N, C, H, W], each after its own operation.

    Args:
        operation: places in NAMES, int64 [N], on the CPU as the others.
        strength: from 0 to BINS − 1, int64 [N].
        negative: whether the strength has the other sign, where there is one, bool [N].
    """
    check_channels(images)
    height, width = images.shape[2:]
    known = _strengths(space, height, width)
    views = images.clone()
    for number, chosen in groups(operation, len(NAMES)):
        name = NAMES[number]
        if name == "identity":
            continue
        where = chosen.to(images.device)
        some = images[where]
        if name in WITHOUT_STRENGTH:
            views[where] = WITHOUT_STRENGTH[name](some)
            continue
        amount = known[name][strength[chosen]].double()
        if name in (*GEOMETRY, *COLOUR):
            amount = torch.where(negative[chosen], -amount, amount)
        if name in GEOMETRY:
            views[where] = warped(some, GEOMETRY[name](amount, height, width), interpolation)
        elif name in COLOUR:
            views[where] = COLOUR[name](some, 1 + amount)
        else:
            views[where] = TONES[name](some, amount)
    return views


def _strengths(space: Strengths, height: int, width: int) -> dict[str, Tensor]:
    """The strengths of each operation that has some, [BINS], in single precision as torchvision's."""
    rows, columns = space.translate(height, width)
    bits = 8 - (torch.arange(BINS) / ((BINS - 1) / (8 - space.fewest_bits))).round()
    return {
        **dict.fromkeys(("shear_x", "shear_y"), torch.linspace(0, space.shear, BINS)),
        "translate_x": torch.linspace(0, columns, BINS),
        "translate_y": torch.linspace(0, rows, BINS),
        "rotate": torch.linspace(0, space.rotate, BINS),
        **dict.fromkeys(COLOUR, torch.linspace(0, space.colour, BINS)),
        "posterize": bits,
        "solarize": torch.linspace(1, 0, BINS),
    }


def warped(images: Tensor, inverse: Tensor, interpolation: GridInterpolation) -> Tensor:
    """Images, uint8 [N, C, H, W], each through its own affine map, black outside.

    Args:
        inverse: from a pixel of the result to the image's, in pixels from its centre, float [N, 2, 3].
    """
    height, width = images.shape[2:]
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device)[:, None]
    sides = torch.tensor([[width / 2], [height / 2]])
    rows = (inverse.float() / sides).to(images.device)[..., None, None].unbind(1)
    # Elementwise, and not a product of matrices, whose rounding could depend on the other images of the batch.
    grid = torch.stack([row[:, 0] * x + row[:, 1] * y + row[:, 2] for row in rows], dim=-1)
    moved = F.grid_sample(images.float(), grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return moved.round_().to(images.dtype)


def _matrix(amounts: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """The identity with some entries replaced, float64 [N, 2, 3]."""
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(amounts), 1, 1)
    for (row, column), values in entries.items():
        matrix[:, row, column] = values
    return matrix


def _rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    cosine, sine = (degrees * (math.pi / 180)).cos(), (degrees * (math.pi / 180)).sin()
    return _matrix(degrees, {(0, 0): cosine, (0, 1): -sine, (1, 0): sine, (1, 1): cosine})


# The inverse maps of torchvision's `affine` and `rotate`; shears keep the top and the left edge where they are.
GEOMETRY: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "shear_x": lambda slope, height, width: _matrix(slope, {(0, 1): slope, (0, 2): slope * height / 2}),
    "shear_y": lambda slope, height, width: _matrix(slope, {(1, 0): slope, (1, 2): slope * width / 2}),
    "translate_x": lambda pixels, height, width: _matrix(pixels, {(0, 2): -pixels.trunc()}),
    "translate_y": lambda pixels, height, width: _matrix(pixels, {(1, 2): -pixels.trunc()}),
    "rotate": _rotation,
}
COLOUR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": change_brightness,
    "color": change_saturation,
    "contrast": change_contrast,
    "sharpness": change_sharpness,
}


def posterized(images: Tensor, bits: Tensor) -> Tensor:
    """Images with so many bits left for each pixel, float [N]."""
    mask = 256 - 2 ** (8 - bits)
    return images & mask.to(images.device, images.dtype)[:, None, None, None]


def solarized(images: Tensor, thresholds: Tensor) -> Tensor:
    """Images whose pixels from a threshold on, a share of 255, float [N], are inverted."""
    return torch.where(images >= per_image(255 * thresholds, images), 255 - images, images)


TONES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"posterize": posterized, "solarize": solarized}
WITHOUT_STRENGTH: dict[str, Callable[[Tensor], Tensor]] = {
    "autocontrast": operations.autocontrast,
    "equalize": operations.equalize,
}
NAMES = ("identity", *GEOMETRY, *COLOUR, *TONES, *WITHOUT_STRENGTH)
