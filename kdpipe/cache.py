"""`python -m kdpipe.cache info` and `clean`: decoded images, teachers' outputs and features on disk."""

import argparse
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from kdpipe.runs.command_line import folder
from kdpipe.system.disk_cache import lock_of, read_meta


def info(cache: Path) -> str:
    """A line for each entry, and the total."""
    sizes = {entry: _size(entry) for entry in _entries(cache)}
    lines = []
    for entry, size in sizes.items():
        about = read_meta(entry).get("about", "of an earlier version, or incomplete")
        lines.append(f"{size / 1e6:10,.1f} MB  {entry.parent.name}/{entry.name}  {about}")
    return "\n".join([*lines, f"{sum(sizes.values()) / 1e6:10,.1f} MB  in {len(sizes)} entries of {cache}"])


def clean(cache: Path) -> str:
    """Remove all entries except those that a process is writing."""
    removed = 0
    kept = []
    for entry in _entries(cache):
        lock = FileLock(lock_of(entry.with_name(entry.name.split(".")[0])))
        try:
            with lock.acquire(timeout=0):
                size = _size(entry)
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                removed += size
        except Timeout:
            kept.append(f"{entry.parent.name}/{entry.name}")
    in_use = f"; kept, because they are being written: {', '.join(kept)}" if kept else ""
    return f"{removed / 1e6:,.1f} MB removed from {cache}{in_use}"


def _entries(cache: Path) -> list[Path]:
    """Everything in a cache, unfinished entries included."""
    return sorted(path for path in cache.glob("*/*") if path.suffix != ".lock")


def _size(entry: Path) -> int:
    """Bytes on disk."""
    return sum(file.stat().st_size for file in (entry, *entry.rglob("*")) if file.is_file())


def cli() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.cache", description="Decoded images and networks' outputs on disk."
    )
    parser.add_argument("command", choices=["info", "clean"], help="list the entries, or remove them")
    parser.add_argument("--output-dir", default="outputs", type=folder, help="the runs' output_dir (default: outputs)")
    arguments = parser.parse_args()
    cache = arguments.output_dir / "cache"
    print(info(cache) if arguments.command == "info" else clean(cache))


if __name__ == "__main__":
    cli()
