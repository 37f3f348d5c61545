"""Stores that are sqlite files: one process creates a file at a time, and half-made files are replaced."""

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock

from kdpipe.runs.sqlite_address import sqlite_file

MLFLOW_TABLES = {"experiments", "runs", "latest_metrics"}  # of its first schema, with which a new file starts
ABANDONED = 10  # seconds without a write after which no process is creating the file any more

log = logging.getLogger("kdpipe")


@contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create a sqlite file: two at once would break it."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f"{file.name}.lock")
    lock.touch()  # where that is impossible, FileLock would try for ever
    with FileLock(lock):
        yield


def set_aside_half_made(uri: str) -> None:
    """Rename a sqlite file that a dead process left half-made, so that a new one can be created."""
    file = sqlite_file(uri)
    while file and is_half_made(file):
        if time.time() - file.stat().st_mtime > ABANDONED:
            aside = file.with_name(f"{file.name}.half-made-{time.strftime('%Y%m%d-%H%M%S')}")
            file.rename(aside)
            log.warning("%s was left half-made, without any run: renamed to %s; creating a new one", file, aside.name)
            return
        time.sleep(0.5)  # another process may be creating it


def is_half_made(file: Path) -> bool:
    """Whether a database lacks what MLflow adds to a new one last: an experiment."""
    if not file.is_file() or not file.stat().st_size:
        return False
    try:
        with closing(sqlite3.connect(file, timeout=10)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "alembic_version" not in tables and not MLFLOW_TABLES & tables:
                return False  # not MLflow's
            if "experiments" not in tables:
                return True
            return bool(database.execute("SELECT count(*) FROM experiments").fetchone() == (0,))
    except sqlite3.Error:  # not a database, or in use
        return False
