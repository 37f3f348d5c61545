"""Ctrl-C, SIGTERM and a cluster's signals: what is begun is finished first, so that a run can go on from there.

The first one raises `Interrupted`, at once or, inside of `postponed()`, at its end. A second Ctrl-C stops at once.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

GRACE = 8  # seconds for the processes that work for this one
_STOPPING = ["SIGINT", "SIGTERM", "SIGHUP"]
_CLUSTER = ["SIGUSR1", "SIGUSR2"]  # what Slurm is told to send before it takes a job's machine away


class Interrupted(SystemExit):
    """Somebody wants the process to end; what it does can go on later.

    Attributes:
        number: of the signal. The process ends with 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.number,)


class InterruptedJobError(Exception):
    """A worker of a sweep was interrupted: what Interrupted is in the process that shares the work out."""


class _State:
    """Of this process."""

    asked: int | None = None  # the signal that came
    postponing = 0  # how many `postponed()` are open
    before: dict[int, Any] | None = None  # the handlers that ours took the place of
    is_worker = False
    workers: Callable[[], list[int]] = list  # the processes that have to end first


def handle_signals(worker: bool = False) -> None:
    """Take over the signals that end a process, in the main thread of a process, once.

    Args:
        worker: whether the process works for another one, which will ask it for the next run.
    """
    if _State.before is not None or threading.current_thread() is not threading.main_thread():
        return
    _State.asked, _State.before, _State.is_worker = None, {}, worker
    names = _STOPPING + (_CLUSTER if "SLURM_JOB_ID" in os.environ else [])
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        # What is ignored was started so on purpose: in the background of a shell, or with nohup.
        if signal.getsignal(number) is not signal.SIG_IGN:
            _State.before[number] = signal.signal(number, _on_signal)


def handler_before(number: int) -> Callable[[int, FrameType | None], Any] | None:
    """What would have handled a signal, where that is a function of another library."""
    found = (_State.before or {}).get(number)
    return found if callable(found) and found is not signal.default_int_handler else None


def hand_back_signals() -> None:
    """The end of what `handle_signals` began."""
    for number, handler in (_State.before or {}).items():
        signal.signal(number, handler)
    _State.asked = _State.before = None


def in_worker() -> bool:
    return _State.is_worker


def check() -> None:
    """Raise Interrupted where a signal came before: nothing new is begun."""
    if _State.asked is not None:
        raise Interrupted(_State.asked)


@contextmanager
def postponed() -> Iterator[None]:
    """Finish this block before a signal ends the process, then raise Interrupted."""
    _State.postponing += 1
    try:
        yield
    except Exception as error:
        if _State.asked is not None:  # as when another process that shares the work has ended already
            raise Interrupted(_State.asked) from error
        raise
    finally:
        _State.postponing -= 1
    if not _State.postponing:
        check()


@contextmanager
def passed_on(workers: Callable[[], list[int]]) -> Iterator[None]:
    """While others work for this process, let them finish what they have begun before it ends.

    Args:
        workers: gives the numbers of these processes.
    """
    _State.workers = workers
    try:
        yield
    finally:
        _State.workers = list
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    check()


def _pass_on(number: int) -> bool:
    """Whether there are workers; they are told, once, and waited for."""
    workers = _State.workers()
    for process in workers:
        with suppress(OSError):
            os.kill(process, signal.SIGTERM)  # of which they ignore a second one: a terminal may have told them, too
    if workers:
        signal.signal(signal.SIGALRM, lambda *_: _raise(Interrupted(number)))
        signal.setitimer(signal.ITIMER_REAL, GRACE)
    return bool(workers)


def _raise(error: BaseException) -> None:
    raise error


def _on_signal(number: int, frame: FrameType | None) -> None:
    again = _State.asked is not None
    if again and number != signal.SIGINT:
        return  # whoever sends SIGTERM may send it more than once
    if again:
        raise KeyboardInterrupt
    _State.asked = number
    if not _State.postponing and not _pass_on(number):
        raise Interrupted(number)
    if number == signal.SIGINT:
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nkdpipe: stopping after this step; Ctrl-C again stops at once\n")
