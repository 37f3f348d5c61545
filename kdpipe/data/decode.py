"""Photos: decoded once, in parallel, to one size, and the decoded array kept, memory-mapped."""

import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kdpipe.data.dataset import Source
from kdpipe.settings.checks import check_choice, check_number
from kdpipe.system.disk_cache import META, keep, mapped_array, new_array, read_meta
from kdpipe.system.progress import progress

log = logging.getLogger("kdpipe")
# Pillow's own warning comes at 89 million pixels; such an image is refused below.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

SplitOf = Callable[[str], str | None]  # from a file's name to "validation" or "test", if it is in one of them
# What photos come in. Others that Pillow knows start programs (EPS), read other files, or are no photos.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO")
MAX_PIXELS = 64_000_000  # 192 MB once decoded, in each thread; cameras and phones stay below, but for a few modes
MAX_BYTES = 256_000_000  # of a file; so many pixels take 192 MB uncompressed
LAYOUT = 1  # of the files in a cache entry; another number is another entry


@dataclass(frozen=True)
class ImageFile:
    """A file that ought to be an image: its name within the data set, its label, a stamp that changes with its
    content (size and time, or a checksum), and how to read it."""

    name: str
    label: int
    stamp: tuple[int, ...]
    read: Callable[[], bytes]


def image_file(path: str, root: Path, label: int) -> ImageFile:
    """An `ImageFile` for a file on disk, below `root`."""
    status = os.stat(path)  # noqa: PTH116 - there are many files, and a Path of each takes longer than its status
    # Not the time of modification alone: it can be set, and is by programs that unpack archives.
    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return ImageFile(path.removeprefix(f"{root}{os.sep}").replace(os.sep, "/"), label, stamp, partial(_content, path))


def _content(path: str) -> bytes:
    check_bytes(os.path.getsize(path))  # noqa: PTH202
    return Path(path).read_bytes()


def check_bytes(number: int) -> None:
    """Raise ValueError for a file that is too large to be read whole."""
    if number > MAX_BYTES:
        raise ValueError(f"{number / 1e6:,.0f} MB, up to {MAX_BYTES / 1e6:,.0f} are accepted")


def read_image(content: bytes) -> Image.Image:
    """An image file's pixels as RGB; of several frames the first.

    Raises:
        ValueError: not a readable image, or one that would take too much memory.
    """
    try:
        with _opened(content) as image:
            return _rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("no known image format" if content else "empty") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _opened(content: bytes) -> Image.Image:
    Image.init()
    image = Image.open(io.BytesIO(content), formats=[name for name in PHOTO_FORMATS if name in Image.OPEN])
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}×{image.height} pixels, up to {MAX_PIXELS / 1e6:g} million are accepted")
    return image


