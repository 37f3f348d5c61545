"""From an opened image file of any mode to the RGB that a viewer shows: upright, on white, deep grey in 8 bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

WHITE = (255, 255, 255)
LEVELS = (1, 255, 1023, 4095, 16383, 65535)  # the white of greys whose file does not tell it
# TIFF's tags (Adobe 1992).
BITS, PHOTOMETRIC, SAMPLE_FORMAT, LEAST, LARGEST = 258, 262, 339, 340, 341
WHITE_IS_ZERO, UNSIGNED = 0, 1


def as_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, 8 bits a channel: turned as its EXIF orientation says, transparent pixels laid on white, and
    grey values of more than 8 bits scaled from their whole range (see `_range`)."""
    image.load()
    _turn(image)
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), pixels).convert("RGB")
    return image.convert("RGB")


def _turn(image: Image.Image) -> None:
    """Turn an image upright, in place."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # metadata that cannot be read, or written again after the image was turned
        return


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits as one of 8 (mode L)."""
    stored = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and _first(tags, BITS) == 32 and _first(tags, SAMPLE_FORMAT, UNSIGNED) == UNSIGNED:
        stored = stored.view(np.uint32)
    low, high = _range(image, stored, tags)
    values = np.nan_to_num(stored.astype(np.float32), nan=low, posinf=high, neginf=low)
    values -= low
    values *= 255
    values /= (high - low) or 1
    pixels = values.clip(0, 255).astype(np.uint8)
    if _first(tags, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        pixels = 255 - pixels
    if isinstance(transparent := image.info.get("transparency"), int):
        pixels = np.where(stored == transparent, np.uint8(255), pixels)
    return Image.fromarray(pixels)


def _range(image: Image.Image, stored: NDArray[Any], tags: Any) -> tuple[float, float]:
    """The values of black and white.

    What the file tells: in PNG, JPEG 2000 and PGM all 16 bits (Pillow scales by PGM's maxval), in TIFF its bits per
    sample up to 16, or the sample range in its tags. Else, for TIFF of 32 bits, signed or floating-point values, 0 and
    the smallest of `LEVELS` that none exceeds by 1 or more, so that the images of one source are scaled alike; values
    that are negative or above all levels are scaled from their least to their greatest.
    """
    if LEAST in tags or LARGEST in tags:
        low, high = float(_first(tags, LEAST, 0)), float(_first(tags, LARGEST, 0))
        if -np.inf < low < high < np.inf:
            return low, high
    if image.mode.startswith("I;16"):
        return 0, 2 ** int(_first(tags, BITS, 16)) - 1
    if image.format == "PPM" and image.mode == "I":
        return 0, 65535
    finite = stored[np.isfinite(stored)] if stored.dtype.kind == "f" else stored
    if not finite.size:
        return 0, 1
    low, high = float(finite.min()), float(finite.max())
    level = next((level for level in LEVELS if high < level + 1), None)
    return (0, level) if low >= 0 and level else (low, high)


def _first(tags: Any, tag: int, default: int = 0) -> Any:
    """The first value of a TIFF tag."""
    value = tags.get(tag, default)
    return value[0] if isinstance(value, tuple) and value else value
