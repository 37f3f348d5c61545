"""Photos: decoded once, in parallel, to one size or in their own shape; what is decoded is kept on disk and
memory-mapped."""

import hashlib
import io
import json
import logging
import os
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from kdpipe.data.dataset import Source
from kdpipe.data.photos import PIXELS, PLACES, Photos, PhotoWriter, kept, open_photos
from kdpipe.data.pixels import as_rgb
from kdpipe.settings.errors import ConfigError, flat
from kdpipe.settings.values import Resize, StoredResize
from kdpipe.system.disk_cache import META, ensure_entry, mapped_array, new_array, read_meta
from kdpipe.system.progress import progress

log = logging.getLogger("kdpipe")

ImageSize = Annotated[int, Field(ge=1, le=4096)]  # side of a square in pixels
OnBadImage = Literal["stop", "skip"]

# Formats of photos. Others that Pillow knows start programs (EPS), read other files, or are not for photos.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO")
MAX_PIXELS = 64_000_000  # 192 MB decoded, in each thread; nearly all cameras and phones stay below
MAX_BYTES = 256_000_000  # of a file; MAX_PIXELS take 192 MB uncompressed
LAYOUT = 2  # of a cache entry and how images are decoded; another number is another entry
QUEUED = 1024  # files that wait to be decoded, at most


@dataclass(frozen=True)
class ImageFile:
    """A file that should be an image."""

    name: str  # within the data set
    label: int
    stamp: tuple[int, ...]  # changes with the content: size and time, or a checksum
    read: Callable[[], bytes]
    split: str | None = None  # "validation" or "test", if the source puts it there


def image_file(path: str, root: Path, label: int, split: str | None = None) -> ImageFile:
    """An `ImageFile` for a file on disk, below `root`. Reading something that is not a file, such as a broken link,
    raises ValueError."""
    try:
        status = os.stat(path)  # noqa: PTH116 - there are many files, and making a Path takes longer than its status
    except OSError:
        status = Path(path).lstat()
    # Not the time of modification alone: programs that unpack archives set it.
    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    name = path.removeprefix(f"{root}{os.sep}").replace(os.sep, "/")
    read = read_file if stat.S_ISREG(status.st_mode) else _refuse
    return ImageFile(name, label, stamp, partial(read, Path(path)), split)


def _refuse(path: Path) -> bytes:
    """Refuse to read what is not a file; reading a pipe would never end."""
    raise ValueError(f"a link to {path.readlink()}, which does not exist" if path.is_symlink() else "not a file")


