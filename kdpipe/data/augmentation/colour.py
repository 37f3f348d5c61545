"""Changes of colour, with a strength for each image: torchvision's functions, which have one for a batch."""

import itertools
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, checked

Hue = Annotated[float, Field(ge=0, le=0.5)]


class ColorJitter:
    """Change brightness, contrast, saturation and hue in random order, as torchvision does.

    Args:
        brightness, contrast, saturation: s draws a factor from 1 − s, at least 0, to 1 + s; 0 changes nothing.
        hue: h turns the hue by −h to h of the colour circle.

    Raises:
        ConfigError: nothing changes; in a call, for images without colours where saturation or hue is not 0.
    """

    draws = 5  # the order, and a strength each

    @checked
    def __init__(
        self,
        brightness: NonNegative = 0,
        contrast: NonNegative = 0,
        saturation: NonNegative = 0,
        hue: Hue = 0,
    ) -> None:
        self.strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        if not any(self.strengths.values()):
            raise ConfigError("brightness", brightness, "a number above 0, for it or another one", "nothing changes")

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        check_channels(images)
        for name in ("saturation", "hue"):
            if self.strengths[name] and images.shape[1] == 1:
                raise ConfigError(name, self.strengths[name], "0", "these images have one channel")
        orders = torch.tensor(list(itertools.permutations(range(4))))
        plan = draws.cpu()
        order = orders[(plan[:, 0] * len(orders)).long()]
        views = images.clone()
        for place in range(4):
            for number, chosen in groups(order[:, place], 4):
                name, strength = list(self.strengths.items())[number]
                if strength == 0:
                    continue
                low, high = (-strength, strength) if name == "hue" else (max(0, 1 - strength), 1 + strength)
                factors = low + (high - low) * plan[chosen, 1 + number].double()
                where = chosen.to(images.device)
                views[where] = ADJUST[name](views[where], factors)
        return views


def check_channels(images: Tensor) -> None:
    """Raise ConfigError for images, uint8 [N, C, H, W], that are neither grey nor red, green and blue."""
    if images.shape[1] not in (1, 3):
        problem = f"operations on colours need 1 or 3 channels, and these images have {images.shape[1]}"
        raise ConfigError("_target_", problem=problem)


def groups(choices: Tensor, number: int) -> Iterator[tuple[int, Tensor]]:
    """For each of `number` choices that some images got, int64 [N] on the CPU, which images: int64 [n]."""
    for choice in range(number):
        chosen = (choices == choice).nonzero()[:, 0]
        if len(chosen):
            yield choice, chosen


def per_image(factors: Tensor, images: Tensor) -> Tensor:
    """A number for each image, float [N], as float32 [N, 1, 1, 1] on the images' device."""
    return factors.float().to(images.device)[:, None, None, None]


def blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """factor·image + (1 − factor)·other, cut off at 0 and 255. Two rounded products and their sum: torchvision's may be
    fused, which is at most a level off."""
    mixed = images * per_image(factors, images) + others * per_image(1 - factors, images)
    return mixed.clamp_(0, 255).to(images.dtype)


def grey(images: Tensor) -> Tensor:
    """The luma of images, uint8 [N, C, H, W], in whole levels: float [N, 1, H, W]."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().unbind(1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()[:, None]


def change_brightness(images: Tensor, factors: Tensor) -> Tensor:
    return (images * per_image(factors, images)).clamp_(0, 255).to(images.dtype)


def change_saturation(images: Tensor, factors: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else blend(images, grey(images), factors)


def change_contrast(images: Tensor, factors: Tensor) -> Tensor:
    return blend(images, grey(images).mean(dim=(1, 2, 3), keepdim=True), factors)


def change_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """From blurred, factor 0, to sharpened; the border stays as it is."""
    channels, height, width = images.shape[1:]
    if height <= 2 or width <= 2:
        return images
    kernel = torch.ones(channels, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    blurred = (F.conv2d(images.float(), kernel, groups=channels) / 13).round_()
    views, inside = images.clone(), images[:, :, 1:-1, 1:-1]
    sharpened = inside + (blurred - inside) * per_image(1 - factors, images)
    views[:, :, 1:-1, 1:-1] = sharpened.clamp_(0, 255).to(images.dtype)
    return views


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue by a share of the colour circle."""
    red, green, blue = (images.float() / 255).unbind(1)
    most, least = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = most - least
    divisor = torch.where(chroma == 0, 1, chroma)
    sixths = torch.where(
        most == red,
        (green - blue) / divisor,
        torch.where(most == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixths = sixths + 6 * per_image(turns, images)[:, :, :, 0]
    # How far each channel is from the strongest one (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative).
    far = (torch.tensor([5.0, 3, 1], device=images.device)[:, None, None] + sixths[:, None]).remainder(6)
    share = torch.minimum(far, 4 - far).clamp(0, 1)
    values = most[:, None] - chroma[:, None] * share
    return (values * 255.999).clamp_(0, 255).to(images.dtype)  # as torchvision turns shares into levels


ADJUST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": change_brightness,
    "contrast": change_contrast,
    "saturation": change_saturation,
    "hue": turn_hue,
}
