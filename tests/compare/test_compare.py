"""The comparison: cells, controls, gains and what it dares to say."""

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdpipe.compare import __main__ as command
from kdpipe.compare import plots as pictures
from kdpipe.compare import rendering as formats
from kdpipe.compare.cells import Controls, differences, make_cells
from kdpipe.compare.comparison import accuracy_of_teacher, check_comparable, compare, families
from kdpipe.compare.loading import image_by_image, those
from kdpipe.compare.statistics import interval, verdict
from kdpipe.compare.worth import worth_of
from kdpipe.tracking import RunRecord


def record(stage: str, seed: int, accuracy: float, validation: float | None = None, **params: str) -> RunRecord:
    """A finished run: student_cnn on digits, unless `params` say otherwise (model__name for model.name)."""
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
    """A teacher trained on the same split, from scratch, unless `params` say otherwise."""
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


def test_a_cell_is_a_configuration_without_its_seed() -> None:
    cells = make_cells(
        [record("student", seed, 0.8, train__device=device) for seed, device in ((0, "cpu"), (1, "cuda"))]
    )
    assert [list(cell.runs) for cell in cells] == [[0, 1]]
    assert cells[0].values("test/accuracy") == {0: 0.8, 1: 0.8}


def test_a_seed_that_was_run_twice_counts_once_and_the_newest_counts() -> None:
    (cell,) = make_cells([record("student", 0, 0.9), record("student", 0, 0.1)])
    assert cell.values("test/accuracy") == {0: 0.9}


def test_the_control_has_the_same_settings_but_for_loss_and_teacher() -> None:
    distilled, alone = record("distill", 0, 0.9), record("student", 0, 0.8)
    teacher = record("teacher", 0, 0.95, model__name="resnet20")
    longer = record("student", 0, 0.85, train__epochs="50")
    cells = make_cells([longer, teacher, alone, distilled])
    assert [cell.stage for cell in cells] == ["teacher", "student", "student", "distill"]
    control = Controls(cells).of(cells[-1])
    assert control is not None
    assert control.first == alone
    assert Controls(make_cells([longer, teacher, distilled])).of(cells[-1]) is None


def test_runs_on_other_images_are_no_control() -> None:
    distilled, alone = record("distill", 0, 0.9), record("student", 0, 0.8)
    alone.tags["kdpipe.data"] = "other images"
    cells = make_cells([distilled, alone])
    assert Controls(cells).of(cells[-1]) is None


SMOOTHED = {"loss___target_": "kdpipe.losses.LabelSmoothing", "loss__smoothing": "0.1"}
ATTENTION = {"also___target_": "kdpipe.losses.Attention", "also__weight": "1000", "also__ce_weight": "1"}


def test_another_loss_without_a_teacher_is_no_control_and_has_a_gain_of_its_own() -> None:
    runs = [record("student", seed, 0.8) for seed in (0, 1)]
    smoothed = [record("student", seed, 0.83 + seed / 1000, **SMOOTHED) for seed in (0, 1)]
    distilled = [record("distill", seed, 0.85) for seed in (0, 1)]
    for order in ([*runs, *smoothed, *distilled], [*smoothed, *runs, *distilled]):
        comparison = compare(make_cells(order), teacher_run)
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
    table = formats.as_table(comparison)
    assert "+3.05 [+2.41, +3.69]" in table and "+5.00" in table

    without_control = compare(make_cells([*smoothed, *distilled]), teacher_run)
    assert without_control.verdict.startswith("cannot tell: the same student alone has not been trained")
    assert [row.control for row in without_control.rows] == [None, None]


def test_a_student_alone_may_have_been_trained_at_alpha_0_of_any_method() -> None:
    alone = record("student", 0, 0.8, loss___target_="kdpipe.losses.LogitMSE", loss__alpha="0")
    cells = make_cells([alone, record("student", 0, 0.83, **SMOOTHED), record("distill", 0, 0.9)])
    assert [cell.loss for cell in cells] == [
        "CrossEntropy",
        "LabelSmoothing smoothing 0.1",
        "KD alpha 0.5 temperature 4",
    ]
    control = Controls(cells).of(cells[-1])
    assert control is not None and control.first == alone


