"""Runs from the entrypoint, as a user starts them, on real images."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import KEPT
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file

DIGITS = ["dataset=digits", "train.threads=1"]
TEACHER = [*DIGITS, "experiment=teacher", "model=resnet20", "model.depth=8", "train.epochs=2"]
STUDENT = [*DIGITS, "experiment=student", "train.epochs=2"]
DISTILL = [*DIGITS, "experiment=distill", "model@teacher=resnet20", "teacher.depth=8", "train.epochs=2"]


def client() -> MlflowClient:
    return MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")


def runs() -> list[Run]:
    """The runs of the present folder's store, newest first."""
    experiment = client().get_experiment_by_name("kdpipe").experiment_id
    return list(client().search_runs([experiment], order_by=["attributes.start_time DESC"]))


def history(run: Run, metric: str) -> list[float]:
    return [point.value for point in client().get_metric_history(run.info.run_id, metric)]


def epochs(run: Run) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    folder = Path("outputs/runs") / run.data.tags["kdpipe.identity"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "train/images_per_second"} for line in lines]


def test_teacher_student_and_distilled_student(kdpipe: Callable) -> None:
    for overrides in (TEACHER, STUDENT, DISTILL):
        outcome = kdpipe(*overrides)
        assert outcome.status == 0, outcome.errors
    distilled, alone, teacher = runs()

    assert [run.data.tags["kdpipe.stage"] for run in (teacher, alone, distilled)] == ["teacher", "student", "distill"]
    assert [run.info.status for run in runs()] == ["FINISHED"] * 3
    assert distilled.data.tags["kdpipe.teacher_run"] == teacher.info.run_id
    assert f"teacher: run {teacher.info.run_id}" in outcome.output
    assert distilled.info.run_name == "student_cnn_distill_a0.5_T5_s0"

    assert distilled.data.params["loss.alpha"] == "0.5"
    assert distilled.data.params["teacher.name"] == "resnet20"
    assert "teacher.name" not in alone.data.params
    assert not any(key.startswith("tracking.") for key in alone.data.params)

    for metric in ("train/loss", "train/ce", "train/kd", "train/accuracy", "val/accuracy", "val/loss"):
        assert len(history(distilled, metric)) == 2, metric
    for metric in ("test/accuracy", "test/loss", "model/params", "model/size_mb", "teacher/size_mb"):
        assert len(history(distilled, metric)) == 1, metric
    sent = {key: value for line in epochs(distilled) for key, value in line.items() if key != "step"}
    assert {key: distilled.data.metrics[key] for key in sent} == sent

    artifacts = {file.path for file in client().list_artifacts(distilled.info.run_id)}
    assert artifacts == KEPT
    (dataset,) = distilled.inputs.dataset_inputs
    assert dataset.dataset.name == "digits"
    assert dataset.dataset.digest.startswith(distilled.data.tags["kdpipe.data"])


