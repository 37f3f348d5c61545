"""What jobs report, and how the process that started them shows it."""

import io
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest

from kdpipe.system.progress import IS_OVER, duration, progress, report, report_file, watch

NAMES = ["a0_s0", "a0.5_T2_s0"]
own, details = logging.getLogger("test.sweep"), logging.getLogger("test")


def train(file: Path, accuracy: float) -> None:
    """What a job says."""
    logging.getLogger().setLevel(logging.INFO)
    with report(file, own.name):
        own.info("starts")
        details.info("epoch 1/2  loss 0.5", extra={"share": 0.5})
        details.warning("this is [odd] and 100 % certain")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        own.info("accuracy %.2f %%", accuracy, extra=IS_OVER)


def shown(output: str) -> list[str]:
    return [re.sub(r"^\[[\d:]{8}\] ", "", line) for line in output.splitlines()]


def test_each_line_names_its_job_and_each_end_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [report_file(tmp_path, number) for number in (1, 2)]
    with watch(files, NAMES, [2, 2]), warnings.catch_warnings():
        warnings.simplefilter("always")
        train(files[0], 50)
        files[1].write_text('{"text": "[12:00:00] %s: half a li')  # of a job that is just writing
    lines = shown(capsys.readouterr().out)
    assert lines[:2] == ["[1/2] a0_s0: starts", "[1/2] a0_s0: this is [odd] and 100 % certain"]
    assert lines[2].startswith("[1/2] a0_s0: ") and lines[2].endswith("DeprecationWarning: old")
    assert re.fullmatch(r"\[1/2\] a0_s0: accuracy 50.00 % \(1 of 2 done, a few seconds left\)", lines[3])
    assert len(lines) == 4


def test_the_end_of_all_is_the_end_even_after_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [report_file(tmp_path, number) for number in (1, 2)]
    with pytest.raises(RuntimeError), watch(files, NAMES, [2, 2]):
        train(files[1], 60)
        train(files[0], 50)
        raise RuntimeError
    assert shown(capsys.readouterr().out)[-1].endswith("(2 of 2 done)")


def test_on_a_terminal_there_is_one_bar_for_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    (file,) = files = [report_file(tmp_path, 1)]
    with watch(files, NAMES[:1], [2]):
        train(file, 50)
        with report(file, own.name), progress("epoch 1/2", 100) as bar:  # a job has no bar of its own
            bar.advance(50)
            assert not bar.wants_note()
    assert "all runs" in terminal.getvalue() and "epoch" not in terminal.getvalue()
    assert "accuracy 50.00 % (1 of 1 done)" in terminal.getvalue()


def test_a_job_that_cannot_report_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as in a job
    train(tmp_path / "missing" / "1.jsonl", 50)
    (tmp_path / "1.jsonl").write_text('{"text": "on a full{"text": "[12:00:00] %s: ends", "share": null}\n')
    with watch([tmp_path / "1.jsonl"], NAMES[:1], [2]):
        train(tmp_path / "1.jsonl", 50)
    assert shown(capsys.readouterr().out)[0] == "[1/1] a0_s0: starts"


def test_a_job_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    train(tmp_path / "1.jsonl", 50)
    assert logging.getLogger().handlers == before
    entries = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines()]
    assert [entry["share"] for entry in entries if entry["share"]] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (4200, "70 min"), (7800, "2 h 10 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