def decoded_source(
    files: Sequence[ImageFile],
    class_names: tuple[str, ...],
    *,
    image_size: int | None,
    on_bad_image: str,
    cache_dir: str,
    split_of: SplitOf = lambda name: None,
) -> Source:
    """The `Source` of `files`, from the cache where they were decoded before.

    Args:
        image_size: side in pixels of the stored squares; None keeps the images' size, which must be one for all.
        on_bad_image: "stop", or "skip" to go on without the files that are no readable image.
        cache_dir: folder of the decoded arrays.
        split_of: which files the source has already split off.

    Raises:
        ValueError: a bad setting; unreadable files under "stop" (all are named); images of several sizes.
    """
    check_settings(image_size, on_bad_image)
    settings = {
        "layout": LAYOUT,
        "image_size": image_size,
        "on_bad_image": on_bad_image,
        "class_names": class_names,
        "files": [(file.name, file.label, *file.stamp) for file in files],
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    entry = Path(cache_dir) / key
    is_complete = partial(_is_complete, len(class_names))
    keep(entry, is_complete, lambda folder: _decode(files, class_names, image_size, on_bad_image, split_of, folder))
    kept = json.loads((entry / META).read_text())
    if kept["bad"]:
        bad = len(kept["bad"])
        log.warning("dataset.on_bad_image=skip: %d of %d files are no readable images, left out", bad, len(files))
    return Source(
        images=mapped_array(entry / "images.npy"),
        labels=torch.from_numpy(np.array(np.lib.format.open_memmap(entry / "labels.npy", mode="r"))),
        class_names=class_names,
        given=_given_splits(kept["names"], split_of),
        fingerprint=kept["fingerprint"],
    )


def _given_splits(names: Sequence[str], split_of: SplitOf) -> dict[str, Tensor]:
    splits: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        if split_name := split_of(name):
            splits.setdefault(split_name, []).append(position)
    return {name: torch.tensor(positions) for name, positions in splits.items()}


def check_settings(image_size: object, on_bad_image: object) -> None:
    """Raise ValueError for a stored size or a policy that is none."""
    if image_size is not None:
        check_number("dataset.image_size", image_size, low=1, high=4096, integer=True)
    check_choice("dataset.on_bad_image", on_bad_image, ["stop", "skip"])


def _decode(
    files: Sequence[ImageFile],
    class_names: tuple[str, ...],
    image_size: int | None,
    on_bad_image: str,
    split_of: SplitOf,
    folder: Path,
) -> None:
    """Write images.npy, labels.npy and meta.json into `folder`."""
    bad: dict[str, str] = {}
    if image_size is None:
        width, height = _first_size(files)
    else:
        height = width = image_size
    other_sizes: list[str] = []
    shape = (len(files), 3, height, width)
    images = new_array(folder / "images.npy", shape, np.uint8)

    def decode_one(position: int) -> None:
        try:
            pixels = read_image(files[position].read())
        except MemoryError:
            raise
        except Exception as error:  # reading an archive raises other errors
            bad[files[position].name] = " ".join(str(error).split()) or type(error).__name__
            return
        if pixels.size != (width, height) and image_size is None:
            other_sizes.append(f"{files[position].name} has {pixels.width}×{pixels.height}")
            return
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
        images[position] = np.asarray(pixels).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("decoding images", len(files)) as bar:
        for _ in pool.map(decode_one, range(len(files))):
            bar.advance(1)
    if other_sizes:
        raise ValueError(
            f"dataset.image_size=null: images of one size are accepted, but the first one has {width}×{height} pixels "
            f"and {min(other_sizes)}; give the side in pixels, such as 128"
        )
    if bad and on_bad_image == "stop":
        names = "; ".join(f"{name} ({reason})" for name, reason in sorted(bad.items()))
        raise ValueError(
            f"dataset.on_bad_image=stop: {len(bad)} of {len(files)} files are no readable images; "
            f"remove them or use skip: {names}"
        )
    good = [position for position, file in enumerate(files) if file.name not in bad]
    labels = np.array([files[position].label for position in good], dtype=np.int64)
    for label, class_name in enumerate(class_names):
        if label not in labels:
            raise ValueError(f"dataset.root: class {class_name} has no readable image; each class needs one")
    if bad:
        compact = new_array(folder / "good.npy", (len(good), 3, height, width), np.uint8)
        for row, position in enumerate(good):
            compact[row] = images[position]
        compact.flush()
        images = compact
        (folder / "good.npy").replace(folder / "images.npy")
    images.flush()
    np.save(folder / "labels.npy", labels)
    kept = [files[position].name for position in good]
    if lost := {split_of(file.name) for file in files} - {split_of(name) for name in kept}:
        raise ValueError(f"dataset.root: the {lost.pop() or 'train'} folder has no readable image; it needs one")
    source = Source(torch.from_numpy(images), torch.from_numpy(labels), class_names, _given_splits(kept, split_of))
    meta = {"about": _about(images.shape), "names": kept, "bad": bad, "fingerprint": source.fingerprint}
    (folder / META).write_text(json.dumps(meta))


def _about(shape: tuple[int, ...]) -> str:
    number, _, height, width = shape
    return f"{number:,} images, {width}×{height}"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow would clip to 8 bits
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _first_size(files: Sequence[ImageFile]) -> tuple[int, int]:
    """The (width, height) of the first readable image: what all others have to have."""
    for file in files:
        with suppress(Exception):  # decoding tells what is wrong
            return read_image(file.read()).size
    return 1, 1


def _is_complete(num_classes: int, entry: Path) -> bool:
    """Whether an entry can be used: a torn one counts as absent."""
    meta = read_meta(entry)
    names, bad = meta.get("names"), meta.get("bad")
    try:  # mapped, because a torn header may promise any size
        images, labels = (np.lib.format.open_memmap(entry / f"{name}.npy", mode="r") for name in ("images", "labels"))
    except Exception:  # NumPy's reader of headers raises whatever it stumbles over
        return False
    return (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(bad, dict)
        and isinstance(meta.get("fingerprint"), str)
        and (images.dtype, images.ndim, labels.dtype, labels.ndim) == (np.uint8, 4, np.int64, 1)
        and images.flags.c_contiguous
        and (images.shape[1], _about(images.shape)) == (3, meta.get("about"))
        and len(names) == len(images) == len(labels) > 0
        and 0 <= int(labels.min()) <= int(labels.max()) < num_classes
    )


def files_below(root: Path) -> list[str]:
    """The files below `root`, sorted, without those that operating systems leave behind.

    Raises:
        ValueError: a link to a folder that was read already (such links can make endlessly many files), or a name
            that is no text.
    """
    if not root.is_dir():
        return []
    found = sorted(_paths_below(root, set()), key=lambda path: path.split(os.sep))  # noqa: PTH206 - for speed
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        wrong = next(path for path in found if any("\ud800" <= letter <= "\udfff" for letter in path))
        raise ValueError(f"dataset.root: {wrong!a}: a file name in UTF-8 is accepted") from error
    return found


def _paths_below(folder: Path | str, seen: set[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in seen:
        raise ValueError(f"dataset.root: {folder} leads to a folder that was read already, {real}; remove this link")
    seen.add(real)
    with os.scandir(folder) as found:  # tells files from folders without a question for each to the file system
        for item in found:
            if item.name.startswith(".") or item.name in ("Thumbs.db", "desktop.ini"):
                continue
            if item.is_dir():
                yield from _paths_below(item.path, seen)
            elif item.is_file():
                yield item.path
