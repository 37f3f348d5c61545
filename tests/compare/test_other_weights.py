"""Comparisons of other weights than the runs selected: after an earlier epoch, or the best by validation."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kdpipe.compare import compare_runs
from kdpipe.compare.__main__ import run_comparison
from kdpipe.settings.errors import ConfigError

STUDENT = ["dataset=digits", "train.threads=1", "optimizer.lr=0.01", "model@teacher=student_cnn"]


def accuracies(experiment: str, **weights: object) -> dict[tuple[str, int], float]:
    """The test accuracy by loss and seed."""
    (comparison,) = compare_runs(experiment, **weights)  # type: ignore[arg-type]
    return {
        (row.cell.loss.split()[0], seed): accuracy
        for row in comparison.rows
        if row.cell.stage != "teacher"
        for seed, accuracy in row.cell.values("test/accuracy").items()
    }


def test_other_weights_are_those_of_runs_that_ended_so(kdpipe: Callable) -> None:
    def train(*overrides: str) -> None:
        outcome = kdpipe(*STUDENT, *overrides)
        assert outcome.status == 0, outcome.errors

    train("experiment=teacher", "model=student_cnn", "train.epochs=1", "tracking.experiment=teacher")
    for loss in ("cross_entropy", "kd"):
        one = ["train.test_each_epoch=true", f"loss={loss}"]
        train(*one, "train.epochs=4", "tracking.experiment=long")
        train(*one, "train.epochs=2", "tracking.experiment=short")
        train(*one, "train.epochs=4", "train.select=best", "tracking.experiment=best")

    assert accuracies("long", epoch=2) == accuracies("short") != accuracies("long")
    assert accuracies("long", select="best") == accuracies("best")
    assert accuracies("best", select="last") == accuracies("long") == accuracies("long", select="last", epoch=4)
    assert accuracies("long", epoch=3, select="best") != {}

    # The same from a file, with all that the comparison says beside the accuracies.
    run_comparison(["--experiment", "long", "--format", "runs", "--out", "published"])
    options = ["--epoch", "2", "--sort", "gain", "--wide"]
    text = run_comparison(["--runs", "published/runs.csv", *options])
    assert text == run_comparison(["--experiment", "long", *options])
    assert "· accuracies are those of the selected weights after 2 epochs\n" in text
    assert "the other way round" not in text  # the answers are those of the last weights
    assert {line.split()[-1] for line in text.splitlines() if line.startswith(" student_cnn ")} <= {"–"}

    run_comparison(["--runs", "published/runs.csv", *options, "--format", "html", "--out", "page"])
    assert {"curves.png", "gains.png"} - {file.name for file in Path("page").iterdir()} == {"gains.png"}  # one gain

    with pytest.raises(ConfigError, match=re.escape("--epoch 9: no run tested it")):
        compare_runs("long", epoch=9)
    train("experiment=student", "train.epochs=3", "scheduler=cosine", "tracking.experiment=cosine")
    with pytest.raises(ConfigError, match=r"--epoch 2: no run tested it: they need train.test_each_epoch"):
        compare_runs("cosine", epoch=2)


def test_averaged_weights_are_those_of_runs_that_selected_them(kdpipe: Callable) -> None:
    def train(*overrides: str) -> None:
        outcome = kdpipe(*STUDENT, "loss=cross_entropy", "train.epochs=2", "train.test_each_epoch=true", *overrides)
        assert outcome.status == 0, outcome.errors

    for choice in ("last", "best", "ema"):
        train("train.ema=0.9", f"train.select={choice}", f"tracking.experiment={choice}")
    for choice in ("last", "best", "ema"):
        found = {experiment: accuracies(experiment, select=choice) for experiment in ("last", "best", "ema")}
        assert found["last"] == found["best"] == found["ema"] == accuracies(choice)
    assert accuracies("last", select="ema", epoch=1) == accuracies("ema", epoch=1) != accuracies("ema")

    run_comparison(["--experiment", "last", "--format", "runs", "--out", "published"])
    for more in ([], ["--epoch", "1"]):
        options = ["--select", "ema", *more]
        assert run_comparison(["--runs", "published/runs.csv", *options]) == run_comparison(
            ["--experiment", "last", *options]
        )


def test_a_sweep_has_its_runs_as_they_ended_in_python_too() -> None:
    with pytest.raises(ConfigError, match=r"sweep=x: not with epoch and select"):
        compare_runs("long", "x", epoch=2)


@pytest.mark.parametrize(
    "words", [["--epoch", "0"], ["--epoch", "2", "--sweep", "x"], ["--select", "best", "--format", "runs"]]
)
def test_options_that_do_not_go_together(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=words[0]):
        run_comparison(words)
