"""The comparison: cells, controls, gains, the verdict, and every format."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdpipe.compare import compare_runs, comparison_table, frames, plots
from kdpipe.compare.__main__ import cli, run_comparison
from kdpipe.compare.cells import Controls, differences, make_cells
from kdpipe.compare.comparison import check_comparable, compare_cells, families, teacher_accuracy
from kdpipe.compare.loading import compare_sweep, select_cells, with_disagreement
from kdpipe.compare.records import REQUIRED
from kdpipe.compare.statistics import interval, share_interval, verdict
from kdpipe.compare.student_summary import summarize_student
from kdpipe.evaluation.figures import as_png
from kdpipe.tracking import RunRecord


def record(stage: str, seed: int, accuracy: float, validation: float | None = None, **params: str) -> RunRecord:
    """A finished run: student_cnn on digits, unless `params` overrides it (model__name for model.name)."""
    settings = {"model.name": "student_cnn", "dataset.name": "digits", "train.epochs": "5"}
    settings["stage"] = "teacher" if stage == "teacher" else "student"
    settings |= {"loss._target_": "kdpipe.losses.CrossEntropy", "seed": str(seed), "train.device": "cpu"}
    if stage == "distill":
        settings |= {"loss._target_": "kdpipe.losses.KD", "loss.alpha": "0.5", "loss.temperature": "4"}
        settings |= {"teacher.name": "resnet20"}
    settings |= {key.replace("__", "."): value for key, value in params.items()}
    metrics = {"test/accuracy": accuracy, "model/size_mb": 0.7, "teacher/size_mb": 1.4}
    if validation is not None:
        metrics["selected/accuracy"] = validation
    return RunRecord(
        id=f"{stage}{seed}",
        name="",
        params=settings,
        metrics=metrics,
        tags={"kdpipe.stage": stage, "kdpipe.data": "abc", "kdpipe.teacher_run": "t" if stage == "distill" else ""},
        ended=0,
        seconds=10,
    )


def teacher_run(run_id: str, **params: str) -> RunRecord:
    """A teacher trained from scratch on the same split, unless `params` overrides it."""
    return record("teacher", 0, 0.95, **{"model__name": "resnet20", "model__weights": "None", **params})


def grid(*, seeds: int = 3, validation: bool = True) -> list[RunRecord]:
    """A student alone and four distilled ones; temperature 2 is best on validation images, 8 on test images."""
    noise = [0.001, -0.002, 0.003, 0.0, -0.001, 0.002]
    runs = [record("student", seed, 0.8 + noise[seed], 0.8) for seed in range(seeds)]
    gains = {
        ("0.5", "2"): (0.04, 0.06),
        ("0.5", "8"): (0.07, 0.03),
        ("0.9", "2"): (0.02, 0.02),
        ("0.9", "8"): (-0.05, 0),
    }
    for (alpha, temperature), (test, val) in gains.items():
        runs += [
            record(
                "distill",
                seed,
                0.8 + test + noise[-1 - seed],
                0.8 + val if validation else None,
                loss__alpha=alpha,
                loss__temperature=temperature,
            )
            for seed in range(seeds)
        ]
    return runs


def test_cell_is_a_configuration_without_its_seed() -> None:
    cells = make_cells(
        [record("student", seed, 0.8, train__device=device) for seed, device in ((0, "cpu"), (1, "cuda"))]
    )
    assert [list(cell.runs) for cell in cells] == [[0, 1]]
    assert cells[0].values("test/accuracy") == {0: 0.8, 1: 0.8}


def test_the_control_has_the_same_class_weights_and_draws_its_images_alike() -> None:
    ways = [{}, {"loss__class_weights": "balanced"}, {"dataset__sampler": "balanced"}]
    alone = [record("student", 0, 0.8, **way) for way in ways]
    taught = [record("distill", 0, 0.9, **way) for way in ways]
    cells = make_cells([*alone, *taught])
    check_comparable(cells)  # in one table, each with its own control
    controls = Controls(cells)
    for cell in cells:
        if cell.stage == "distill":
            control = controls.of(cell)
            assert control is not None and control.first == alone[taught.index(cell.first)]
    # Runs of before have no such settings, those of today have null.
    today = {"loss__class_weights": "None", "dataset__sampler": "None", "train__metric": "accuracy"}
    assert make_cells([record("student", 0, 0.8, **today)])[0].key == make_cells(alone[:1])[0].key


def with_rare_classes(balanced: float, accuracy: float, *args: object, **params: str) -> RunRecord:
    run = record(*args, accuracy, accuracy, **params)
    run.metrics.update({"test/balanced_accuracy": balanced, "selected/balanced_accuracy": balanced})
    return run


def test_another_metric_chooses_and_judges() -> None:
    runs = []
    for seed, noise in enumerate((0.0, 0.002, -0.001)):
        runs.append(with_rare_classes(0.5 + 2 * noise, 0.90, "student", seed))
        runs.append(with_rare_classes(0.7 + noise, 0.88 + noise, "distill", seed, loss__alpha="0.5"))
        runs.append(with_rare_classes(0.4 + noise, 0.93 + noise, "distill", seed, loss__alpha="0.9"))
    by_accuracy = compare_cells(make_cells(runs), teacher_run)
    assert by_accuracy.best is not None and by_accuracy.best.cell.settings["loss.alpha"] == "0.9"
    assert by_accuracy.verdict.startswith("distillation helped: +3.0 points on the test set")
    balanced = compare_cells(make_cells(runs), teacher_run, metric="balanced_accuracy")
    assert balanced.best is not None and balanced.best.cell.settings["loss.alpha"] == "0.5"
    assert balanced.verdict.startswith("distillation helped: +20.0 points of balanced accuracy on the test set")
    assert balanced.notes[0] == "val %, test % and gains are of the balanced accuracy"
    alone = compare_cells(make_cells(runs[::3]), teacher_run, metric="balanced_accuracy")
    assert alone.notes == balanced.notes[:1] and alone.rows[0].test.mean == pytest.approx(0.5, abs=0.01)
    assert "the student's run with the best validation balanced accuracy is distill1 (seed 1)" in balanced.notes
    row = balanced.frame[balanced.frame["loss.alpha"] == 0.5].iloc[0]
    assert row["test_balanced_accuracy"] == pytest.approx(0.7, abs=0.001) and "test_accuracy" not in row
    assert row["test_gain"] == pytest.approx(0.2, abs=0.001)


def test_runs_are_judged_by_the_metric_that_they_were_to_be_chosen_by() -> None:
    def compared(*metrics: str) -> str:
        runs = [with_rare_classes(0.7, 0.9, "student", 0, train__metric=metrics[0])]
        runs += [
            with_rare_classes(0.8, 0.9, "distill", 0, loss__alpha=f"0.{number}", train__metric=metric)
            for number, metric in enumerate(metrics, start=1)
        ]
        return compare_cells(make_cells(runs), teacher_run).metric

    assert compared("balanced_accuracy", "balanced_accuracy") == "balanced_accuracy"
    assert compared("balanced_accuracy", "accuracy") == "accuracy"


def test_newest_run_of_a_seed_counts() -> None:
    (cell,) = make_cells([record("student", 0, 0.9), record("student", 0, 0.1)])
    assert cell.values("test/accuracy") == {0: 0.9}


def test_control_differs_only_in_loss_and_teacher() -> None:
    distilled, alone = record("distill", 0, 0.9), record("student", 0, 0.8)
    teacher = record("teacher", 0, 0.95, model__name="resnet20")
    longer = record("student", 0, 0.85, train__epochs="50")
    cells = make_cells([longer, teacher, alone, distilled])
    assert [cell.stage for cell in cells] == ["teacher", "student", "student", "distill"]
    control = Controls(cells).of(cells[-1])
    assert control is not None
    assert control.first == alone
    assert Controls(make_cells([longer, teacher, distilled])).of(cells[-1]) is None


def test_runs_on_other_images_are_not_controls() -> None:
    distilled, alone = record("distill", 0, 0.9), record("student", 0, 0.8)
    alone.tags["kdpipe.data"] = "other images"
    cells = make_cells([distilled, alone])
    assert Controls(cells).of(cells[-1]) is None


SMOOTHED = {"loss___target_": "kdpipe.losses.LabelSmoothing", "loss__smoothing": "0.1"}
ATTENTION = {"also___target_": "kdpipe.losses.Attention", "also__weight": "1000", "also__ce_weight": "1"}


def test_another_loss_without_a_teacher_is_not_a_control_and_has_its_own_gain() -> None:
    runs = [record("student", seed, 0.8) for seed in (0, 1)]
    smoothed = [record("student", seed, 0.83 + seed / 1000, **SMOOTHED) for seed in (0, 1)]
    distilled = [record("distill", seed, 0.85) for seed in (0, 1)]
    for order in ([*runs, *smoothed, *distilled], [*smoothed, *runs, *distilled]):
        comparison = compare_cells(make_cells(order), teacher_run)
        titles = {row.cell.title: row for row in comparison.rows}
        names = [
            "student_cnn alone",
            "student_cnn LabelSmoothing smoothing 0.1",
            "student_cnn KD alpha 0.5 temperature 4",
        ]
        assert list(titles) == names
        alone, other, best = titles.values()
        assert alone.gain is None
        assert other.gain == interval([0.83 - 0.8, 0.831 - 0.8])
        assert best.gain == interval([0.85 - 0.8, 0.85 - 0.8])
        assert best.control is not None and best.control.first == runs[0]
        assert comparison.best is best
    table = comparison_table.to_text(comparison)
    assert "+3.05 [+2.41, +3.69]" in table and "+5.00" in table

    without_control = compare_cells(make_cells([*smoothed, *distilled]), teacher_run)
    assert without_control.verdict.startswith("cannot tell: the same student alone has not been trained")
    assert [row.control for row in without_control.rows] == [None, None]


def test_student_at_alpha_0_of_any_method_is_a_control() -> None:
    alone = record("student", 0, 0.8, loss___target_="kdpipe.losses.LogitMSE", loss__alpha="0")
    cells = make_cells([alone, record("student", 0, 0.83, **SMOOTHED), record("distill", 0, 0.9)])
    assert [cell.loss for cell in cells] == [
        "CrossEntropy",
        "LabelSmoothing smoothing 0.1",
        "KD alpha 0.5 temperature 4",
    ]
    control = Controls(cells).of(cells[-1])
    assert control is not None and control.first == alone


def test_second_method_is_part_of_the_loss_column() -> None:
    alone, one, two = record("student", 0, 0.8), record("distill", 0, 0.9), record("distill", 0, 0.9, **ATTENTION)
    cells = make_cells([alone, one, two])
    assert cells[-1].loss == "KD alpha 0.5 temperature 4 + Attention weight 1000"
    assert cells[-1].title == "student_cnn KD alpha 0.5 temperature 4 + Attention weight 1000"
    assert differences(cells) == ["", "", ""]
    control = Controls(cells).of(cells[-1])
    assert control is not None and control.first == alone
    weights = compare_cells(cells, teacher_run).frame["also.weight"]
    assert weights.isna().tolist() == [True, True, False] and weights[2] == 1000


def test_runs_from_before_standardized_logits_share_the_cell() -> None:
    before, now = record("distill", 0, 0.9), record("distill", 1, 0.9, loss__standardize="False")
    other = record("distill", 0, 0.9, loss__standardize="True")
    for cells in (make_cells([before, now, other]), make_cells([now, before, other])):
        found = {cell.loss: list(cell.runs) for cell in cells}
        assert found == {"KD alpha 0.5 temperature 4": [0, 1], "KD alpha 0.5 standardize True temperature 4": [0]}


def test_runs_from_before_the_schedulers_moved_share_the_cell() -> None:
    before = record("student", 0, 0.8, scheduler___target_="kdpipe.schedulers.cosine")
    now = record("student", 1, 0.8, scheduler___target_="kdpipe.training.schedules.cosine")
    other = record("student", 1, 0.8, scheduler___target_="kdpipe.training.schedules.constant")
    assert [list(cell.runs) for cell in make_cells([before, now, other])] == [[0, 1], [1]]


def test_other_unlabelled_images_are_another_cell() -> None:
    taught = [record("distill", seed, 0.9, model__stages="['layer1']") for seed in range(3)]
    for run, images in zip(taught, "aab", strict=True):
        run.tags["kdpipe.unlabelled"] = images
    cells = make_cells(taught)
    assert sorted(len(cell.runs) for cell in cells) == [1, 2]
    alone = make_cells([record("student", seed, 0.8) for seed in (0, 1)])
    assert Controls(alone).of(cells[0]) is alone[0]  # whatever stages the loss reads


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
def test_verdict_is_one_of_four(gains: list[float], word: str) -> None:
    assert verdict(interval(gains)).startswith(f"{word}:")


def test_interval_is_student_s_t() -> None:
    gains = [0.021, 0.034, 0.029, 0.017, 0.031]
    half = stats.t.ppf(0.975, 4) * np.std(gains, ddof=1) / np.sqrt(5)
    low, high = 100 * (np.mean(gains) - half), 100 * (np.mean(gains) + half)
    assert verdict(interval(gains)) == (
        f"distillation helped: +2.6 points on the test set (95 % interval {low:.1f} to {high:.1f}, 5 seeds)"
    )


SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=6)


@settings(deadline=None)
@given(SHARES)
def test_interval_of_accuracies_stays_within_0_and_100_percent(accuracies: list[float]) -> None:
    found = share_interval(accuracies)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(accuracies))
    if found.low is None or found.high is None:
        assert max(accuracies) - min(accuracies) < 1e-9
    else:
        assert 0 <= found.low <= found.mean + 1e-12 and found.mean - 1e-12 <= found.high <= 1


@settings(deadline=None)
@given(SHARES)
def test_interval_of_errors_mirrors_that_of_accuracies(accuracies: list[float]) -> None:
    right, wrong = share_interval(accuracies), share_interval([1 - value for value in accuracies])
    assert right is not None and wrong is not None
    assert right.ends == pytest.approx([1 - end for end in reversed(wrong.ends)], abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_interval_of_gains_stays_within_100_points(gains: list[float]) -> None:
    found = interval(gains)
    assert found is not None and all(-1 <= bound <= 1 for bound in found.ends)


def test_interval_of_many_close_accuracies_is_student_s_t() -> None:
    accuracies = np.random.default_rng(0).normal(0.7, 0.004, 10)
    half = stats.t.ppf(0.975, 9) * np.std(accuracies, ddof=1) / np.sqrt(10)
    found = share_interval(list(accuracies))
    assert found is not None
    assert found.ends == pytest.approx([np.mean(accuracies) - half, np.mean(accuracies) + half], abs=1e-4)


@pytest.mark.parametrize(
    ("accuracies", "text"),
    [
        ([0.54], "54.00"),
        ([0.5, 0.58], "54.00 [13.17, 90.08]"),  # Student's t: 3.18 to 104.82
        ([1.0, 0.98], "99.00 [0.03, 100.00]"),
        ([1.0, 1.0, 1.0], "100.00 [no spread]"),
        ([0.61, 0.61], "61.00 [no spread]"),
    ],
)
def test_few_seeds_are_not_certainty(accuracies: list[float], text: str) -> None:
    runs = [
        record(stage, seed, accuracy, accuracy)
        for stage in ("student", "distill")
        for seed, accuracy in enumerate(accuracies)
    ]
    comparison = compare_cells(make_cells(runs), teacher_run)
    for texts in comparison_table.row_texts(comparison):
        assert texts["val %"] == texts["test %"] == text
    steps = {seed: [(epoch, accuracy) for epoch in (1, 2)] for seed, accuracy in enumerate(accuracies)}
    curves = plots.curves({"student alone": steps})
    assert curves is not None
    has_band = bool(curves.axes[0].collections[0].get_paths())
    assert has_band == ("," in text)
    for figure in (curves, plots.pareto(comparison)):
        assert figure is not None
        low, high = figure.axes[0].get_ylim()
        assert -5 < low < high < 105


def test_no_evidence_names_the_smallest_detectable_gain() -> None:
    gains = [0.02, -0.02, 0.01]
    least = 100 * stats.t.ppf(0.975, 2) * np.std(gains, ddof=1) / np.sqrt(3)
    assert f"a mean gain counts from {least:.1f} points on" in verdict(interval(gains))
    shifted = [gain - np.mean(gains) + 1.01 * least / 100 for gain in gains]
    assert verdict(interval(shifted)).startswith("distillation helped")


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_negated_gains_mirror_the_verdict(gains: list[float]) -> None:
    mirror = {"distillation helped": "distillation hurt", "distillation hurt": "distillation helped"}
    word = verdict(interval(gains)).split(":")[0]
    assert verdict(interval([-gain for gain in gains])).split(":")[0] == mirror.get(word, word)


def test_best_cell_is_chosen_on_validation_images_and_reported_on_test_images() -> None:
    comparison = compare_cells(make_cells(grid()), teacher_run)
    assert comparison.best is not None
    params = comparison.best.cell.first.params
    assert (params["loss.alpha"], params["loss.temperature"]) == ("0.5", "2")
    assert comparison.verdict.startswith("distillation helped: +4.0 points on the test set")
    assert comparison.notes[0] == "the best of 4 cells was chosen on validation images"
    assert "flatters" in comparison.notes[1]


def test_notes_name_the_run_with_the_best_validation_accuracy() -> None:
    runs = [record("student", seed, 0.8, 0.8) for seed in (0, 1)]
    runs += [record("distill", 0, 0.9, 0.80), record("distill", 1, 0.7, 0.85)]
    comparison = compare_cells(make_cells(runs), teacher_run)
    assert comparison.notes[-1] == "the student's run with the best validation accuracy is distill1 (seed 1)"
    assert json.loads(frames.to_json([comparison]))[0]["run"] == "distill1"


def test_without_a_validation_split_the_best_cell_is_chosen_on_test_images() -> None:
    comparison = compare_cells(make_cells(grid(validation=False)), teacher_run)
    assert comparison.best is not None
    assert comparison.best.cell.first.params["loss.temperature"] == "8"
    assert comparison.notes[0].startswith("the best of 4 cells was chosen on test images")


def test_gain_is_paired_by_seed() -> None:
    alone = [record("student", seed, accuracy) for seed, accuracy in ((0, 0.5), (1, 0.7), (2, 0.9))]
    distilled = [record("distill", seed, accuracy) for seed, accuracy in ((0, 0.52), (1, 0.73), (2, 0.925), (3, 0.1))]
    best = compare_cells(make_cells([*alone, *distilled]), teacher_run).best
    assert best is not None
    assert best.gain == interval([0.52 - 0.5, 0.73 - 0.7, 0.925 - 0.9])
    assert best.test is not None
    assert best.gain.half_width < 0.02 < best.test.half_width
    assert best.test.high is not None and best.test.high < 1


def test_verdict_rests_on_the_confirmation_seeds() -> None:
    runs = grid(seeds=3)
    later = [record("student", seed, 0.8) for seed in (3, 4)]
    later += [record("distill", seed, 0.79 + seed / 100000, loss__temperature="2") for seed in (3, 4)]
    comparison = compare_cells(make_cells([*runs, *later]), teacher_run, confirm=[3, 4])
    assert comparison.confirmed is not None
    assert list(comparison.confirmed.cell.runs) == [3, 4]
    assert comparison.best is not None
    assert list(comparison.best.cell.runs) == [0, 1, 2]
    assert comparison.verdict.startswith("distillation hurt: −1.0 points")
    assert "the verdict rests on seeds that the choice did not see: 3, 4" in comparison.notes


def test_student_alone_may_come_from_elsewhere_in_the_experiment() -> None:
    distilled = [run for run in grid() if run.tags["kdpipe.stage"] == "distill"]
    alone = [run for run in grid() if run.tags["kdpipe.stage"] == "student"]
    without = compare_cells(make_cells(distilled), teacher_run)
    assert without.verdict.startswith("cannot tell: the same student alone has not")
    comparison = compare_cells(make_cells(distilled), teacher_run, controls=make_cells(alone))
    assert comparison.verdict.startswith("distillation helped")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, ""),
        ({"model__weights": "imagenet"}, ""),
        (
            {"model__weights": "/there/published.th"},
            "from /there/published.th: it may have been trained",
        ),
        ({"dataset__val_fraction": "0"}, "trained with dataset.val_fraction=0 instead of 0.1"),
        ({"images": "others"}, "the teacher was trained on other images than these"),
    ],
)
def test_notes_warn_of_a_teacher_that_may_have_seen_validation_images(params: dict[str, str], expected: str) -> None:
    split = {"dataset__val_fraction": "0.1"}
    runs = [record("distill", 0, 0.9, 0.9, **split), record("student", 0, 0.8, 0.8, **split)]

    def get_run(run_id: str) -> RunRecord | None:
        if run_id != "t":
            return None
        teacher = teacher_run(run_id, **{**split, **params})
        teacher.tags["kdpipe.data"] = params.get("images", "abc")
        return teacher

    notes = " ".join(compare_cells(make_cells(runs), get_run).notes)
    assert (expected in notes) if expected else ("validation images" not in notes)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"dataset__name": "cifar10"}, "differ in their data set, dataset.name is cifar10, digits"),
        ({"train__epochs": "50"}, "differ in their budget, train.epochs is 5, 50"),
        ({"teacher__name": "resnet56"}, "differ in their teacher, teacher.name is resnet20, resnet56"),
    ],
)
def test_runs_of_different_data_budgets_or_teachers_are_refused(other: dict[str, str], expected: str) -> None:
    cells = make_cells([*grid(), record("distill", 0, 0.9, **other), record("student", 0, 0.9, **other)])
    with pytest.raises(ValueError, match=expected):
        check_comparable(cells)
    assert len(families(cells, one_teacher=True)) == 2
    for family in families(cells, one_teacher=True):
        check_comparable(family)


def test_advice_for_refused_runs_works() -> None:
    other = record("distill", 0, 0.9)
    other.tags["kdpipe.teacher_run"] = "another"
    cells = make_cells([*grid(), other])
    with pytest.raises(ValueError, match=r"loss\.alpha=0\.9: no finished run has all of these values"):
        select_cells(cells[1:], {"kdpipe.teacher_run": "another", "loss.alpha": "0.9"})


def test_every_cell_is_in_a_family() -> None:
    elsewhere = record("student", 0, 0.9, dataset__name="cifar10")
    cells = make_cells([*grid(), elsewhere, record("teacher", 0, 0.9)])
    assert {id(cell) for family in families(cells, one_teacher=True) for cell in family} == set(map(id, cells))


def test_student_alone_that_starts_a_chain_has_one_row() -> None:
    runs = [record("student", 0, 0.8), record("distill", 0, 0.85), replace(record("distill", 0, 0.9), id="last")]
    for run, teacher in zip(runs, ("", "student0", "distill0"), strict=True):
        run.tags.update({"kdpipe.sweep": "abc", "kdpipe.teacher_run": teacher})
    tracker = SimpleNamespace(
        find_sweep=lambda sweep: SimpleNamespace(tags={"kdpipe.links": "3"}),
        finished_runs=lambda: runs,
        get_run={run.id: run for run in runs}.get,
    )
    (comparison,) = compare_sweep(tracker, "abc")
    assert [row.cell.first for row in comparison.rows] == runs
    assert comparison.best is comparison.rows[-1]


def test_extra_seeds_do_not_make_a_cell_the_best() -> None:
    more = record("distill", 3, 0.7, 0.7, loss__alpha="0.9", loss__temperature="8")
    few = record("distill", 0, 0.99, 0.99, loss__alpha="0.9", loss__temperature="3")
    comparison = compare_cells(make_cells([*grid(), more, few]), teacher_run)
    assert comparison.best is not None
    params = comparison.best.cell.first.params
    assert (params["loss.alpha"], params["loss.temperature"]) == ("0.5", "2")
    assert comparison.notes[0] == "the best of 4 cells was chosen on validation images"
    assert "cells without all of the seeds 0, 1, 2 were left out of the choice: 1" in comparison.notes


def test_overwritten_teacher_weights_make_another_cell() -> None:
    runs = [record("distill", seed, 0.9) for seed in (0, 1)]
    for run, digest in zip(runs, ("first", "second"), strict=True):
        run.tags["kdpipe.inputs"] = f"images-student-{digest}"
    assert len(make_cells(runs)) == 2


def test_a_thousand_runs_can_be_compared() -> None:
    runs = [record("student", seed, 0.8) for seed in range(2)]
    for number in range(500):
        runs += [record("distill", seed, 0.8, 0.8, loss__temperature=str(number + 1)) for seed in range(2)]
    comparison = compare_cells(make_cells(runs), teacher_run)
    assert len(comparison.rows) == 501
    assert comparison_table.to_text(comparison).count("KD alpha") > 500
    description = comparison_table.to_markdown([comparison])
    assert len(description) < 8000
    assert description.endswith("the rest is in comparison.txt among the artifacts")


def test_each_format_has_every_row(tmp_path: Path) -> None:
    comparison = compare_cells(make_cells(grid()), teacher_run)
    rows = list(csv.DictReader(io.StringIO(frames.to_csv([comparison]))))
    assert [row["remark"] for row in rows] == ["", "best", "", "", ""]
    (described,) = json.loads(frames.to_json([comparison]))
    assert described["verdict"] == "distillation helped"
    assert [row["test_accuracy"] for row in described["rows"]] == pytest.approx(
        [float(row["test_accuracy"]) for row in rows]
    )
    assert described["gain"] == pytest.approx(0.04, abs=0.01)
    drawn = {"heatmap.png": comparison_table.Picture(b"a picture", "What <it> shows")}
    page = comparison_table.to_html("<sweep>", [comparison], [drawn])
    assert "&lt;sweep&gt;" in page
    assert "<figcaption>What &lt;it&gt; shows</figcaption>" in page
    assert page.count("<tr") == 6 + 4  # the rows, and the student summary
    assert "http" not in page  # self-contained
    assert comparison_table.to_markdown([comparison]).count("KD alpha") == 4
    assert "| student distilled |  84.0" in comparison_table.to_markdown([comparison])
    assert comparison_table.to_text(comparison).count("← best") == 1


def test_heatmap_shows_each_gain_with_its_spread_and_marks_those_that_include_0() -> None:
    comparison = compare_cells(make_cells(grid()), teacher_run)
    figure = plots.heatmap(comparison)
    assert figure is not None
    validation, test = (axis for axis in figure.axes if axis.get_title())
    texts = {text.get_text() for text in test.texts}
    assert len(texts) == 4
    assert any(text.startswith("+4.0 ± ") for text in texts)
    assert all("∘" in text.get_text() for text in validation.texts)  # same gain for each seed: no spread
    assert not any("∘" in text for text in texts)
    assert plots.heatmap(compare_cells(make_cells([record("distill", 0, 0.9)]), teacher_run)) is None


def test_plots_can_be_saved_as_png() -> None:
    comparison = compare_cells(make_cells(grid()), teacher_run)
    steps = {seed: [(epoch, 0.5 + epoch / 100 + seed / 1000) for epoch in (1, 2, 3)] for seed in (0, 1)}
    for figure in (plots.pareto(comparison), plots.curves({"student alone": steps, "student distilled": steps})):
        assert figure is not None
        assert as_png(figure).startswith(b"\x89PNG")
    assert plots.curves({"student alone": {0: [(1, 0.5)]}}) is None


HERE, ELSEWHERE = "cpu (2 threads), float32, on here", "cpu (8 threads), float32, on elsewhere"


def timed(run: RunRecord, milliseconds: float, teacher: float | None = None, where: str = HERE) -> RunRecord:
    """The run with latencies of its network and of its teacher, if any."""
    run.tags["kdpipe.timed_on"] = where
    run.metrics["model/latency_ms_1_thread"] = milliseconds
    if teacher:
        run.metrics["teacher/latency_ms_1_thread"] = teacher
        run.metrics["speedup/latency_1_thread"] = teacher / milliseconds
    return run


def measured() -> list[RunRecord]:
    """A teacher, a student alone and a distilled one, three seeds each, with every metric."""
    taught = replace(timed(teacher_run("t"), 8), id="t")
    taught.metrics.update({"model/size_mb": 1.4, "test/ece": 0.5})
    alone = [timed(record("student", seed, 0.80 + seed / 100), time) for seed, time in enumerate((2.2, 2.0, 90))]
    distilled = [
        timed(record("distill", seed, 0.83 + seed / 100), time, 4 * time) for seed, time in enumerate((2.1, 2.3, 9))
    ]
    for run in (*alone, *distilled):
        run.metrics.update({"test/ece": 0.03, "test/loss": 0.4, "model/flops": 26.3e6, "model/images_per_second": 3000})
    for run in distilled:
        run.metrics.update({"teacher/accuracy": 0.96, "teacher/ece": 0.02, "teacher/loss": 0.2, "teacher/flops": 126e6})
        run.metrics.update({"teacher/images_per_second": 900})
    return [taught, *alone, *distilled]


def test_summary_compares_quality_and_cost_of_student_and_teacher() -> None:
    comparison = compare_cells(make_cells(measured()), teacher_run)
    summary = summarize_student(comparison)
    assert summary is not None
    assert [dict(zip(summary.headings, row, strict=True)) for row in summary.rows] == [
        {
            **{"": "teacher resnet20", "test %": "96.00", "ECE %": "2.00", "loss": "0.200", "MB": "1.400"},
            **{"MFLOPs": "126.0", "ms": "9.2", "images/s": "900"},
            **{"smaller than teacher": "", "faster than teacher": ""},
        },
        *(
            {
                **{"": f"student {name}", "test %": test, "ECE %": "3.00", "loss": "0.400", "MB": "0.700"},
                **{"MFLOPs": "26.3", "ms": "2.3", "images/s": "3,000"},
                **{"smaller than teacher": "50.0 %", "faster than teacher": "4.00 ×"},
            }
            for name, test in (("alone", "81.00"), ("distilled", "84.00"))
        ),
    ]
    assert summary.notes[-1] == f"ms for one image on one thread, images/s 64 at a time on all, timed on {HERE}"
    text = comparison_table.to_text(comparison)
    assert max(map(len, text.partition("\n\n")[2].splitlines()[:7])) < 131
    assert "\n\nstudent_cnn KD alpha 0.5 temperature 4, 3 seeds\n" in text


def test_summary_leaves_out_columns_without_values() -> None:
    summary = summarize_student(compare_cells(make_cells(grid()), teacher_run))
    assert summary is not None
    assert summary.headings == ["", "test %", "MB", "smaller than teacher"]
    assert summary.notes == []
    two_students = [record("distill", 0, 0.9), record("student", 0, 0.8)]
    two_students[0].tags["kdpipe.teacher_run"] = ""
    two_students[0].metrics.update({"teacher/accuracy": 0.5, "speedup/latency": 1.0})
    comparison = compare_cells(make_cells(two_students), teacher_run)
    summary = summarize_student(comparison)
    assert summary is not None and comparison.teacher_accuracy is None
    assert summary.headings == ["", "test %", "MB"]
    assert [name for name, *_ in summary.rows] == ["student alone", "student distilled"]
    assert "best/speedup" not in frames.best_metrics(comparison)


def test_summary_says_if_the_student_is_larger_or_slower() -> None:
    runs = measured()
    for run in runs[4:]:
        run.metrics.update({"model/size_mb": 2.0, "speedup/latency_1_thread": 0.5})
    summary = summarize_student(compare_cells(make_cells(runs), teacher_run))
    assert summary is not None
    assert summary.rows[-1][-2:] == ["it is larger", "it is slower (0.50 ×)"]


def test_teacher_accuracy_comes_from_the_runs_of_its_students() -> None:
    runs = [record("distill", seed, 0.9, teacher__members="2") for seed in (0, 1)]
    assert teacher_accuracy(make_cells(runs)[0], teacher_run) is None  # an ensemble, not measured by early versions
    for run, accuracy in zip(runs, (0.90, 0.92), strict=True):
        run.metrics["teacher/accuracy"] = accuracy
    assert teacher_accuracy(make_cells(runs)[0], teacher_run) == pytest.approx(0.91)


def test_frame_has_every_metric_and_the_sweep_those_of_the_best_cell() -> None:
    comparison = compare_cells(make_cells(measured()), teacher_run)
    teacher, alone, distilled = comparison.frame.to_dict("records")
    assert distilled["test/ece"] == pytest.approx(0.03)
    assert distilled["model/latency_ms_1_thread"] == 2.3  # the median
    assert math.isnan(alone["teacher/flops"]) and teacher["timed_on"] == HERE
    (*_, line) = csv.DictReader(io.StringIO(frames.to_csv([comparison])))
    assert float(line["speedup/latency_1_thread"]) == pytest.approx(4)
    metrics = frames.best_metrics(comparison)
    assert metrics["best/speedup"] == pytest.approx(4)
    assert metrics["best/ece"] == pytest.approx(0.03)
    assert metrics["best/latency_ms"] == 2.3


def test_one_latency_for_each_network_and_the_teacher_s_from_its_students_runs() -> None:
    elsewhere = [record("distill", seed, 0.8, loss__alpha="0.9") for seed in range(3)]
    runs = [*measured(), *(timed(run, 0.1, 0.2, where=ELSEWHERE) for run in elsewhere)]
    points = {point.name: point for point in plots.points_of(compare_cells(make_cells(runs), teacher_run))}
    one = np.median([2.1, 2.3, 9])  # of the runs that timed it together with its teacher
    assert points["student_cnn alone"].costs == {"size": pytest.approx(0.7), "latency": pytest.approx(one)}
    decisive = points["student_cnn KD alpha 0.5 temperature 4"]
    assert decisive.is_decisive and decisive.costs["latency"] == pytest.approx(one)
    assert points["student_cnn KD alpha 0.9 temperature 4"].costs["latency"] == pytest.approx(one)
    assert points["resnet20 teacher"].costs == {"size": 1.4, "latency": pytest.approx(np.median([8.4, 9.2, 36]))}


def test_a_network_s_time_is_one_figure_everywhere() -> None:
    """The students alone were timed while the machine was busy, and another cell on another machine."""
    runs = [timed(record("student", seed, 0.80 + seed / 100), 52 + seed) for seed in range(3)]
    runs += [timed(record("distill", seed, 0.83 + seed / 100), 12 + seed, 48) for seed in range(3)]
    runs += [timed(record("distill", seed, 0.81, loss__alpha="0.9"), 30, 90) for seed in range(3)]
    runs += [timed(record("distill", 0, 0.8, loss__alpha="0.8"), 3, 9, where=ELSEWHERE)]
    comparison = compare_cells(make_cells(runs), teacher_run)
    student, teacher = (f"{np.median(times):.3g}" for times in ([12, 13, 14, 30, 30, 30], [48, 48, 48, 90, 90, 90]))
    summary = summarize_student(comparison)
    assert summary is not None
    column = summary.headings.index("ms")
    assert [row[column] for row in summary.rows] == [teacher, student, student]
    in_the_picture = {point.name: f"{point.costs['latency']:.3g}" for point in plots.points_of(comparison)}
    assert in_the_picture.pop("resnet20 teacher") == teacher
    assert set(in_the_picture.values()) == {student}
    assert {f"{value:.3g}" for value in comparison.frame["model/latency_ms_1_thread"]} == {student}
    assert set(comparison.frame["timed_on"]) == {HERE}
    assert f"{frames.best_metrics(comparison)['best/latency_ms']:.3g}" == student
    page = comparison_table.to_html("", [comparison], [{}])
    assert f">{student}</td>" in page and ">52</td>" not in page


def test_teacher_without_its_own_run_is_a_point_too() -> None:
    points = plots.points_of(compare_cells(make_cells(measured()[1:]), lambda run_id: None))
    assert points[0].name == "resnet20 teacher"
    assert points[0].accuracy.mean == pytest.approx(0.96)
    assert points[0].costs["latency"] == pytest.approx(9.2)
    # A teacher from an earlier epoch is a point next to the final weights of its run.
    runs = measured()
    for run in runs[4:]:
        run.params["teacher.weights"] = "runs:/t/epoch_1"
    points = plots.points_of(compare_cells(make_cells(runs), teacher_run))
    assert [point.accuracy.mean for point in points[:2]] == pytest.approx([0.96, 0.95])


def test_points_with_the_same_title_say_how_they_differ() -> None:
    runs = [record("distill", 0, 0.9, optimizer__lr=rate) for rate in ("0.1", "0.2")]
    names = {point.name for point in plots.points_of(compare_cells(make_cells(runs), lambda run_id: None))}
    assert names == {f"student_cnn KD alpha 0.5 temperature 4 (optimizer.lr={rate})" for rate in ("0.1", "0.2")}


def test_decisive_points_use_the_verdict_s_seeds() -> None:
    later = [record("student", seed, 0.70) for seed in (3, 4)]
    later += [record("distill", seed, 0.75, loss__temperature="2") for seed in (3, 4)]
    points = plots.points_of(compare_cells(make_cells([*grid(), *later]), teacher_run, confirm=[3, 4]))
    assert len(points) == 6  # with the teacher
    means = {point.name: point.accuracy.mean for point in points}
    assert means["student_cnn alone"] == pytest.approx(0.70)
    (decisive,) = (point for point in points if point.is_decisive)
    assert decisive.accuracy.mean == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("places", "front"),
    [
        ([(1, 50), (2, 60), (3, 55), (4, 70)], [0, 1, 3]),
        ([(1, 50), (1, 60), (2, 60)], [1]),
        ([(3, 90)], [0]),
    ],
)
def test_pareto_front(places: list[tuple[float, float]], front: list[int]) -> None:
    assert plots.front_of(places) == front


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_points_off_the_pareto_front_are_beaten(places: list[tuple[int, int]]) -> None:
    front = [places[number] for number in plots.front_of(places)]
    for cost, accuracy in places:
        beaten = any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in front)
        assert beaten != ((cost, accuracy) in front)


def test_pareto_leaves_out_empty_panels_and_numbers_of_many_points() -> None:
    figure = plots.pareto(compare_cells(make_cells(measured()), teacher_run))
    assert figure is not None
    size, latency = figure.axes
    assert "timed on cpu (2 threads)" in latency.get_xlabel()
    assert sorted(text.get_text() for text in size.texts) == ["1", "2", "3"]
    figure = plots.pareto(compare_cells(make_cells(grid()), teacher_run))
    assert figure is not None and len(figure.axes) == 1
    many = [record("distill", 0, 0.8 + step / 1000, loss__temperature=str(step + 1)) for step in range(20)]
    figure = plots.pareto(compare_cells(make_cells([*many, record("student", 0, 0.7)]), teacher_run))
    assert figure is not None and not figure.axes[0].texts
    assert len(figure.legends[0].get_texts()) < 7
    assert plots.pareto(compare_cells(make_cells([record("student", 0, 0.7)]), teacher_run)) is None


def test_overlapping_points_are_drawn_side_by_side() -> None:
    places = [(0.0, 0.0, -5.0, 5.0), (0.0, 6.0, 6.0, 6.0), (0.0, 90.0, 80.0, 99.0), (1.0, 3.0, 3.0, 3.0)]
    moved = plots.side_by_side([*places, (0.0, 20.0, 4.0, 36.0)], 10)
    assert moved[0] == moved[2] == 0
    first, second, _, fourth = (place[0] + aside for place, aside in zip(places, moved[:4], strict=True))
    assert min(abs(first - second), abs(first - fourth), abs(second - fourth)) >= 10
    assert abs(moved[4]) == 5  # two bars


def predictions(right: str, first: int = 0) -> bytes:
    """predictions.csv: an image for each digit, right for 1, of a class with a comma and quotes in its name."""
    lines = [f'{first + number},"a ""cat"", tabby",' for number in range(len(right))]
    texts = {"1": '"a ""cat"", tabby",0.9', "0": "dog,0.6"}
    return "\n".join(["image,label,answer,probability", *map(str.__add__, lines, map(texts.get, right))]).encode()


class FakeStore:
    """A store with some artifacts, which remembers the runs it was asked for."""

    def __init__(self, files: dict[tuple[str, str], bytes]) -> None:
        self.files, self.asked = files, list[str]()

    def read(self, run_id: str, name: str) -> bytes | None:
        self.asked.append(run_id)
        return self.files.get((run_id, name))


def store_with(**files: bytes) -> FakeStore:
    """Predictions by run id."""
    return FakeStore({(run_id, "predictions.csv"): content for run_id, content in files.items()})


def test_disagreement_is_paired_by_seed() -> None:
    comparison = compare_cells(make_cells(measured()), teacher_run)
    store = store_with(
        distill0=predictions("1110000000"),
        student0=predictions("0011000000"),
        distill1=predictions("1111000000"),
        student1=predictions("0001100000"),
        distill2=predictions("1111111111"),
        student2=predictions("0000000000", first=1),  # of other images
    )
    comparison = with_disagreement(comparison, store)
    assert comparison.disagreement is not None
    assert comparison.disagreement.gained == share_interval([0.2, 0.3])
    assert comparison.disagreement.lost == share_interval([0.1, 0.1])
    gain = comparison.disagreement.gain
    assert gain is not None and gain.low is not None and gain.high is not None
    low, high = 100 * gain.low, 100 * gain.high
    assert comparison_table.disagreement_sentence(comparison) == [
        "of the test images the distilled student gets 25.0 % [1.1, 90.8] right that the student alone got wrong, "
        "and 10.0 % [no spread] the other way round (on 2 of 3 seeds)",
        "with an interval that also covers the sampling of the 10 test images, "
        f"the gain is +15.00 [{low:+.2f}, {high:+.2f}] points",
    ]
    sentence, _ = comparison_table.disagreement_sentence(comparison)
    (described,) = json.loads(frames.to_json([comparison]))
    assert described["gained_images"] == pytest.approx(0.25)
    assert described["lost_images_low"] is None
    assert sentence in comparison_table.to_text(comparison)
    assert sentence in comparison_table.to_html("", [comparison], [{}])
    assert f"- {sentence}" in comparison_table.to_markdown([comparison])
    assert frames.best_metrics(comparison)["best/gained_images"] == pytest.approx(0.25)


def test_only_predictions_of_the_decisive_rows_are_read() -> None:
    store = store_with()
    comparison = with_disagreement(compare_cells(make_cells(grid()), teacher_run), store)
    assert comparison.disagreement is None and comparison_table.disagreement_sentence(comparison) == []
    assert sorted(store.asked) == ["distill0", "distill1", "distill2"]
    store = store_with()
    with_disagreement(compare_cells(make_cells([record("distill", 0, 0.9)]), teacher_run), store)
    assert store.asked == []  # no student alone


@pytest.mark.parametrize("content", [b"", b"image,label\n1,2", b"image,label,answer\n1", b"\xff"])
def test_unreadable_predictions_are_left_out(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    comparison = compare_cells(make_cells(measured()), teacher_run)
    whole = {f"{arm}{seed}": predictions("10") for arm in ("distill", "student") for seed in range(3)}
    comparison = with_disagreement(comparison, store_with(**{**whole, "student1": content}))
    assert comparison.disagreement is not None and comparison.disagreement.gained.number == 2
    assert "run student1: predictions.csv: expected columns image, label, answer" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("", "No columns"),
        ("a,b\n1,2\n", "it has no column run_id, seconds, params.seed"),
        (f"{','.join(REQUIRED)}\n", "it has no runs"),
        ("a,b\n1,2,3,4\n", "expected a file of kdpipe.compare --format runs"),
    ],
)
def test_what_is_no_file_of_runs_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"--runs {file}: ")) as caught:
        run_comparison(["--runs", str(file)])
    assert said in str(caught.value)


def test_tutorial_end_to_end(
    kdpipe: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["dataset=digits", "train.threads=1", "train.epochs=1", "tracking.experiment=three"]
    common += ["evaluation.timing_seconds=0.01", "evaluation.pictures=true"]
    kdpipe(*common, "experiment=teacher", "model=resnet20", "model.depth=8")
    for experiment in ("student", "distill"):
        kdpipe(*common, f"experiment={experiment}", "model@teacher=resnet20", "teacher.depth=8")
    monkeypatch.setattr(sys, "argv", ["kdpipe-compare", "--experiment", "three"])
    cli()
    text = capsys.readouterr().out
    for row in ("teacher resnet20", "student alone", "student distilled"):
        assert row in text
    assert "verdict: cannot tell: one seed shows nothing" in text
    alone_line, distilled_line = (
        line.split() for line in text.splitlines() if line.startswith(("  student alone", "  student dist"))
    )
    assert len(distilled_line) >= 12  # test, ECE, loss, MB, MFLOPs, ms, images/s, 30.0 %, 3.21 ×
    assert alone_line[5:] == distilled_line[5:]
    gained, lost = map(float, re.findall(r"(\d+\.\d) %(?: right| the other)", text))
    assert gained - lost == pytest.approx(float(distilled_line[2]) - float(alone_line[2]), abs=0.11)

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--format", "json"])
    cli()
    (described,) = json.loads(capsys.readouterr().out)
    teacher, alone, distilled = described["rows"]
    assert described["gained_images"] - described["lost_images"] == pytest.approx(described["gain"])
    assert distilled["speedup/latency_1_thread"] > 0 and "speedup/latency" not in alone
    assert distilled["teacher/ece"] == pytest.approx(teacher["test/ece"])
    assert distilled["model/flops"] == alone["model/flops"]
    assert distilled["timed_on"].startswith("cpu")
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])

    (comparison,) = compare_runs("three")
    assert comparison.verdict == described["sentence"] and comparison.disagreement is not None
    header, *_ = run_comparison(["--experiment", "three", "--format", "csv"]).split("\n")
    assert list(comparison.frame) == header.split(",")
    assert comparison.frame["test_accuracy"].tolist() == [row["test_accuracy"] for row in described["rows"]]

    # The runs in a file, which has no path of this machine, make the same comparison.
    run_comparison(["--experiment", "three", "--format", "runs", "--out", "published"])
    published = Path("published/runs.csv")
    assert str(Path.cwd()) not in published.read_text()
    wide = run_comparison(["--experiment", "three", "--wide"])
    assert run_comparison(["--runs", str(published), "--wide"]) == wide
    table = pd.read_csv(published, dtype=str)
    for column, value in {"metrics.test/accuracy": "high", "right": "449:~~", "seconds": "long"}.items():
        table.assign(**{column: value}).to_csv("damaged.csv", index=False)
        with pytest.raises(ValueError, match=r"^--runs damaged\.csv: a value cannot be read \(.*; expected a file of"):
            run_comparison(["--runs", "damaged.csv"])

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--format", "html", "--out", "there"])
    cli()
    drawn = {"pareto.png", "reliability.png", "confusion.png", "differing.png"}
    assert {file.name for file in Path("there").iterdir()} == {"comparison.html", *drawn}
    page = Path("there/comparison.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("<figcaption>") == 4
    assert "seed 0)" in page and "of the test images the distilled student gets" in page

    kdpipe(*common, "experiment=student", "train.batch_size=50")
    monkeypatch.setattr(sys, "argv", ["kdpipe-compare", "--experiment", "three"])
    with pytest.raises(SystemExit):
        cli()
    assert "train.batch_size is 100, 50: --where train.batch_size=" in capsys.readouterr().err
    for more in (["--where", "train.batch_size=100"], ["--mixed"]):
        monkeypatch.setattr(sys, "argv", ["kdpipe-compare", "--experiment", "three", *more])
        cli()
        assert "verdict: cannot tell: one seed shows nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output-dir", "nowhere"], "nowhere/mlflow.db: MLflow store not found"),
        (["--experiment", "nothing"], "tracking.experiment=nothing: "),
        (["--experiment", "Default"], "no finished run yet"),
        (["--uri", "http://127.0.0.1:9"], "no tracking server answers there"),
        (
            ["--experiment", "Default", "--sweep", "abc"],
            "--sweep abc: not found in Default, which has no",
        ),
        (["--where", "train.epochs"], "--where train.epochs: expected KEY=VALUE"),
        (["--experiment", "Default", "--sweep", "a'b"], "--sweep a'b: not found in Default"),
        (
            ["--where", "train.epochs=1", "--where", "train.epochs=2"],
            "=2: expected one value for each key",
        ),
        (["--out", "a_file"], "--out a_file: this is a file; expected a folder"),
    ],
)
def test_bad_input_ends_in_one_line(
    kdpipe: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["kdpipe-compare", *arguments])
    Path("a_file").touch()
    with pytest.raises(SystemExit) as end:
        cli()
    assert end.value.code == 1
    errors = capsys.readouterr().err
    assert expected in errors
    assert errors.count("\n") == 1
    assert not Path("nowhere").exists()


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, kdpipe.compare; sys.exit(bool({'mlflow', 'torch', 'pandas'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_list_the_settings_in_which_they_differ() -> None:
    cells = make_cells([record("student", 0, 0.8, optimizer__lr=rate) for rate in ("0.001", "0.01")])
    assert differences(cells) == ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    assert differences(cells[:1]) == [""]


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_of_its_tables_breaks(width: int) -> None:
    runs = measured()
    slow = [record("distill", seed, 0.8 + seed / 100, 0.8 + seed / 50, optimizer__lr="0.003") for seed in range(3)]
    two = [record("distill", seed, 0.8 + seed / 99, 0.8 + seed / 50, **ATTENTION) for seed in range(3)]
    for several in ([runs], [runs, slow, two], [grid(seeds=5)]):
        comparison = compare_cells(make_cells([run for some in several for run in some]), teacher_run)
        lines = comparison_table.to_text(comparison, width).partition("verdict:")[0].splitlines()
        tables = [line for line in lines if not line.startswith(("  loss and", "  ms for", "of the test"))]
        assert max(map(len, tables)) <= width
        text = "\n".join(lines)
        assert "gain" in text and "test %" in text and ("← best" in text or "← verdict" in text)
        whole = comparison_table.to_text(comparison, 1000)
        assert "seconds" in whole and "smaller than teacher" in whole and "left out" not in whole