def test_a_second_method_is_told_with_the_loss() -> None:
    alone, one, two = record("student", 0, 0.8), record("distill", 0, 0.9), record("distill", 0, 0.9, **ATTENTION)
    cells = make_cells([alone, one, two])
    assert cells[-1].loss == "KD alpha 0.5 temperature 4 + Attention weight 1000"
    assert cells[-1].title == "student_cnn KD alpha 0.5 temperature 4 + Attention weight 1000"
    assert differences(cells) == ["", "", ""]  # it stands in the column of the loss
    control = Controls(cells).of(cells[-1])
    assert control is not None and control.first == alone
    records = formats.as_records(compare(cells, teacher_run))
    assert [line.get("also.weight") for line in records] == [None, None, 1000]


def test_runs_from_before_logits_could_be_standardised_are_of_the_same_cell() -> None:
    before, now = record("distill", 0, 0.9), record("distill", 1, 0.9, loss__standardize="False")
    other = record("distill", 0, 0.9, loss__standardize="True")
    for cells in (make_cells([before, now, other]), make_cells([now, before, other])):
        found = {cell.loss: list(cell.runs) for cell in cells}
        assert found == {"KD alpha 0.5 temperature 4": [0, 1], "KD alpha 0.5 standardize True temperature 4": [0]}


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
    assert verdict(interval(gains)).startswith(f"{word}:")


def test_the_interval_is_student_s_t() -> None:
    gains = [0.021, 0.034, 0.029, 0.017, 0.031]
    half = stats.t.ppf(0.975, 4) * np.std(gains, ddof=1) / np.sqrt(5)
    low, high = 100 * (np.mean(gains) - half), 100 * (np.mean(gains) + half)
    assert verdict(interval(gains)) == (
        f"distillation helped: +2.6 points on the test set (95 % interval {low:.1f} to {high:.1f}, 5 seeds)"
    )


def test_no_evidence_says_which_gain_would_have_been_seen() -> None:
    gains = [0.02, -0.02, 0.01]
    least = 100 * stats.t.ppf(0.975, 2) * np.std(gains, ddof=1) / np.sqrt(3)
    assert verdict(interval(gains)).endswith(f"a mean gain counts from {least:.1f} points on")
    shifted = [gain - np.mean(gains) + 1.01 * least / 100 for gain in gains]
    assert verdict(interval(shifted)).startswith("distillation helped")


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_mirrored_gains_mirror_the_verdict(gains: list[float]) -> None:
    mirror = {"distillation helped": "distillation hurt", "distillation hurt": "distillation helped"}
    word = verdict(interval(gains)).split(":")[0]
    assert verdict(interval([-gain for gain in gains])).split(":")[0] == mirror.get(word, word)


def test_the_best_cell_is_chosen_on_validation_images_and_reported_on_test_images() -> None:
    comparison = compare(make_cells(grid()), teacher_run)
    assert comparison.best is not None
    params = comparison.best.cell.first.params
    assert (params["loss.alpha"], params["loss.temperature"]) == ("0.5", "2")
    assert comparison.verdict.startswith("distillation helped: +4.0 points on the test set")
    assert comparison.notes[0] == "the best of 4 cells was chosen on validation images"
    assert "flatters" in comparison.notes[1]


def test_the_run_that_one_would_use_is_named_and_chosen_on_validation_images() -> None:
    runs = [record("student", seed, 0.8, 0.8) for seed in (0, 1)]
    runs += [record("distill", 0, 0.9, 0.80), record("distill", 1, 0.7, 0.85)]
    comparison = compare(make_cells(runs), teacher_run)
    assert comparison.notes[-1] == "the student's run with the best validation accuracy is distill1 (seed 1)"
    assert json.loads(formats.as_json([comparison]))[0]["run"] == "distill1"


def test_without_a_validation_split_it_says_that_the_choice_was_made_on_test_images() -> None:
    comparison = compare(make_cells(grid(validation=False)), teacher_run)
    assert comparison.best is not None
    assert comparison.best.cell.first.params["loss.temperature"] == "8"
    assert comparison.notes[0].startswith("the best of 4 cells was chosen on test images")


