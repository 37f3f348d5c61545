"""A run says what its teacher is worth before it trains a student on it."""

from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

DIGITS = ["dataset=digits", "train.threads=1"]
TEACHER = [*DIGITS, "experiment=teacher", "model=resnet20", "model.depth=8"]
DISTILL = [*DIGITS, "experiment=distill", "model@teacher=resnet20", "teacher.depth=8", "train.epochs=1"]


def newest_run() -> str:
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("kdpipe").experiment_id
    return str(client.search_runs([experiment], order_by=["attributes.start_time DESC"])[0].info.run_id)


def test_what_a_teacher_is_worth_is_said_before_training(kdpipe: Callable) -> None:
    assert kdpipe(*TEACHER, "train.epochs=3").status == 0
    distilled = kdpipe(*DISTILL)
    assert distilled.status == 0, distilled.errors
    before, _, after = distilled.output.partition("epoch 1/1")
    assert "validation images, mean entropy " in before and " nats of 2.30 at T 5" in before
    assert "no-op" not in distilled.output + distilled.errors
    assert after

    low = kdpipe(*DISTILL, "loss.temperature=0.02")
    assert low.status == 0, low.errors
    assert "answers near one-hot (" in low.output.partition("epoch 1/1")[0]
    assert "no better than chance" not in low.output


def test_an_untrained_teacher_draws_a_warning_before_training(kdpipe: Callable) -> None:
    kdpipe(*TEACHER, "train.epochs=0", "seed=1")
    weights = f"teacher.weights=runs:/{newest_run()}"
    for outputs in ("auto", "online"):
        outcome = kdpipe(*DISTILL, weights, f"distillation.outputs={outputs}", "train.resume=never")
        assert outcome.status == 0, outcome.errors
        assert "no better than chance (" in outcome.output.partition("epoch 1/1")[0]


def test_the_runs_of_a_sweep_ask_once_and_each_says_so(kdpipe: Callable) -> None:
    kdpipe(*TEACHER, "train.epochs=0", "seed=1")
    weights = f"teacher.weights=runs:/{newest_run()}"
    outcome = kdpipe("-m", *DISTILL, weights, "loss.alpha=0,0.5", "loss.temperature=2,4", "distillation.outputs=online")
    assert outcome.status == 0, outcome.errors
    assert outcome.output.count("no better than chance (") == 2  # the student alone has no teacher
    assert len(list(Path("outputs/cache/teacher").glob("*/outputs.npy"))) == 2  # the test images' are the other
