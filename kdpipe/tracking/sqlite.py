"""A store that is a sqlite file: made by one process at a time, and made again where one died over it."""

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock

MLFLOW_TABLES = {"experiments", "runs", "latest_metrics"}  # of its first version, with which a new file begins
ABANDONED = 10  # seconds without a write, after which nobody is making a database any more

log = logging.getLogger("kdpipe")


@contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Two processes that create the same sqlite file at once would break it."""
    if not uri.startswith("sqlite"):
        yield
        return
    file = Path(uri.split(":///", 1)[-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        yield


def set_aside_half_made(uri: str) -> None:
    """Rename a sqlite file that a process left half-made when it died, so that a new one can be made."""
    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///"):
        return
    while is_half_made(file):
        if time.time() - file.stat().st_mtime > ABANDONED:
            aside = file.with_name(f"{file.name}.half-made-{time.strftime('%Y%m%d-%H%M%S')}")
            file.rename(aside)
            log.warning("%s was left half-made, without any run: it is now %s, and a new one is made", file, aside.name)
            return
        time.sleep(0.5)  # somebody may be making it


def is_half_made(file: Path) -> bool:
    """Whether a file is a database that has not got what MLflow puts into a new one last: an experiment."""
    if not file.is_file() or not file.stat().st_size:
        return False
    try:
        with closing(sqlite3.connect(file, timeout=10)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "alembic_version" not in tables and not MLFLOW_TABLES & tables:
                return False  # somebody else's
            if "experiments" not in tables:
                return True
            return bool(database.execute("SELECT count(*) FROM experiments").fetchone() == (0,))
    except sqlite3.Error:  # no database, or in use
        return False