def test_the_gain_is_paired_by_seed() -> None:
    alone = [record("student", seed, accuracy) for seed, accuracy in ((0, 0.5), (1, 0.7), (2, 0.9))]
    distilled = [record("distill", seed, accuracy) for seed, accuracy in ((0, 0.52), (1, 0.73), (2, 0.925), (3, 0.1))]
    best = compare(make_cells([*alone, *distilled]), teacher_run).best
    assert best is not None
    assert best.gain == interval([0.52 - 0.5, 0.73 - 0.7, 0.925 - 0.9])
    assert best.test is not None
    assert best.gain.half_width < 0.02 < best.test.half_width


def test_the_verdict_rests_on_seeds_that_the_choice_did_not_see() -> None:
    runs = grid(seeds=3)
    later = [record("student", seed, 0.8) for seed in (3, 4)]
    later += [record("distill", seed, 0.79 + seed / 100000, loss__temperature="2") for seed in (3, 4)]
    comparison = compare(make_cells([*runs, *later]), teacher_run, confirm=[3, 4])
    assert comparison.confirmed is not None
    assert list(comparison.confirmed.cell.runs) == [3, 4]
    assert comparison.best is not None
    assert list(comparison.best.cell.runs) == [0, 1, 2]
    assert comparison.verdict.startswith("distillation hurt: −1.0 points")
    assert "the verdict rests on seeds that the choice did not see: 3, 4" in comparison.notes


def test_the_student_alone_may_come_from_elsewhere_in_the_experiment() -> None:
    distilled = [run for run in grid() if run.tags["kdpipe.stage"] == "distill"]
    alone = [run for run in grid() if run.tags["kdpipe.stage"] == "student"]
    assert compare(make_cells(distilled), teacher_run).verdict.startswith("cannot tell: the same student alone has not")
    assert compare(make_cells(distilled), teacher_run, controls=make_cells(alone)).verdict.startswith(
        "distillation helped"
    )


@pytest.mark.parametrize(
    ("params", "said"),
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
def test_a_teacher_that_may_know_the_validation_images_is_mentioned(params: dict[str, str], said: str) -> None:
    split = {"dataset__val_fraction": "0.1"}
    runs = [record("distill", 0, 0.9, 0.9, **split), record("student", 0, 0.8, 0.8, **split)]

    def get_run(run_id: str) -> RunRecord | None:
        if run_id != "t":
            return None
        teacher = teacher_run(run_id, **{**split, **params})
        teacher.tags["kdpipe.data"] = params.get("images", "abc")
        return teacher

    notes = " ".join(compare(make_cells(runs), get_run).notes)
    assert (said in notes) if said else ("validation images" not in notes)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"dataset__name": "cifar10"}, "differ in their data set, dataset.name is cifar10, digits"),
        ({"train__epochs": "50"}, "differ in their budget, train.epochs is 5, 50"),
        ({"teacher__name": "resnet56"}, "differ in their teacher, teacher.name is resnet20, resnet56"),
    ],
)
def test_runs_of_different_data_budgets_or_teachers_are_not_compared(other: dict[str, str], said: str) -> None:
    cells = make_cells([*grid(), record("distill", 0, 0.9, **other), record("student", 0, 0.9, **other)])
    with pytest.raises(ValueError, match=said):
        check_comparable(cells)
    assert len(families(cells, one_teacher=True)) == 2
    for family in families(cells, one_teacher=True):
        check_comparable(family)


def test_what_is_advised_for_runs_that_differ_can_be_done() -> None:
    other = record("distill", 0, 0.9)
    other.tags["kdpipe.teacher_run"] = "another"
    cells = make_cells([*grid(), other])
    with pytest.raises(ValueError, match=r"kdpipe\.teacher_run is another, t: --where kdpipe\.teacher_run=") as refused:
        check_comparable(cells)
    assert "differ in their teacher" in str(refused.value)
    check_comparable(those(cells, {"kdpipe.teacher_run": "t"}))
    with pytest.raises(ValueError, match=r"--where train\.epochs=6: no finished run has this value; there is 5"):
        those(cells, {"train.epochs": "6"})
    with pytest.raises(ValueError, match="each row is all of its seeds"):
        those(cells, {"seed": "0"})
    some = those(cells, {"loss.alpha": "0.50"})
    assert {cell.first.params.get("loss.alpha") for cell in some} == {None, "0.5"}  # the student alone stays


