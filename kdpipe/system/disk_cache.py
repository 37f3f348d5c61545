"""Work that is done once and kept: entries of a cache folder, there as a whole or not at all."""

import errno
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

log = logging.getLogger("kdpipe")

META = "meta.json"  # what an entry holds, written last


def ensure_entry(entry: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> None:
    """Have `make` write the folder `entry` unless it is there and whole. Processes that need the same entry at once
    do the work once."""
    if is_whole(entry):
        return  # without a lock: the folder may be read-only
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_of(entry)):
        if not is_whole(entry):
            if entry.exists():
                log.warning("%s is damaged: it is made again", entry)
            try:
                with _new_entry(entry) as folder:
                    make(folder)
            except OSError as error:
                if error.filename is None:  # as when a disk is full
                    raise OSError(error.errno, error.strerror, str(entry)) from error
                raise


@contextmanager
def _new_entry(entry: Path) -> Iterator[Path]:
    """A folder to write to, that becomes `entry` when all went well and vanishes when not; under the entry's lock."""
    folder = entry.with_name(f"{entry.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    folder.mkdir()
    try:
        yield folder
        for file in folder.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(entry, ignore_errors=True)
        folder.replace(entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lock_of(entry: Path) -> str:
    return f"{entry}.lock"


def new_array(file: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.memmap:
    """An array on disk to write to.

    Raises:
        OSError: no space for it. All of it is taken at once, because a process that writes to memory-mapped pages on
            a full disk is killed without a word.
    """
    try:
        array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        gigabytes = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
        raise OSError(error.errno, f"{error.strerror}, {gigabytes:.3g} GB are needed", str(file)) from error
    return array


def mapped_array(file: Path) -> Tensor:
    """An array on disk as a tensor: pages come into memory as they are asked for, and go again. What is written into
    it does not reach the disk."""
    try:
        return torch.from_numpy(np.lib.format.open_memmap(file, mode="c"))
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    # The system promises no more writable pages than it has memory, whether they are written to or not.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.lib.format.open_memmap(file, mode="r"))


def read_meta(entry: Path) -> dict[str, object]:
    """What an entry says of itself; nothing where it is not whole."""
    try:
        meta = json.loads((entry / META).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def entries(cache: Path) -> list[Path]:
    """All that lies in a cache's folders, `<cache>/<kind>/<entry>`."""
    return sorted(path for path in cache.glob("*/*") if path.suffix != ".lock")


def size_of(entry: Path) -> int:
    """Bytes on disk."""
    files = [entry] if entry.is_file() else [file for file in entry.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
