"""Photos: decoded once, in parallel, to one size, and the decoded array kept, memory-mapped."""

import hashlib
import io
import json
import logging
import os
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

from kdpipe.cache import META, keep, mapped_array, new_array
from kdpipe.checks import check_choice, check_number
from kdpipe.data.dataset import Source
from kdpipe.progress import progress

log = logging.getLogger("kdpipe")

SplitOf = Callable[[str], str | None]  # from a file's name to "validation" or "test", if it is in one of them
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
    return Path(path).read_bytes()


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
    keep(entry, _is_complete, lambda folder: _decode(files, class_names, image_size, on_bad_image, split_of, folder))
    kept = json.loads((entry / META).read_text())
    if kept["bad"]:
        bad = len(kept["bad"])
        log.warning("dataset.on_bad_image=skip: %d of %d files are no readable images, left out", bad, len(files))
    return Source(
        images=mapped_array(entry / "images.npy"),
        labels=torch.from_numpy(np.load(entry / "labels.npy")),
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
            content = files[position].read()
            with Image.open(io.BytesIO(content)) as image:
                pixels = _rgb(image)
        except UnidentifiedImageError:
            bad[files[position].name] = "no known image format" if content else "empty"
            return
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they like
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
    about = f"{len(good):,} images, {width}×{height}"
    meta = {"about": about, "names": kept, "bad": bad, "fingerprint": source.fingerprint}
    (folder / META).write_text(json.dumps(meta))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow would clip to 8 bits
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _first_size(files: Sequence[ImageFile]) -> tuple[int, int]:
    """The (width, height) of the first readable image: what all others have to have."""
    for file in files:
        with suppress(Exception), Image.open(io.BytesIO(file.read())) as image:  # decoding tells what is wrong
            return _rgb(image).size
    return 1, 1


def _is_complete(entry: Path) -> bool:
    """Whether an entry can be used: a torn one counts as absent."""
    try:
        names = json.loads((entry / META).read_text())["names"]
        images = np.lib.format.open_memmap(entry / "images.npy", mode="r")
        return len(names) == len(images) == len(np.load(entry / "labels.npy"))
    except (OSError, ValueError, KeyError, EOFError):
        return False


def files_below(root: Path) -> list[str]:
    """The files below `root`, sorted, without those that operating systems leave behind."""
    if not root.is_dir():
        return []
    return sorted(_paths_below(root), key=lambda path: path.split(os.sep))  # noqa: PTH206 - strings for speed


def _paths_below(folder: Path | str) -> Iterator[str]:
    with os.scandir(folder) as found:  # tells files from folders without a question for each to the file system
        for item in found:
            if item.name.startswith(".") or item.name in ("Thumbs.db", "desktop.ini"):
                continue
            if item.is_dir():
                yield from _paths_below(item.path)
            elif item.is_file():
                yield item.path
