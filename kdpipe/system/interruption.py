"""Ctrl-C, SIGTERM and a cluster's signals end a process after the current step, so that its run can be resumed.

The first signal raises `Interrupted`: at once or, inside `postponed()`, at the end of that block. A second Ctrl-C stops
the process immediately.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

GRACE = 8  # seconds for worker processes to end
_STOPPING = ["SIGINT", "SIGTERM", "SIGHUP"]
_CLUSTER = ["SIGUSR1", "SIGUSR2"]  # which Slurm can send before a job's time is up


class Interrupted(SystemExit):
    """A signal asked the process to end; its run can be resumed. The exit status is the signal's number plus 128."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.code = number, 128 + number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class InterruptedJobError(Exception):
    """A worker of a sweep was interrupted: Interrupted as the process that started the worker sees it."""


StopAfter = Callable[[int, dict[str, float]], bool]  # whether to stop a run after an epoch with these metrics


class StoppedEarlyError(Exception):
    """A run was stopped by who started it; it can be continued.

    Attributes:
        epoch: the last one.
        run_id: of the run in MLflow.
    """

    def __init__(self, epoch: int, run_id: str) -> None:
        super().__init__(epoch, run_id)
        self.epoch, self.run_id = epoch, run_id

    def __str__(self) -> str:
        return f"after epoch {self.epoch}"


class _State:
    """Of this process."""

    received: int | None = None  # the first signal
    postponing = 0  # how many `postponed()` are open
    previous: dict[int, Any] | None = None  # the handlers that ours replaced
    is_worker = False
    workers: Callable[[], list[int]] = list  # ids of the processes that have to end first


def handle_signals(worker: bool = False) -> None:
    """Handle the signals that end a process; only the first call in the main thread has an effect. A `worker` gets run
    after run from another process."""
    if _State.previous is not None or threading.current_thread() is not threading.main_thread():
        return
    _State.received, _State.previous, _State.is_worker = None, {}, worker
    names = _STOPPING + (_CLUSTER if "SLURM_JOB_ID" in os.environ else [])
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        # Signals are ignored on purpose: in the background of a shell, or with nohup.
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous = signal.signal(number, _on_signal)
            # None is a handler that was set in C, which Python cannot set again.
            _State.previous[number] = signal.SIG_DFL if previous is None else previous


def previous_handler(number: int) -> Callable[[int, FrameType | None], Any] | None:
    """Another library's handler that ours replaced, if any."""
    found = (_State.previous or {}).get(number)
    return found if callable(found) and found is not signal.default_int_handler else None


def restore_signals() -> None:
    """Undo `handle_signals`."""
    for number, handler in (_State.previous or {}).items():
        signal.signal(number, handler)
    _State.received = _State.previous = None


def in_worker() -> bool:
    return _State.is_worker


def raise_if_interrupted() -> None:
    """Raise Interrupted if a signal has come: nothing new is to be started."""
    if _State.received is not None:
        raise Interrupted(_State.received)


@contextmanager
def postponed() -> Iterator[None]:
    """Finish this block before a signal ends the process, then raise Interrupted."""
    _State.postponing += 1
    try:
        yield
    except Exception as error:
        if _State.received is not None:  # such as when another process of the same run has ended already
            raise Interrupted(_State.received) from error
        raise
    finally:
        _State.postponing -= 1
    if not _State.postponing:
        raise_if_interrupted()


@contextmanager
def forward_signals(workers: Callable[[], list[int]]) -> Iterator[None]:
    """Forward signals to worker processes, whose ids `workers` returns, within the block, and let them end first."""
    _State.workers = workers
    try:
        yield
    finally:
        _State.workers = list
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    raise_if_interrupted()


def _forward(number: int) -> bool:
    """Ask the workers, if any, to end, and wait for them for a while. Returns whether there are any."""
    workers = _State.workers()
    for process in workers:
        with suppress(OSError):
            os.kill(process, signal.SIGTERM)  # they ignore it if a terminal has sent them one already

    def give_up(*_: object) -> None:
        raise Interrupted(number)

    if workers:
        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, GRACE)
    return bool(workers)


def _on_signal(number: int, frame: FrameType | None) -> None:
    again = _State.received is not None
    if again and number != signal.SIGINT:
        return  # SIGTERM may be sent more than once
    if again:
        raise KeyboardInterrupt
    _State.received = number
    if not _State.postponing and not _forward(number):
        raise Interrupted(number)
    if number == signal.SIGINT:
        # Not print: the signal may have interrupted one.
        os.write(2, b"\nkdpipe: stopping after this step; Ctrl-C again stops at once\n")
