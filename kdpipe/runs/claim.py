"""A run belongs to one process at a time: no two train it, and what a killed one left behind is recognised."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdpipe.system.files import write_atomically

# The operating system gives the lock back when its process dies, whatever it dies of.
LOCK = ".claim"
OWNER = "owner.json"
SETTLING = 20  # seconds, in which another process puts right what a dead one left


class ClaimedError(ValueError):
    """Another process has this run in progress."""


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Have a run's folder to oneself, as the one who trains it.

    Raises:
        ClaimedError: another living process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        # The lock without a living owner is that of somebody who only tidies up.
        lock.acquire(timeout=0 if _lives(_owner(folder)) else SETTLING)
    except Timeout:
        owner = _owner(folder)
        who = f"process {owner['pid']} on {owner['host']}" if "pid" in owner else "another process"
        raise ClaimedError(f"{who} has this run in progress ({folder})") from None
    try:
        write_atomically(folder / OWNER, json.dumps(_me()).encode())
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a run's folder to oneself, without training it.

    Raises:
        TimeoutError: another process has it.
    """
    with FileLock(folder / LOCK).acquire(timeout=0):
        yield


def is_of_this_machine(folder: Path) -> bool:
    """Whether the last process that had the run was of this machine, whose locks tell that it is gone."""
    return _owner(folder).get("host", socket.gethostname()) == socket.gethostname()


def worker_of_ours(folder: Path) -> int | None:
    """The number of the process that trains a run for this one, which started it; None where there is none."""
    owner = _owner(folder)
    mine = (owner.get("host"), owner.get("parent")) == (socket.gethostname(), os.getpid())
    return int(owner["pid"]) if mine and _lives(owner) else None


def wait_until_free(folder: Path) -> None:
    """Return when no process has the run of this folder in progress."""
    if (folder / LOCK).exists():
        with FileLock(folder / LOCK):
            pass


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "parent": os.getppid(), "host": socket.gethostname()}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process may be there: of another machine it is not known."""
    if not owner:
        return False
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or of a system with larger numbers
        return True
    return True


def _owner(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / OWNER).read_text())
    except (OSError, ValueError):  # nobody, or killed while writing
        return {}
    is_one = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and isinstance(owner.get("host"), str)
    return owner if is_one else {}
