"""Locks on a run's folder: one process trains it at a time, and a killed process leaves no lock behind."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdpipe.system.files import write_atomically

# The operating system releases it when its process dies, for whatever reason.
LOCK = ".claim"
OWNER = "owner.json"
RECOVERY_TIMEOUT = 20  # seconds for another process to recover what a dead one left


class ClaimedError(ValueError):
    """Another process is running this run."""


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Lock a run's folder in order to train it.

    Raises:
        ClaimedError: another process trains it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        # A lock without a living owner is held for a short recovery.
        lock.acquire(timeout=0 if is_alive(_owner(folder)) else RECOVERY_TIMEOUT)
    except Timeout:
        owner = _owner(folder)
        who = f"process {owner['pid']} on {owner['host']}" if "pid" in owner else "another process"
        raise ClaimedError(f"{who} has this run in progress ({folder})") from None
    try:
        write_atomically(folder / OWNER, json.dumps(this_process()).encode())
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder without training it.

    Raises:
        TimeoutError: another process has locked it.
    """
    with FileLock(folder / LOCK).acquire(timeout=0):
        yield


def is_local(folder: Path) -> bool:
    """Whether the run's last process was on this machine, where its lock shows whether it is gone."""
    return _owner(folder).get("host", socket.gethostname()) == socket.gethostname()


def worker_pid(folder: Path) -> int | None:
    """The process id of the child of this process that trains the run; None without one."""
    owner = _owner(folder)
    mine = (owner.get("host"), owner.get("parent")) == (socket.gethostname(), os.getpid())
    return int(owner["pid"]) if mine and is_alive(owner) else None


def wait_until_free(folder: Path) -> None:
    """Return when no process has locked the folder."""
    if (folder / LOCK).exists():
        with FileLock(folder / LOCK):
            pass


def this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "parent": os.getppid(), "host": socket.gethostname()}


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether a process may be alive; on another machine, always."""
    if not owner:
        return False
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or an id that is out of range here
        pass
    return True


def _owner(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / OWNER).read_text())
    except (OSError, ValueError):  # no owner, or one killed while writing
        return {}
    is_valid = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and isinstance(owner.get("host"), str)
    return owner if is_valid else {}
