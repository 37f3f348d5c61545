"""Random erasing."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdpipe.data.augmentation.cropping import (
    BOX_DRAWS,
    AreaRange,
    RatioRange,
    check_order,
    first_that_fits,
    placed,
    random_boxes,
)
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import Share, checked

Pixel = Annotated[float, Field(ge=0, le=255)]
Value = Annotated[
    Pixel | list[Pixel] | Literal["mean", "random"],
    Field(description="a number from 0 to 255, a list of one for each channel, mean or random"),
]


class RandomErasing:
    """Fill a box of a random area and shape (Zhong et al. 2020, https://arxiv.org/abs/1708.04896), as torchvision does;
    an image in which none of 10 boxes fits stays as it is.

    Args:
        p: the share of images that are erased.
        scale: the smallest and the largest area, as a share of the image's.
        ratio: the smallest and the largest height divided by width.
        value: what fills the box. Images are still raw here, so 0 is black; torchvision's and timm's recipes erase
            after normalizing, where 0 is the mean of the data set: give that as a list, such as [125,123,114], or
            "mean", the mean colour of the image itself. "random": uniform noise, for each pixel and channel.
    """

    draws = 2 + BOX_DRAWS  # whether, and the noise

    @checked
    def __init__(
        self,
        p: Share = 0.5,
        scale: AreaRange = [0.02, 0.33],  # noqa: B006
        ratio: RatioRange = [0.3, 3.3],  # noqa: B006
        value: Value = 0,
    ) -> None:
        check_order(scale=scale, ratio=ratio)
        self.p, self.scale, self.ratio, self.value = p, scale, ratio, value

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        count, _, height, width = images.shape
        heights, widths = (torch.full((count,), side, device=images.device) for side in (height, width))
        box = draws[:, 2:]
        wide, tall = random_boxes(box, heights, widths, self.scale, self.ratio)
        found, tall, wide = first_that_fits((tall < height) & (wide < width), tall, wide)
        top, left = placed(box[:, -2], height - tall), placed(box[:, -1], width - wide)
        rows = _between(top, tall, height)
        columns = _between(left, wide, width)
        erased = (found & (draws[:, 0] < self.p))[:, None, None] & rows[:, :, None] & columns[:, None, :]
        return torch.where(erased[:, None], self._fill(images, draws[:, 1]), images)

    def _fill(self, images: Tensor, draws: Tensor) -> Tensor:
        """What images, uint8 [N, C, H, W], are filled with: uint8 that broadcasts to their shape."""
        if self.value == "random":
            return noise(draws, images.shape[1:])
        if self.value == "mean":
            return images.float().mean(dim=(2, 3), keepdim=True).round().to(images.dtype)
        values = self.value if isinstance(self.value, list) else [self.value]
        if len(values) not in (1, images.shape[1]):
            raise ConfigError("value", self.value, f"one number, or {images.shape[1]}, one for each channel")
        return torch.tensor(values, device=images.device).round().to(images.dtype)[:, None, None]


def _between(first: Tensor, length: Tensor, size: int) -> Tensor:
    """Which of `size` places are in a range that starts at `first`, bool [N, size]."""
    places = torch.arange(size, device=first.device) - first[:, None]
    return (places >= 0) & (places < length[:, None])


def noise(draws: Tensor, shape: torch.Size) -> Tensor:
    """Uniform noise that one draw in [0, 1) decides, uint8 [N, *shape]: a hash of each pixel's number (lowbias32,
    https://nullprogram.com/blog/2018/07/31/), the same on every device and in every batch."""
    seeds = (draws * 2**24).long()[:, None]
    mixed = (seeds * 0x9E3779B1 + torch.arange(shape.numel(), device=draws.device)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFFFFFF
    return (mixed >> 24).to(torch.uint8).view(-1, *shape)
