"""The comparison: cells, controls, gains and what it dares to say."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdpipe import compare
from kdpipe.compare import control_of, make_cells, verdict
from kdpipe.tracking import RunRecord


def record(stage: str, seed: int, accuracy: float, **params: str) -> RunRecord:
    """A finished run: student_cnn on digits, unless `params` say otherwise (model__name for model.name)."""
    settings = {"model.name": "student_cnn", "dataset.name": "digits", "train.epochs": "5"}
    settings["stage"] = "teacher" if stage == "teacher" else "student"
    settings |= {"loss._target_": "kdpipe.losses.CrossEntropy", "seed": str(seed), "train.device": "cpu"}
    if stage == "distill":
        settings |= {"loss._target_": "kdpipe.losses.KD", "loss.alpha": "0.5", "teacher.name": "resnet20"}
    settings |= {key.replace("__", "."): value for key, value in params.items()}
    return RunRecord(
        id=f"{stage}{seed}",
        name="",
        params=settings,
        metrics={"test/accuracy": accuracy, "model/size_mb": 0.7},
        tags={"kdpipe.stage": stage, "kdpipe.data": "abc", "kdpipe.teacher_run": "t" if stage == "distill" else ""},
        ended=0,
        seconds=10,
    )


def test_a_cell_is_a_configuration_without_its_seed() -> None:
    cells = make_cells(
        [record("student", seed, 0.8, train__device=device) for seed, device in ((0, "cpu"), (1, "cuda"))]
    )
    assert [list(cell.runs) for cell in cells] == [[0, 1]]
    assert cells[0].mean("test/accuracy") == pytest.approx(0.8)


def test_a_seed_that_was_run_twice_counts_once_and_the_newest_counts() -> None:
    (cell,) = make_cells([record("student", 0, 0.9), record("student", 0, 0.1)])
    assert cell.mean("test/accuracy") == 0.9


def test_the_control_has_the_same_settings_but_for_loss_and_teacher() -> None:
    distilled, alone = record("distill", 0, 0.9), record("student", 0, 0.8)
    teacher = record("teacher", 0, 0.95, model__name="resnet20")
    longer = record("student", 0, 0.85, train__epochs="50")
    cells = make_cells([longer, teacher, alone, distilled])
    assert [cell.stage for cell in cells] == ["teacher", "student", "student", "distill"]
    control = control_of(cells[-1], cells)
    assert control is not None
    assert control.first == alone
    assert control_of(cells[-1], make_cells([longer, teacher, distilled])) is None


def test_runs_on_other_images_are_no_control() -> None:
    distilled, alone = record("distill", 0, 0.9), record("student", 0, 0.8)
    alone.tags["kdpipe.data"] = "other images"
    cells = make_cells([distilled, alone])
    assert control_of(cells[-1], cells) is None


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ([], "cannot tell"),
        ([0.1], "cannot tell"),
        ([0.02, 0.03, 0.025], "distillation helped"),
        ([-0.02, -0.03, -0.025], "distillation hurt"),
        ([0.02, -0.02, 0.01], "no evidence"),
        ([0.01, 0.01], "cannot tell"),
        ([0.0, 0.0, 0.0], "cannot tell"),
    ],
)
def test_the_verdict_is_one_of_four(gains: list[float], word: str) -> None:
    assert verdict(gains).startswith(f"{word}:")


def test_the_interval_is_student_s_t() -> None:
    gains = [0.021, 0.034, 0.029, 0.017, 0.031]
    half = stats.t.ppf(0.975, 4) * np.std(gains, ddof=1) / np.sqrt(5)
    low, high = 100 * (np.mean(gains) - half), 100 * (np.mean(gains) + half)
    assert f"+2.6 points on the test set (95 % interval {low:.1f} to {high:.1f} over 5 seeds" in verdict(gains)


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_mirrored_gains_mirror_the_verdict(gains: list[float]) -> None:
    mirror = {"distillation helped": "distillation hurt", "distillation hurt": "distillation helped"}
    word = verdict(gains).split(":")[0]
    assert verdict([-gain for gain in gains]).split(":")[0] == mirror.get(word, word)


def test_the_tutorial_s_last_section(
    kdpipe: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["dataset=digits", "train.threads=1", "train.epochs=1", "tracking.experiment=three"]
    kdpipe(*common, "experiment=teacher", "model=resnet20", "model.depth=8")
    for experiment in ("student", "distill"):
        kdpipe(*common, f"experiment={experiment}", "model@teacher=resnet20", "teacher.depth=8")
    monkeypatch.setattr(sys, "argv", ["kdpipe-compare", "--experiment", "three"])
    compare.cli()
    text = capsys.readouterr().out
    for row in ("teacher resnet20", "student alone", "student distilled"):
        assert row in text
    assert "verdict: cannot tell: one seed shows nothing" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output-dir", "nowhere"], "nowhere/mlflow.db: there is no such MLflow store"),
        (["--experiment", "nothing"], "tracking.experiment=nothing: "),
        (["--experiment", "Default"], "no finished run yet"),
        (["--uri", "http://127.0.0.1:9"], "no tracking server answers there"),
    ],
)
def test_bad_input_ends_in_one_line(
    kdpipe: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["kdpipe-compare", *arguments])
    with pytest.raises(SystemExit) as end:
        compare.cli()
    assert end.value.code == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert not Path("nowhere").exists()


def test_rows_say_in_which_settings_they_differ() -> None:
    cells = make_cells([record("student", 0, 0.8, optimizer__lr=rate) for rate in ("0.001", "0.01")])
    assert [compare.differences(cell, cells) for cell in cells] == ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    assert compare.differences(cells[0], cells[:1]) == ""