def test_no_cell_is_left_out_of_the_families() -> None:
    elsewhere = record("student", 0, 0.9, dataset__name="cifar10")
    cells = make_cells([*grid(), elsewhere, record("teacher", 0, 0.9)])
    assert {id(cell) for family in families(cells, one_teacher=True) for cell in family} == set(map(id, cells))


def test_a_cell_is_not_the_best_for_having_the_most_seeds() -> None:
    more = record("distill", 3, 0.7, 0.7, loss__alpha="0.9", loss__temperature="8")
    few = record("distill", 0, 0.99, 0.99, loss__alpha="0.9", loss__temperature="3")
    comparison = compare(make_cells([*grid(), more, few]), teacher_run)
    assert comparison.best is not None
    params = comparison.best.cell.first.params
    assert (params["loss.alpha"], params["loss.temperature"]) == ("0.5", "2")
    assert comparison.notes[0] == "the best of 4 cells was chosen on validation images"
    assert "cells without all of the seeds 0, 1, 2 were no candidates: 1" in comparison.notes


def test_weights_that_changed_in_their_file_make_another_cell() -> None:
    runs = [record("distill", seed, 0.9) for seed in (0, 1)]
    for run, digest in zip(runs, ("first", "second"), strict=True):
        run.tags["kdpipe.inputs"] = f"images-student-{digest}"
    assert len(make_cells(runs)) == 2


def test_a_thousand_runs_are_compared() -> None:
    runs = [record("student", seed, 0.8) for seed in range(2)]
    for number in range(500):
        runs += [record("distill", seed, 0.8, 0.8, loss__temperature=str(number + 1)) for seed in range(2)]
    comparison = compare(make_cells(runs), teacher_run)
    assert len(comparison.rows) == 501
    assert formats.as_table(comparison).count("KD alpha") > 500
    description = formats.as_markdown([comparison])
    assert len(description) < 8000
    assert description.endswith("the rest is in comparison.txt among the artifacts")


def test_each_format_holds_every_row(tmp_path: Path) -> None:
    comparison = compare(make_cells(grid()), teacher_run)
    rows = list(csv.DictReader(io.StringIO(formats.as_csv([comparison]))))
    assert [row["remark"] for row in rows] == ["", "best", "", "", ""]
    (described,) = json.loads(formats.as_json([comparison]))
    assert described["verdict"] == "distillation helped"
    assert [row["test_accuracy"] for row in described["rows"]] == pytest.approx(
        [float(row["test_accuracy"]) for row in rows]
    )
    assert described["gain"] == pytest.approx(0.04, abs=0.01)
    drawn = {"heatmap.png": formats.Picture(b"a picture", "What <it> shows")}
    page = formats.as_html("<sweep>", [comparison], [drawn])
    assert "&lt;sweep&gt;" in page
    assert "<figcaption>What &lt;it&gt; shows</figcaption>" in page
    assert page.count("<tr") == 6 + 4  # the rows, and the best one beside its teacher
    assert "http" not in page  # nothing from elsewhere
    assert formats.as_markdown([comparison]).count("KD alpha") == 4
    assert "| student distilled | 84.0" in formats.as_markdown([comparison])
    assert formats.as_table(comparison).count("← best") == 1


def test_the_heatmap_has_each_cell_with_its_spread_and_marks_what_includes_0() -> None:
    comparison = compare(make_cells(grid()), teacher_run)
    figure = pictures.heatmap(comparison)
    assert figure is not None
    validation, test = (axis for axis in figure.axes if axis.get_title())
    texts = {text.get_text() for text in test.texts}
    assert len(texts) == 4
    assert any(text.startswith("+4.0 ± ") for text in texts)
    assert all("∘" in text.get_text() for text in validation.texts)  # the same gain for each seed: no spread
    assert not any("∘" in text for text in texts)
    assert pictures.heatmap(compare(make_cells([record("distill", 0, 0.9)]), teacher_run)) is None