def test_the_same_config_gives_the_same_numbers_to_the_last_digit(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    again = [*DISTILL, "augmentation=crop_flip", "scheduler=cosine", "train.resume=never"]
    first_weights, second_weights, lines = None, None, []
    for _ in range(2):
        kdpipe(*again)
        folder = Path("outputs/runs") / runs()[0].data.tags["kdpipe.identity"]
        first_weights, second_weights = second_weights, load_file(folder / "model.safetensors")
        lines.append(epochs(runs()[0]))
    assert len(runs()) == 3
    assert lines[0] == lines[1]
    assert first_weights
    assert all(torch.equal(first_weights[name], second_weights[name]) for name in first_weights)
    kdpipe(*again, "seed=1")
    assert epochs(runs()[0]) != lines[0]


@pytest.mark.parametrize("head_only", [False, True])
def test_caches_and_shortcuts_do_not_change_the_numbers(kdpipe: Callable, head_only: bool) -> None:
    kdpipe(*TEACHER)
    student = ["model=resnet20", "model.depth=8", "model.freeze=backbone"] if head_only else []
    lines, told = [], []
    for setting in ("outputs=online", "cache_max_gb=0", "outputs=auto", "outputs=cached"):
        outcome = kdpipe(*DISTILL, *student, f"distillation.{setting}", "train.resume=never")
        assert outcome.status == 0, outcome.errors
        before = outcome.output.partition("epoch 1/")[0]
        # The 449 test images are looked at in any case, to hold the teacher against its own run.
        told.append(
            [name for name in ("logits of", "features of") if re.search(f"{name} resnet20 for (?!449 )", before)]
        )
        lines.append(epochs(runs()[0]))
    in_advance = ["logits of", "features of"] if head_only else ["logits of"]
    assert told == [[], ["logits of"], in_advance, in_advance]  # the second only says that they would be too large
    for line in lines[1:]:
        assert line == [pytest.approx(epoch, rel=1e-4) for epoch in lines[0]]


def test_views_whose_answers_are_cached(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    views = [*DISTILL, "augmentation=crop_flip", "distillation.outputs=views", "distillation.views=2"]
    outcome = kdpipe(*views)
    assert outcome.status == 0, outcome.errors
    assert ", 2 views: computed in " in outcome.output
    assert ", 2 views: from the cache" in kdpipe(*views, "seed=1").output
    assert ", 3 views: computed in " in kdpipe(*views, "distillation.views=3").output
    outcome = kdpipe(*views, "seed=2", "distillation.cache_max_gb=0")
    assert outcome.status == 1
    assert "distillation.cache_max_gb=0: logits of resnet20" in outcome.errors


def test_a_teacher_s_file_that_changed_teaches_anew(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    (first,) = Path("outputs/runs").glob("*/model.safetensors")
    kdpipe(*TEACHER, "seed=1")
    second = next(file for file in Path("outputs/runs").glob("*/model.safetensors") if file != first)
    file = Path("teacher.safetensors")
    told = []
    for weights in (first, second):
        file.write_bytes(weights.read_bytes())
        told.append(kdpipe(*DISTILL, f"teacher.weights={file}").output)
    assert all("computed in" in output for output in told)
    assert "this run is already finished" not in told[1]


def test_a_finished_run_is_shown_and_not_repeated(kdpipe: Callable) -> None:
    first = kdpipe(*STUDENT)
    second = kdpipe(*STUDENT, "train.device=cpu")  # where it runs is no part of what it is
    assert len(runs()) == 1
    assert "this run is already finished" in second.output
    accuracy = next(line for line in first.output.splitlines() if "test accuracy" in line)
    assert accuracy.split("]")[1] in second.output
    weights = next(Path("outputs/runs").glob("*/model.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(b"of a later run")
    kdpipe(*STUDENT)
    assert weights.read_bytes() == content
    kdpipe(*STUDENT, "train.resume=never")
    assert len(runs()) == 2


def test_a_teacher_that_saw_the_student_s_test_images_is_not_taken(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    outcome = kdpipe(*DISTILL, "dataset.split_seed=1")
    assert outcome.status == 1
    assert "teacher.weights=auto: no finished teacher run of resnet20" in outcome.errors
    assert "experiment=teacher dataset=digits model=resnet20 model.depth=8 dataset.split_seed=1" in outcome.errors


def test_a_teacher_that_was_never_trained_is_not_taken(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    trained = runs()[0].info.run_id
    kdpipe(*TEACHER, "train.epochs=0")
    assert f"teacher: run {trained}" in kdpipe(*DISTILL).output


def test_another_teacher_makes_another_run(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    kdpipe(*DISTILL)
    kdpipe(*TEACHER, "seed=1")
    kdpipe(*DISTILL)
    newest, teacher, *_ = runs()
    assert newest.data.tags["kdpipe.teacher_run"] == teacher.info.run_id
    assert len(runs()) == 4


def test_alpha_0_is_the_student_alone_and_needs_no_teacher(kdpipe: Callable) -> None:
    kdpipe(*STUDENT)
    outcome = kdpipe(*DISTILL, "loss.alpha=0", "train.resume=never")
    assert outcome.status == 0, outcome.errors
    control, alone = runs()
    assert control.data.tags["kdpipe.stage"] == "student"
    assert epochs(control) == epochs(alone)
    kdpipe(*DISTILL, "loss.alpha=0", "loss.temperature=2", "model@teacher=resnet56")
    assert len(runs()) == 2


def test_0_epochs_only_evaluate(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    weights = f"model.weights=runs:/{runs()[0].info.run_id}"
    kdpipe(*TEACHER, "train.epochs=0", weights)
    evaluated, trained = runs()
    assert "train/loss" not in evaluated.data.metrics
    for metric in ("test/accuracy", "test/loss", "selected/accuracy"):
        assert evaluated.data.metrics[metric] == trained.data.metrics[metric]


def test_the_tutorial_s_protocol_looks_at_the_test_images_each_epoch(kdpipe: Callable) -> None:
    outcome = kdpipe(*DIGITS, "experiment=tutorial_student", "train.epochs=3")
    assert outcome.status == 0, outcome.errors
    (run,) = runs()
    assert len(history(run, "test/accuracy")) == 3
    assert "val/accuracy" not in run.data.metrics
    assert "train.test_each_epoch" in run.data.params


def test_the_best_epoch_by_validation_is_tested_where_asked_for(kdpipe: Callable) -> None:
    # With this learning rate accuracy goes up and down.
    kdpipe(*STUDENT, "train.epochs=6", "optimizer.lr=0.01", "train.select=best")
    (run,) = runs()
    validation = history(run, "val/accuracy")
    assert run.data.metrics["selected/accuracy"] == max(validation)
    assert run.data.metrics["selected/epoch"] == validation.index(max(validation)) + 1
    weights = f"model.weights=outputs/runs/{run.data.tags['kdpipe.identity']}/model.safetensors"
    kdpipe(*STUDENT, "train.epochs=0", weights)
    assert runs()[0].data.metrics["selected/accuracy"] == max(validation)


def test_rare_classes_are_weighed_drawn_and_counted(kdpipe: Callable) -> None:
    balanced = ["dataset.sampler=balanced", "train.select=best", "train.metric=macro_f1"]
    outcome = kdpipe(*STUDENT, *balanced, "train.epochs=3", "optimizer.lr=0.01")
    assert outcome.status == 0, outcome.errors
    (run,) = runs()
    metrics, validation = run.data.metrics, history(run, "val/macro_f1")
    assert metrics["selected/macro_f1"] == max(validation)
    assert metrics["selected/epoch"] == validation.index(max(validation)) + 1
    assert re.search(rf"validation macro F1 +{100 * max(validation):.2f} %", outcome.output)
    assert {"test/balanced_accuracy", "test/macro_f1", "test/macro_f1_last", "val/balanced_accuracy"} <= metrics.keys()

    weights = ["loss.class_weights=[5,1,1,1,1,1,1,1,1,1]", "train.epochs=1"]
    assert kdpipe(*STUDENT, *weights).status == kdpipe(*STUDENT, "train.epochs=1").status == 0
    alike, weighted = (run.data.metrics for run in runs()[:2])
    assert weighted["train/ce"] != alike["train/ce"]
    assert "rare ones count more" in kdpipe(*STUDENT, *balanced, "loss.class_weights=balanced").output


def test_each_selection_also_tests_the_weights_of_the_other(kdpipe: Callable) -> None:
    # In its last epoch the learning rate undoes what was learnt.
    explodes = ["train.epochs=3", "scheduler=multistep", "scheduler.milestones=[2]", "scheduler.gamma=100"]
    for selection in ("best", "last"):
        outcome = kdpipe(*TEACHER, *explodes, f"train.select={selection}")
        assert outcome.status == 0, outcome.errors
    last, best = (run.data.metrics for run in runs())
    assert best["selected/epoch"] < last["selected/epoch"] == 3
    assert best["test/accuracy_last"] == last["test/accuracy"]
    assert last["test/accuracy_best"] == best["test/accuracy"]
    assert last["test/accuracy"] != best["test/accuracy"]


def test_a_frozen_backbone_trains_in_a_run(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    teacher = runs()[0]
    kdpipe(*TEACHER, "model.freeze=backbone", f"model.weights=runs:/{teacher.info.run_id}", "train.epochs=1")
    before, after = (
        load_file(Path("outputs/runs") / run.data.tags["kdpipe.identity"] / "model.safetensors")
        for run in (teacher, runs()[0])
    )
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"linear.weight", "linear.bias"}


def test_a_run_that_breaks_is_marked_failed_with_its_reason(kdpipe: Callable) -> None:
    kdpipe(*STUDENT)
    weights = Path("outputs/runs") / runs()[0].data.tags["kdpipe.identity"] / "model.safetensors"
    weights.unlink()
    (weights / "a folder in its place").mkdir(parents=True)
    outcome = kdpipe(*STUDENT, "train.resume=never")
    assert outcome.status == 1
    assert "model.safetensors" in outcome.errors
    assert runs()[0].info.status == "FAILED"
    assert "directory" in runs()[0].data.tags["kdpipe.reason"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_is_marked_killed(kdpipe: Callable, number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "kdpipe", *STUDENT, "train.epochs=1000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        # It is ignored where tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    while "epoch 1/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode == status
    (run,) = runs()
    assert run.info.status == "KILLED"
    assert run.data.tags["kdpipe.reason"]


def test_a_photo_data_set_runs_from_its_folder(kdpipe: Callable, class_folders: Path) -> None:
    arguments = ["experiment=student", "dataset=image_folder", f"dataset.root={class_folders}", "train.epochs=10"]
    outcome = kdpipe(*arguments, "dataset.test_fraction=0.2", "train.batch_size=8", "train.threads=1")
    assert outcome.status == 0, outcome.errors
    (run,) = runs()
    assert run.data.params["dataset.name"] == "photos"
    assert run.data.metrics["test/accuracy"] > 0.8  # a temple in the sky and a flower among leaves


def test_the_arms_of_one_seed_share_the_student_s_first_weights(kdpipe: Callable) -> None:
    kdpipe(*TEACHER)
    first = [*DIGITS, "train.epochs=0", "model@teacher=resnet20", "teacher.depth=8"]
    weights = []
    for overrides in (["experiment=distill"], ["experiment=student"], ["experiment=student", "seed=1"]):
        kdpipe(*first, *overrides)
        identity = runs()[0].data.tags["kdpipe.identity"]
        weights.append(load_file(Path("outputs/runs") / identity / "model.safetensors"))
    taught, alone, other_seed = weights
    assert all(torch.equal(taught[name], alone[name]) for name in taught)
    assert not any(torch.equal(taught[name], other_seed[name]) for name in taught)


def test_a_diverged_training_is_no_result(kdpipe: Callable) -> None:
    outcome = kdpipe(*STUDENT, "optimizer=sgd", "optimizer.lr=1e9")
    assert outcome.status == 1
    assert "the training has diverged; try a lower optimizer.lr than 1e+09" in outcome.errors
    assert runs()[0].info.status == "FAILED"