def read_file(path: Path) -> bytes:
    """The content of a file. Raises ValueError if it is too large to be read into memory."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{size / 1e6:,.0f} MB; expected at most {MAX_BYTES / 1e6:,.0f} MB")
    return path.read_bytes()


def read_image(content: bytes) -> Image.Image:
    """The pixels of an image file as RGB (see `as_rgb`); of several frames the first. Raises ValueError for what is not
    a readable image, or would take too much memory."""
    Image.init()
    # Pillow warns from 89 million pixels on; we refuse such images below. For the whole process, because
    # catch_warnings is not thread-safe.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", message="Corrupt EXIF data")  # such an image is read as it lies
    formats = [name for name in PHOTO_FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                limit = f"{MAX_PIXELS / 1e6:g} million"
                raise ValueError(f"{image.width}×{image.height} pixels; expected at most {limit}")
            return as_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("unknown image format" if content else "empty") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds
        raise ValueError(flat(error)) from error


def decoded_source(
    files: Sequence[ImageFile],
    class_names: tuple[str, ...],
    image_size: int | None,
    on_bad_image: str,
    cache_dir: str,
    resize: StoredResize = "squeeze",
) -> Source:
    """The `Source` of `files`, from the cache if they were decoded before.

    Args:
        image_size: side in pixels of the stored squares; None keeps the images' size, which must be the same for all.
        resize: whether photos are squeezed into squares, cropped to their centre, or `kept` in their shape, with
            `image_size` for the shorter side.
        on_bad_image: "stop", or "skip" to leave out files that are not readable images.
        cache_dir: folder of the decoded arrays.

    Raises ConfigError for unreadable files under "stop" (all are named), and for images of several sizes.
    """
    settings = {
        "layout": LAYOUT,
        "image_size": image_size,
        "on_bad_image": on_bad_image,
        "class_names": class_names,
        **({"resize": resize} if resize != "squeeze" else {}),
        "files": [(file.name, file.label, *file.stamp) for file in files],
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    entry = Path(cache_dir).expanduser() / key
    decode = partial(_decode, files, class_names, image_size, resize, on_bad_image == "skip")
    ensure_entry(entry, partial(_is_complete, files, len(class_names), resize), decode)
    meta = json.loads((entry / META).read_text())
    if bad := meta["bad"]:
        log.warning("dataset.on_bad_image=skip: %d of %d files are not readable images, left out", len(bad), len(files))
    readable = [file for file in files if file.name not in bad]
    return Source(
        images=open_photos(entry) if resize == "keep" else mapped_array(entry / "images.npy"),
        labels=torch.from_numpy(np.load(entry / "labels.npy")),
        class_names=class_names,
        given=_given_splits(readable),
        fingerprint=meta["fingerprint"],
        names=[file.name for file in readable],
    )


def _given_splits(files: Sequence[ImageFile]) -> dict[str, Tensor]:
    splits = np.array([file.split or "" for file in files])
    return {str(name): torch.from_numpy(np.flatnonzero(splits == name)) for name in np.unique(splits) if name}


def _decode(
    files: Sequence[ImageFile],
    class_names: tuple[str, ...],
    image_size: int | None,
    resize: StoredResize,
    skips: bool,
    folder: Path,
) -> None:
    """Write the images, labels.npy and meta.json into `folder`."""
    images: np.memmap | None = None
    if resize == "keep":
        bad = _decode_photos(files, image_size, folder)
    else:
        width, height = (image_size, image_size) if image_size else _first_size(files)
        images = new_array(folder / "images.npy", (len(files), 3, height, width), np.uint8)
        bad = _decode_into(images, files, resize if image_size else None)
    readable = _readable(files, class_names, bad, skips)
    labels = np.array([file.label for file in readable], dtype=np.int64)
    if images is not None and bad:
        everything, images = images, new_array(folder / "good.npy", (len(readable), *images.shape[1:]), np.uint8)
        good = (position for position, file in enumerate(files) if file.name not in bad)
        for row, position in enumerate(good):
            images[row] = everything[position]
        (folder / "good.npy").replace(folder / "images.npy")
    if images is not None:
        images.flush()
    np.save(folder / "labels.npy", labels)
    pixels = open_photos(folder) if images is None else torch.from_numpy(images)
    source = Source(pixels, torch.from_numpy(labels), class_names, _given_splits(readable))
    meta = {"about": _about(pixels), "bad": bad, "fingerprint": source.fingerprint}
    (folder / META).write_text(json.dumps(meta))


def _readable(
    files: Sequence[ImageFile], class_names: Sequence[str], bad: Mapping[str, str], skips: bool
) -> list[ImageFile]:
    """The files that are readable images. Raises ConfigError if others are not to be skipped, or too many are."""
    if bad and not skips:
        names = "; ".join(f"{name} ({reason})" for name, reason in sorted(bad.items()))
        problem = f"{len(bad)} of {len(files)} files are not readable images; remove them, or set skip: {names}"
        raise ConfigError("on_bad_image", "stop", problem=problem)
    readable = [file for file in files if file.name not in bad]
    trained = {file.label for file in readable if file.split is None}
    for label, class_name in enumerate(class_names):
        if label not in trained:
            raise ConfigError("root", expected="at least one", problem=f"class {class_name} has no readable image")
    if lost := {file.split for file in files} - {file.split for file in readable}:
        problem = f"the {lost.pop() or 'train'} folder has no readable image"
        raise ConfigError("root", expected="at least one", problem=problem)
    return readable


def _decode_photos(files: Sequence[ImageFile], shorter_side: int | None, folder: Path) -> Mapping[str, str]:
    """Decode files into photos that keep their shape, and return those that are not readable images, with the
    reasons."""
    with (folder / PIXELS).open("wb") as file:
        writer = PhotoWriter(file)
        bad = _decode_each(files, lambda position, photo: writer.add(position, kept(photo, shorter_side)))
        np.save(folder / PLACES, writer.table().numpy())
    return bad


def _decode_into(images: np.memmap, files: Sequence[ImageFile], resize: Resize | None) -> Mapping[str, str]:
    """Decode files into images uint8 [N, 3, H, W], and return those that are not readable images, with the reasons.

    Args:
        resize: how to fit photos of other sizes; None to refuse them.
    """
    size = (images.shape[3], images.shape[2])
    other_sizes: list[str] = []

    def add(position: int, photo: Image.Image) -> None:
        if photo.size != size and resize is None:
            other_sizes.append(f"{files[position].name} has {photo.width}×{photo.height}")
        else:
            images[position] = stored(photo, size, resize or "squeeze")

    bad = _decode_each(files, add)
    if other_sizes:
        problem = f"the first image has {size[0]}×{size[1]} pixels, but {min(other_sizes)}"
        raise ConfigError("image_size", None, "the side in pixels, such as 128", problem)
    return bad


def _decode_each(files: Sequence[ImageFile], add: Callable[[int, Image.Image], None]) -> dict[str, str]:
    """Decode files in parallel and `add` their images, with their numbers; return those that are not readable images,
    with the reasons."""
    bad: dict[str, str] = {}

    def decode_one(position: int) -> None:
        file = files[position]
        try:
            pixels = read_image(file.read())
        except MemoryError:
            raise
        except Exception as error:  # zipfile raises all kinds
            bad[file.name] = flat(error)
        else:
            add(position, pixels)

    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("decoding images", len(files)) as bar:
        for start in range(0, len(files), QUEUED):
            for _ in pool.map(decode_one, range(len(files))[start : start + QUEUED]):
                bar.advance(1)
    return bad


def fitted(photo: Image.Image, size: tuple[int, int], resize: Resize) -> Image.Image:
    """A photo at this size (width, height): squeezed, or what is around its centre."""
    if photo.size == size:
        return photo
    if resize == "crop":
        return ImageOps.fit(photo, size, Image.Resampling.BILINEAR)
    return photo.resize(size, Image.Resampling.BILINEAR)


def stored(photo: Image.Image, size: tuple[int, int], resize: Resize) -> NDArray[np.uint8]:
    """An RGB image as it is stored: uint8 [3, H, W] of `size`, (width, height)."""
    return np.asarray(fitted(photo, size, resize)).transpose(2, 0, 1)


def _about(images: Tensor | Photos) -> str:
    number, _, height, width = images.shape
    return f"{number:,} images, {'up to ' if isinstance(images, Photos) else ''}{width}×{height}"


def _first_size(files: Sequence[ImageFile]) -> tuple[int, int]:
    """The (width, height) of the first readable image, which all others must share."""
    for file in files:
        with suppress(Exception):  # decoding reports what is wrong
            return read_image(file.read()).size
    return 1, 1


def _is_complete(files: Sequence[ImageFile], num_classes: int, resize: StoredResize, entry: Path) -> bool:
    """Whether an entry can be used; a damaged one cannot."""
    meta = read_meta(entry)
    bad = meta.get("bad")
    try:  # mapped, because a damaged header may promise any size
        labels = np.lib.format.open_memmap(entry / "labels.npy", mode="r")
        images = open_photos(entry) if resize == "keep" else mapped_array(entry / "images.npy")
    except Exception:  # NumPy's reader of headers raises all kinds
        return False
    return (
        isinstance(bad, dict)
        and isinstance(meta.get("fingerprint"), str)
        and (len(images.shape), labels.dtype, labels.ndim) == (4, np.int64, 1)
        and (isinstance(images, Photos) or (images.dtype == torch.uint8 and images.is_contiguous()))
        and (images.shape[1] == 3 or resize == "keep")
        and _about(images) == meta.get("about")
        and sum(file.name not in bad for file in files) == len(images) == len(labels) > 0
        and 0 <= int(labels.min()) <= int(labels.max()) < num_classes
    )
