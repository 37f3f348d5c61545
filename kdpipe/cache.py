"""Work that is done once and kept: entries of a cache folder, there as a whole or not at all.

`python -m kdpipe.cache info` lists them, `python -m kdpipe.cache clean` removes them.
"""

import argparse
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
from filelock import FileLock, Timeout
from torch import Tensor

log = logging.getLogger("kdpipe")

META = "meta.json"  # what an entry holds, written last


def keep(entry: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> None:
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


def info(cache: Path) -> str:
    """A line for each entry, and the sum."""
    found = entries(cache)
    lines = []
    for entry in found:
        about = read_meta(entry).get("about", "of an earlier version, or not whole")
        lines.append(f"{size_of(entry) / 1e6:10,.1f} MB  {entry.parent.name}/{entry.name}  {about}")
    total = sum(map(size_of, found))
    return "\n".join([*lines, f"{total / 1e6:10,.1f} MB  in {len(found)} entries of {cache}"])


def clean(cache: Path) -> str:
    """Remove all entries but those that a process is making now."""
    removed = 0
    kept = []
    for entry in entries(cache):
        lock = FileLock(lock_of(entry.with_name(entry.name.split(".")[0])))
        try:
            with lock.acquire(timeout=0):
                size = size_of(entry)
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                removed += size
        except Timeout:
            kept.append(f"{entry.parent.name}/{entry.name}")
    in_use = f"; left alone, because they are being made: {', '.join(kept)}" if kept else ""
    return f"{removed / 1e6:,.1f} MB removed from {cache}{in_use}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kdpipe.cache", description="Decoded images and networks' answers.")
    parser.add_argument("command", choices=["info", "clean"], help="list what is kept, or remove it")
    parser.add_argument("--output-dir", default="outputs", type=Path, help="the runs' output_dir (default: outputs)")
    arguments = parser.parse_args()
    cache = arguments.output_dir / "cache"
    print(info(cache) if arguments.command == "info" else clean(cache))


if __name__ == "__main__":
    main()