def test_pictures_are_pngs() -> None:
    comparison = compare(make_cells(grid()), teacher_run)
    steps = {seed: [(epoch, 0.5 + epoch / 100 + seed / 1000) for epoch in (1, 2, 3)] for seed in (0, 1)}
    for figure in (pictures.pareto(comparison), pictures.curves({"student alone": steps, "student distilled": steps})):
        assert figure is not None
        assert pictures.to_png(figure).startswith(b"\x89PNG")
    assert pictures.curves({"student alone": {0: [(1, 0.5)]}}) is None


HERE, ELSEWHERE = "cpu (2 threads), float32, on here", "cpu (8 threads), float32, on elsewhere"


def timed(run: RunRecord, milliseconds: float, teacher: float | None = None, where: str = HERE) -> RunRecord:
    """The run, with its network timed, and its teacher where there is one."""
    run.tags["kdpipe.timed_on"] = where
    run.metrics["model/latency_ms_1_thread"] = milliseconds
    if teacher:
        run.metrics["teacher/latency_ms_1_thread"] = teacher
        run.metrics["speedup/latency_1_thread"] = teacher / milliseconds
    return run


def measured() -> list[RunRecord]:
    """A teacher, a student alone and a distilled one, three seeds, with all that a run measures."""
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


def test_the_student_stands_beside_its_teacher_with_quality_and_cost() -> None:
    comparison = compare(make_cells(measured()), teacher_run)
    worth = worth_of(comparison)
    assert worth is not None
    assert [dict(zip(worth.titles, row, strict=True)) for row in worth.rows] == [
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
    assert worth.notes[-1] == f"ms for one image on one thread, images/s 64 at a time on all, timed on {HERE}"
    table = formats.student_and_teacher(comparison)
    assert max(map(len, table.splitlines())) < 131
    assert table.startswith("student_cnn KD alpha 0.5 temperature 4, 3 seeds\n")


def test_what_nobody_has_measured_is_no_column() -> None:
    worth = worth_of(compare(make_cells(grid()), teacher_run))
    assert worth is not None
    assert worth.titles == ["", "test %", "MB", "smaller than teacher"]
    assert worth.notes == []
    two_students = [record("distill", 0, 0.9), record("student", 0, 0.8)]
    two_students[0].tags["kdpipe.teacher_run"] = ""
    two_students[0].metrics.update({"teacher/accuracy": 0.5, "speedup/latency": 1.0})
    comparison = compare(make_cells(two_students), teacher_run)
    worth = worth_of(comparison)
    assert worth is not None and comparison.teacher_accuracy is None
    assert worth.titles == ["", "test %", "MB"]
    assert [name for name, *_ in worth.rows] == ["student alone", "student distilled"]
    assert "best/speedup" not in formats.best_metrics(comparison)


def test_a_larger_and_slower_student_is_told_so() -> None:
    runs = measured()
    for run in runs[4:]:
        run.metrics.update({"model/size_mb": 2.0, "speedup/latency_1_thread": 0.5})
    worth = worth_of(compare(make_cells(runs), teacher_run))
    assert worth is not None
    assert worth.rows[-1][-2:] == ["it is larger", "it is slower (0.50 ×)"]


def test_a_teacher_s_accuracy_is_what_its_students_runs_have_measured() -> None:
    runs = [record("distill", seed, 0.9, teacher__members="2") for seed in (0, 1)]
    assert accuracy_of_teacher(make_cells(runs)[0], teacher_run) is None  # an ensemble's, before it was measured
    for run, accuracy in zip(runs, (0.90, 0.92), strict=True):
        run.metrics["teacher/accuracy"] = accuracy
    assert accuracy_of_teacher(make_cells(runs)[0], teacher_run) == pytest.approx(0.91)


def test_programs_are_told_of_every_metric_and_the_sweep_of_the_best() -> None:
    comparison = compare(make_cells(measured()), teacher_run)
    teacher, alone, distilled = formats.as_records(comparison)
    assert distilled["test/ece"] == pytest.approx(0.03)
    assert distilled["model/latency_ms_1_thread"] == 2.3  # the median
    assert "teacher/flops" not in alone and teacher["timed_on"] == HERE
    (*_, line) = csv.DictReader(io.StringIO(formats.as_csv([comparison])))
    assert float(line["speedup/latency_1_thread"]) == pytest.approx(4)
    metrics = formats.best_metrics(comparison)
    assert metrics["best/speedup"] == pytest.approx(4)
    assert metrics["best/ece"] == pytest.approx(0.03)
    assert metrics["best/latency_ms"] == 2.3


def test_the_same_network_has_one_latency_and_a_teacher_that_of_its_students_runs() -> None:
    elsewhere = [record("distill", seed, 0.8, loss__alpha="0.9") for seed in range(3)]
    runs = [*measured(), *(timed(run, 0.1, 0.2, where=ELSEWHERE) for run in elsewhere)]
    points = {point.name: point for point in pictures.points_of(compare(make_cells(runs), teacher_run))}
    one = np.median([2.2, 2.0, 90, 2.1, 2.3, 9])
    assert points["student_cnn alone"].costs == {"size": pytest.approx(0.7), "latency": pytest.approx(one)}
    decisive = points["student_cnn KD alpha 0.5 temperature 4"]
    assert decisive.is_decisive and decisive.costs["latency"] == pytest.approx(one)
    assert points["student_cnn KD alpha 0.9 temperature 4"].costs["latency"] == pytest.approx(one)
    assert points["resnet20 teacher"].costs == {"size": 1.4, "latency": pytest.approx(np.median([8.4, 9.2, 36]))}


def test_a_teacher_without_a_run_of_its_own_is_a_point_too() -> None:
    points = pictures.points_of(compare(make_cells(measured()[1:]), lambda run_id: None))
    assert points[0].name == "resnet20 teacher"
    assert points[0].accuracy.mean == pytest.approx(0.96)
    assert points[0].costs["latency"] == pytest.approx(9.2)
    # That of an earlier epoch stands beside what its run came to.
    runs = measured()
    for run in runs[4:]:
        run.params["teacher.weights"] = "runs:/t/epoch_1"
    points = pictures.points_of(compare(make_cells(runs), teacher_run))
    assert [point.accuracy.mean for point in points[:2]] == pytest.approx([0.96, 0.95])


def test_points_of_one_title_say_in_what_they_differ() -> None:
    runs = [record("distill", 0, 0.9, optimizer__lr=rate) for rate in ("0.1", "0.2")]
    names = {point.name for point in pictures.points_of(compare(make_cells(runs), lambda run_id: None))}
    assert names == {f"student_cnn KD alpha 0.5 temperature 4 (optimizer.lr={rate})" for rate in ("0.1", "0.2")}


def test_points_are_those_of_the_verdict_s_seeds() -> None:
    later = [record("student", seed, 0.70) for seed in (3, 4)]
    later += [record("distill", seed, 0.75, loss__temperature="2") for seed in (3, 4)]
    points = pictures.points_of(compare(make_cells([*grid(), *later]), teacher_run, confirm=[3, 4]))
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
def test_the_pareto_front_is_what_nothing_beats(places: list[tuple[float, float]], front: list[int]) -> None:
    assert pictures.front_of(places) == front


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_off_the_pareto_front_everything_is_beaten(places: list[tuple[int, int]]) -> None:
    front = [places[number] for number in pictures.front_of(places)]
    for cost, accuracy in places:
        beaten = any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in front)
        assert beaten != ((cost, accuracy) in front)


