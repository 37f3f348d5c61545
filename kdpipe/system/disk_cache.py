"""A cache on disk, `<cache>/<kind>/<entry>`: an entry is a folder that is either complete or absent."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

log = logging.getLogger("kdpipe")

META = "meta.json"  # describes an entry, written last


def ensure_entry(entry: Path, is_intact: Callable[[Path], bool], make: Callable[[Path], None]) -> None:
    """Have `make` write the folder `entry` unless it exists and is intact; processes that need the same entry at the
    same time do the work once."""
    if is_intact(entry):  # without a lock: the folder may be read-only
        with suppress(OSError):
            os.utime(entry)  # it is in use: kdpipe.clean removes old ones
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    unfinished = entry.with_name(f"{entry.name}.unfinished")
    with FileLock(lock_of(entry)):
        if is_intact(entry):
            return
        if entry.exists():
            log.warning("%s is damaged and will be rebuilt", entry)
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
        try:
            unfinished.mkdir()
            make(unfinished)
            for file in unfinished.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            shutil.rmtree(entry, ignore_errors=True)
            unfinished.replace(entry)
        except OSError as error:
            if error.filename is None:  # as on a full disk
                raise OSError(error.errno, error.strerror, str(entry)) from error
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def lock_of(entry: Path) -> str:
    return f"{entry}.lock"


def new_array(file: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.memmap:
    """A memory-mapped array to write to. All its space is allocated at once, because a process that writes to
    memory-mapped pages on a full disk is killed without a message. Raises OSError if there is not enough."""
    try:
        array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        gigabytes = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
        raise OSError(error.errno, f"{error.strerror}, {gigabytes:.3g} GB needed", str(file)) from error
    return array


def mapped_array(file: Path) -> Tensor:
    """A memory-mapped array as a tensor; writing to it changes memory only, not the file."""
    return _mapped(partial(np.lib.format.open_memmap, file))


def mapped_bytes(file: Path) -> Tensor:
    """The same for all bytes of a file, uint8. Raises ValueError for an empty file."""
    return _mapped(partial(np.memmap, file, np.uint8))


def _mapped(opened: Callable[..., np.memmap]) -> Tensor:
    try:
        return torch.from_numpy(opened(mode="c"))
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    # The system commits no more writable pages than it has memory, whether they are written to or not.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(opened(mode="r"))


def array_digest(file: Path) -> str:
    """SHA-256 of the values of an array on disk, 64 hex digits; computed once per process while the file's size, time
    of modification and inode stay the same. NumPy's reader raises errors of all kinds for damaged files."""
    status = file.stat()
    return _array_digest(file, (status.st_size, status.st_mtime_ns, status.st_ino))


@cache
def _array_digest(file: Path, stamp: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    for part in np.lib.format.open_memmap(file, mode="r"):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def read_meta(entry: Path) -> dict[str, object]:
    """The description of an entry; empty if it is missing or damaged."""
    try:
        meta = json.loads((entry / META).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}
