"""What the commands on finished runs share."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from itertools import takewhile

import pytest
from helpers import QUICK, Outcome, Taught
from PIL import Image

from kdpipe.runs.command_line import check_flags, run_command
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, PositiveInt


@pytest.mark.parametrize("name", ["compare", "cost", "export", "predict"])
def test_help_does_not_wait_for_slow_imports(name: str) -> None:
    code = f"""
import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_module("kdpipe.{name}", run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
assert not {{"torch", "mlflow", "numpy", "pydantic"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_flags_are_checked_by_type() -> None:
    arguments = argparse.Namespace(top=0, max_loss=1.0)
    check_flags(arguments, max_loss=NonNegative)
    with pytest.raises(ConfigError, match=r"^--top 0: expected a whole number from 1$"):
        check_flags(arguments, max_loss=NonNegative, top=PositiveInt)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("--top", 0, "a whole number from 1"), "--top 0: expected a whole number from 1"),
        (ValueError("two\nlines \x1b[31m"), "two lines �[31m"),
        (TypeError("wrong"), "TypeError: wrong (HYDRA_FULL_ERROR=1 shows the traceback)"),
    ],
)
def test_an_error_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> str:
        raise error

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_command("kdpipe.predict", command)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"kdpipe.predict: {line}\n"


def test_no_line_of_a_table_is_wider_than_the_terminal(
    taught: Taught,
    command: Callable[..., Outcome],
    photo: Callable[..., Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def table_of(name: str, *words: object) -> list[str]:
        outcome = command(name, *words)
        assert outcome.status == 0, outcome.errors
        return list(takewhile(lambda line: line.startswith(" "), outcome.output.splitlines()))

    monkeypatch.setenv("COLUMNS", "80")
    photo(0).save(file := "a_photo_whose_name_is_as_long_as_those_of_a_camera_that_numbers_them.jpg")
    export = ("export", taught.student, *QUICK, "--format", "safetensors", "--out", "exported")
    cost = ("cost", taught.student, "--seconds", "0.01")
    predict = ("predict", taught.student, file, file, "--teacher", taught.teacher, "--top", "3")
    for words in (export, cost, predict):
        table = table_of(*words)
        assert len(table) > 3 and max(map(len, table)) <= 80
    for words in (cost, predict):
        table = table_of(*words, "--wide")
        assert max(map(len, table)) > 80 and "…" not in "".join(table) and "left out" not in "".join(table)