def test_panels_without_values_are_left_out_and_many_points_have_no_numbers() -> None:
    figure = pictures.pareto(compare(make_cells(measured()), teacher_run))
    assert figure is not None
    size, latency = figure.axes
    assert "timed on cpu (2 threads)" in latency.get_xlabel()
    assert sorted(text.get_text() for text in size.texts) == ["1", "2", "3"]
    figure = pictures.pareto(compare(make_cells(grid()), teacher_run))
    assert figure is not None and len(figure.axes) == 1
    many = [record("distill", 0, 0.8 + step / 1000, loss__temperature=str(step + 1)) for step in range(20)]
    figure = pictures.pareto(compare(make_cells([*many, record("student", 0, 0.7)]), teacher_run))
    assert figure is not None and not figure.axes[0].texts
    assert len(figure.legends[0].get_texts()) < 7
    assert pictures.pareto(compare(make_cells([record("student", 0, 0.7)]), teacher_run)) is None


def test_points_that_would_touch_stand_side_by_side() -> None:
    places = [(0.0, 0.0, -5.0, 5.0), (0.0, 6.0, 6.0, 6.0), (0.0, 90.0, 80.0, 99.0), (1.0, 3.0, 3.0, 3.0)]
    moved = pictures.side_by_side([*places, (0.0, 20.0, 4.0, 36.0)], 10)
    assert moved[0] == moved[2] == 0
    first, second, _, fourth = (place[0] + aside for place, aside in zip(places, moved[:4], strict=True))
    assert min(abs(first - second), abs(first - fourth), abs(second - fourth)) >= 10
    assert abs(moved[4]) == 5  # two bars


