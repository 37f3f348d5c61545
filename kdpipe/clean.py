"""`python -m kdpipe.clean`: what an output folder no longer needs, listed, and with --yes removed."""

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from kdpipe.runs.claim import locked
from kdpipe.runs.command_line import add_store_arguments, check_flags, existing_store, run_command
from kdpipe.runs.journal import Journal
from kdpipe.system.disk_cache import lock_of, read_meta

DAY = 86_400  # seconds
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Remains:
    """A folder that is not needed.

    Attributes:
        about: what it is, and why it is not needed.
        lock: held by whoever writes to it; raises TimeoutError.
    """

    folder: Path
    about: str
    lock: Callable[[], AbstractContextManager[object]]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        files = [self.folder, *self.folder.rglob("*")]
        return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())

    def remove(self) -> bool:
        """Whether it was removed: a process may be writing to it."""
        try:
            with self.lock():
                shutil.rmtree(self.folder) if self.folder.is_dir() else self.folder.unlink()
        except (TimeoutError, Timeout):
            return False
        return True


def clean_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.clean",
        description="List what an output folder no longer needs: folders of runs that were deleted in MLflow, and "
        "caches that were not used for some time. The MLflow store and its artifacts stay; mlflow gc removes those of "
        "deleted runs.",
    )
    parser.add_argument("--yes", action="store_true", help="remove what is listed")
    parser.add_argument("--days", type=float, default=30, help="without use, after which a cache is old (default: 30)")
    parser.add_argument("--caches", action="store_true", help="all caches, and nothing else")
    add_store_arguments(parser)
    return parser.parse_args(words)


def clean_up(arguments: argparse.Namespace) -> str:
    """A line for each folder, and the total. Raises ValueError where there is no store, or it does not answer."""
    from kdpipe.settings.values import NonNegative

    check_flags(arguments, days=NonNegative)
    output = arguments.output_dir
    if arguments.caches:
        found = list(cached(output / "cache", 0))
    else:
        found = [*deleted_runs(output / "runs", existing_store(arguments)), *cached(output / "cache", arguments.days)]
    lines, removed, kept = [], 0, 0
    for remains in found:
        size = remains.size
        note = ""
        if arguments.yes and not remains.remove():
            note, kept = "; kept, because it is being written", kept + 1
        else:
            removed += size
        lines.append(f"{size / 1e6:10,.1f} MB  {remains.folder.relative_to(output)}  {remains.about}{note}")
    outcome = f"removed from {output}" if arguments.yes else f"would be removed from {output}"
    hint = "; --yes removes them" if found and not arguments.yes else ""
    return "\n".join([*lines, f"{removed / 1e6:10,.1f} MB  in {len(found) - kept} folders {outcome}{hint}"])


def cached(cache: Path, days: float) -> Iterator[Remains]:
    """The entries of a cache that were not used for so many days, and those of no use: unfinished, or unknown."""
    for entry in sorted(path for path in cache.glob("*/*") if path.suffix != ".lock"):
        about = read_meta(entry).get("about")
        if about is None or _age(entry) >= days:
            name = entry.with_name(entry.name.removesuffix(UNFINISHED))
            lock = FileLock(lock_of(name), timeout=0)
            yield Remains(entry, str(about or "of an earlier version, or incomplete"), lock.acquire)


def _age(entry: Path) -> float:
    """Days since the last use of an entry."""
    return (time.time() - entry.stat().st_mtime) / DAY


def deleted_runs(runs: Path, uri: str) -> Iterator[Remains]:
    """The folders of runs that are deleted in the store. A folder belongs to all runs of its identity; one whose runs
    the store does not know may belong to another store, and is kept."""
    folders = [folder for folder in sorted(runs.glob("*")) if folder.is_dir()]
    if not folders:
        return

    from kdpipe.tracking import RunStore  # imports mlflow, which takes seconds

    deleted = RunStore(uri).deleted_identities()
    for folder in folders:
        journal = Journal.read(folder)
        is_of_this_store = journal is None or journal.uri == uri
        if folder.name in deleted and is_of_this_store:
            yield Remains(folder, f"run {deleted[folder.name]} was deleted in MLflow", partial(locked, folder))


def cli() -> None:
    """`python -m kdpipe.clean`."""
    run_command("kdpipe.clean", lambda: clean_up(clean_arguments()))


if __name__ == "__main__":
    cli()
