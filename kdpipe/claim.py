"""A run belongs to one process at a time: no two train it, and what a killed one left behind is recognised."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# The operating system gives the lock back when its process dies, whatever it dies of.
LOCK = ".claim"
OWNER = "owner.json"


class ClaimedError(ValueError):
    """Another process has this run in progress."""


class Claim:
    """A run's folder while it is ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last_run: str | None = _owner(folder).get("run")  # MLflow's id of what was last started here
        self.starts(self.last_run)

    def starts(self, run_id: str | None) -> None:
        """Keep the MLflow id of the run that starts now."""
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "run": run_id}
        (self.folder / OWNER).write_text(json.dumps(owner))


@contextmanager
def claim(folder: Path) -> Iterator[Claim]:
    """Have a run's folder to oneself.

    Raises:
        ClaimedError: another living process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = _owner(folder)
        who = f"process {owner['pid']} on {owner['host']}" if "pid" in owner else "another process"
        raise ClaimedError(f"{who} has this run in progress ({folder})") from None
    try:
        yield Claim(folder)
    finally:
        lock.release()


def wait_until_free(folder: Path) -> None:
    """Return when no process has the run of this folder in progress."""
    if (folder / LOCK).exists():
        with FileLock(folder / LOCK):
            pass


def _owner(folder: Path) -> dict[str, str]:
    try:
        owner = json.loads((folder / OWNER).read_text())
    except (OSError, ValueError):  # nobody, or killed while writing
        return {}
    return owner if isinstance(owner, dict) else {}