def answers(right: str, first: int = 0) -> bytes:
    """predictions.csv: an image that is right for each 1, of a class whose name has a comma and a quote."""
    lines = [f'{first + number},"a ""cat"", tabby",' for number in range(len(right))]
    told = {"1": '"a ""cat"", tabby",0.9', "0": "dog,0.6"}
    return "\n".join(["image,label,answer,probability", *map(str.__add__, lines, map(told.get, right))]).encode()


class Kept:
    """The store of an experiment, with what its runs have kept."""

    def __init__(self, files: dict[tuple[str, str], bytes]) -> None:
        self.files, self.asked = files, list[str]()

    def read(self, run_id: str, name: str) -> bytes | None:
        self.asked.append(run_id)
        return self.files.get((run_id, name))


def kept(**predictions: bytes) -> Kept:
    return Kept({(run_id, "predictions.csv"): content for run_id, content in predictions.items()})


def test_what_was_gained_and_lost_image_by_image_is_paired_by_seed() -> None:
    comparison = compare(make_cells(measured()), teacher_run)
    store = kept(
        distill0=answers("1110000000"),
        student0=answers("0011000000"),
        distill1=answers("1111000000"),
        student1=answers("0001100000"),
        distill2=answers("1111111111"),
        student2=answers("0000000000", first=1),  # of other images
    )
    comparison = image_by_image(comparison, store)
    assert comparison.exchange is not None
    assert comparison.exchange.gained == interval([0.2, 0.3])
    assert comparison.exchange.lost == interval([0.1, 0.1])
    assert formats.exchanged(comparison) == [
        "of the test images the distilled student gets 25.0 % [0.0, 88.5] right that the student alone got wrong, "
        "and 10.0 % the other way round (on 2 of 3 seeds)"
    ]
    (sentence,) = formats.exchanged(comparison)
    (described,) = json.loads(formats.as_json([comparison]))
    assert described["gained_images"] == pytest.approx(0.25)
    assert described["lost_images_low"] is None
    assert sentence in formats.as_table(comparison)
    assert sentence in formats.as_html("", [comparison], [{}])
    assert f"- {sentence}" in formats.as_markdown([comparison])
    assert formats.best_metrics(comparison)["best/gained_images"] == pytest.approx(0.25)


def test_only_the_files_of_the_decisive_rows_are_read() -> None:
    store = kept()
    comparison = image_by_image(compare(make_cells(grid()), teacher_run), store)
    assert comparison.exchange is None and formats.exchanged(comparison) == []
    assert sorted(store.asked) == ["distill0", "distill1", "distill2"]
    store = kept()
    image_by_image(compare(make_cells([record("distill", 0, 0.9)]), teacher_run), store)
    assert store.asked == []  # no student alone


