"""Signals that end a process."""

import os
import signal
from collections.abc import Iterator

import pytest

from kdpipe.system import interruption
from kdpipe.system.interruption import Interrupted, postponed


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The handlers of these tests are gone afterwards."""
    names = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")]
    before = {number: signal.getsignal(number) for number in names}
    yield
    interruption.restore_signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_interrupts_at_the_end_of_a_postponed_block() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interruption.handle_signals()
    steps = []
    with pytest.raises(Interrupted) as caught, postponed():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same again changes nothing
        steps.append("finished")
    assert (steps, caught.value.code, str(caught.value)) == (["finished"], 128 + signal.SIGTERM, "SIGTERM")
    with pytest.raises(Interrupted):
        interruption.raise_if_interrupted()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_replaced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another_library(*_: object) -> None:
        pass

    monkeypatch.setenv("SLURM_JOB_ID", "1")
    signal.signal(signal.SIGUSR1, of_another_library)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interruption.handle_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as with nohup
    assert interruption.previous_handler(signal.SIGUSR1) is of_another_library
    assert interruption.previous_handler(signal.SIGTERM) is None
    interruption.restore_signals()
    assert signal.getsignal(signal.SIGUSR1) is of_another_library
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_that_was_set_in_c_is_replaced_by_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    replace = signal.signal
    # Python's handlers that were set in C before it started are None.
    monkeypatch.setattr(signal, "signal", lambda number, handler: (replace(number, handler), None)[1])
    interruption.handle_signals()
    monkeypatch.undo()
    assert interruption.previous_handler(signal.SIGTERM) is None
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    interruption.restore_signals()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