@pytest.mark.parametrize("content", [b"", b"image,label\n1,2", b"image,label,answer\n1", b"\xff"])
def test_predictions_that_cannot_be_read_are_left_out(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    comparison = compare(make_cells(measured()), teacher_run)
    whole = {f"{arm}{seed}": answers("10") for arm in ("distill", "student") for seed in range(3)}
    comparison = image_by_image(comparison, kept(**{**whole, "student1": content}))
    assert comparison.exchange is not None and comparison.exchange.gained.number == 2
    assert "run student1: predictions.csv: columns image, label, answer are expected" in caplog.text


def test_the_tutorial_s_last_section(
    kdpipe: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["dataset=digits", "train.threads=1", "train.epochs=1", "tracking.experiment=three"]
    common += ["evaluation.timing_seconds=0.01", "evaluation.pictures=true"]
    kdpipe(*common, "experiment=teacher", "model=resnet20", "model.depth=8")
    for experiment in ("student", "distill"):
        kdpipe(*common, f"experiment={experiment}", "model@teacher=resnet20", "teacher.depth=8")
    monkeypatch.setattr(sys, "argv", ["kdpipe-compare", "--experiment", "three"])
    command.cli()
    text = capsys.readouterr().out
    for row in ("teacher resnet20", "student alone", "student distilled"):
        assert row in text
    assert "verdict: cannot tell: one seed shows nothing" in text
    beside, costs = (
        line.split() for line in text.splitlines() if line.startswith(("  student alone", "  student dist"))
    )
    assert len(costs) >= 12  # test, ECE, loss, MB, MFLOPs, ms, images/s, 30.0 %, 3.21 ×
    assert beside[5:] == costs[5:]
    gained, lost = map(float, re.findall(r"(\d+\.\d) %(?: right| the other)", text))
    assert gained - lost == pytest.approx(float(costs[2]) - float(beside[2]), abs=0.11)

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--format", "json"])
    command.cli()
    (described,) = json.loads(capsys.readouterr().out)
    teacher, alone, distilled = described["rows"]
    assert described["gained_images"] - described["lost_images"] == pytest.approx(described["gain"])
    assert distilled["speedup/latency_1_thread"] > 0 and "speedup/latency" not in alone
    assert distilled["teacher/ece"] == pytest.approx(teacher["test/ece"])
    assert distilled["model/flops"] == alone["model/flops"]
    assert distilled["timed_on"].startswith("cpu")
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--format", "html", "--out", "there"])
    command.cli()
    drawn = {"pareto.png", "reliability.png", "confusion.png", "differing.png"}
    assert {file.name for file in Path("there").iterdir()} == {"comparison.html", *drawn}
    page = Path("there/comparison.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("<figcaption>") == 4
    assert "seed 0)" in page and "of the test images the distilled student gets" in page

    kdpipe(*common, "experiment=student", "train.batch_size=50")
    monkeypatch.setattr(sys, "argv", ["kdpipe-compare", "--experiment", "three"])
    with pytest.raises(SystemExit):
        command.cli()
    assert "train.batch_size is 100, 50: --where train.batch_size=" in capsys.readouterr().err
    for more in (["--where", "train.batch_size=100"], ["--mixed"]):
        monkeypatch.setattr(sys, "argv", ["kdpipe-compare", "--experiment", "three", *more])
        command.cli()
        assert "verdict: cannot tell: one seed shows nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output-dir", "nowhere"], "nowhere/mlflow.db: MLflow store not found"),
        (["--experiment", "nothing"], "tracking.experiment=nothing: "),
        (["--experiment", "Default"], "no finished run yet"),
        (["--uri", "http://127.0.0.1:9"], "no tracking server answers there"),
        (["--experiment", "Default", "--sweep", "abc"], "--sweep abc: there is no such sweep in Default; it has none"),
        (["--where", "train.epochs"], "--where train.epochs: KEY=VALUE is accepted"),
        (["--experiment", "Default", "--sweep", "a'b"], "--sweep a'b: there is no such sweep"),
        (["--where", "train.epochs=1", "--where", "train.epochs=2"], "one value for a key is accepted"),
        (["--out", "a_file"], "--out a_file: a folder is accepted"),
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
    Path("a_file").touch()
    with pytest.raises(SystemExit) as end:
        command.cli()
    assert end.value.code == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert not Path("nowhere").exists()


def test_rows_say_in_which_settings_they_differ() -> None:
    cells = make_cells([record("student", 0, 0.8, optimizer__lr=rate) for rate in ("0.001", "0.01")])
    assert differences(cells) == ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    assert differences(cells[:1]) == [""]
