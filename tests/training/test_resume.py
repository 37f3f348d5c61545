"""What is interrupted goes on where it was, to the last digit: after Ctrl-C, after SIGKILL, with a torn checkpoint."""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import OFTEN, SMALL, STUDENT, Started, checkpoints, client, result, the_run


def kill_at(text: str, run: Started) -> None:
    """SIGKILL when it has printed this."""
    run.wait_for(text)
    run.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_it_goes_on_and_does(
    start: Callable[..., Started], whole: dict[str, object], number: signal.Signals, status: int
) -> None:
    run = start(*STUDENT, "train.resume=never")
    run.wait_for("epoch 1/4")
    time.sleep(random.Random(status).uniform(0, 0.5))  # some way into an epoch
    run.send(number)
    sent = time.monotonic()
    assert run.end() == status
    assert time.monotonic() - sent < 40  # an epoch of 200 takes less than a second, the sweep minutes
    assert the_run().info.status == "KILLED"
    assert number.name in the_run().data.tags["kdpipe.reason"]
    (said,) = [line for line in run.output.splitlines() if line.startswith("kdpipe: interrupted by ")]
    again = f"this continues from there: python -m kdpipe {' '.join(STUDENT)}"
    assert said.startswith(f"kdpipe: interrupted by {number.name}; {again}")

    again = start(*STUDENT)
    assert again.end() == 0, again.output
    assert "continues at epoch" in again.output and "epoch 1/4" not in again.output
    assert the_run().info.status == "FINISHED" and "kdpipe.reason" not in the_run().data.tags
    assert result(Path(), the_run()) == whole
    assert not checkpoints()


def killed_until_it_ends(begin: Callable[[], Started], kills: int, draw: random.Random, seconds: float) -> int:
    """SIGKILL after random times, so often, then let it end; how often it was alive when it was killed."""
    survived = 0
    for _ in range(kills):
        run = begin()
        run.process.join(draw.uniform(0, seconds))
        if run.process.exitcode is not None:
            return survived
        run.kill()
        survived += 1
    run = begin()
    assert run.end() == 0, run.output
    return survived


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.faults) for number in range(1, 6))])
def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_been(
    start: Callable[..., Started], whole: dict[str, object], number: int
) -> None:
    often = [OFTEN] if number % 2 else []  # else it goes on at the beginning of an epoch
    kills = killed_until_it_ends(lambda: start(*STUDENT, *often), 6, random.Random(number), seconds=2)
    print(f"{kills} kills survived")
    assert kills > 0
    assert result(Path(), the_run(name="squeezenet1_1_alone_s0")) == whole
    assert the_run(name="squeezenet1_1_alone_s0").info.status == "FINISHED"


def test_inside_an_epoch_only_what_is_missing_is_trained(
    start: Callable[..., Started], whole: dict[str, object]
) -> None:
    run = start(*STUDENT, OFTEN)
    run.wait_for("epoch 1/4")
    while not any(int(file.name[:6]) > 22 for file in checkpoints()):  # 17 steps in an epoch, and its end
        time.sleep(0.01)
    run.kill()
    newest = checkpoints()[-1]
    steps = int(newest.name[:6]) - 1  # a checkpoint for each, and one for the end of the first epoch
    again = start(*STUDENT)
    assert again.end() == 0, again.output
    assert f"continues at epoch {1 + steps // 17} of 4, step {1 + steps % 17}" in again.output
    assert result(Path(), the_run()) == whole


@pytest.mark.parametrize(
    "damage", ["torn", "both", *(pytest.param(damage, marks=pytest.mark.faults) for damage in ("changed", "empty"))]
)
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    start: Callable[..., Started], whole: dict[str, object], damage: str
) -> None:
    kill_at("epoch 3/4", start(*STUDENT))
    before, newest = checkpoints()
    for file in (before, newest) if damage == "both" else (newest,):
        content = file.read_bytes()
        changed = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
        file.write_bytes({"changed": changed, "empty": b""}.get(damage, content[:-1000]))
    again = start(*STUDENT)
    assert again.end() == 0, again.output
    assert f"{newest.name} is torn or damaged" in again.output
    assert ("continues at epoch" in again.output) == (damage != "both")
    assert result(Path(), the_run()) == whole  # no step twice in MLflow, either


def test_a_recipe_of_everything_goes_on_within_an_epoch(start: Callable[..., Started], tmp_path: Path) -> None:
    recipe = [
        *("train.epochs=12", "train.early_stop=1", "train.accumulate=3", "train.ema=0.9", "train.select=ema"),
        *("train.clip_norm=1", "train.mixup=0.2", "loss.label_smoothing=0.1"),
        *("optimizer=adamw", "optimizer.decay_norm_and_bias=false"),
    ]
    folder = tmp_path / "whole"
    folder.mkdir()
    whole = start(*STUDENT, *recipe, folder=folder)
    assert whole.end() == 0, whole.output
    run = start(*STUDENT, *recipe, OFTEN)
    run.wait_for("epoch 1/12")
    while not any(
        int(file.name[:6]) > 9 for file in checkpoints()
    ):  # 6 steps of up to 3 batches in an epoch, and its end
        time.sleep(0.01)
    run.kill()
    again = start(*STUDENT, *recipe)
    assert again.end() == 0, again.output
    assert re.search("continues at epoch 2 of 12, step (4|7|10|13|16)\n", again.output), again.output
    assert result(Path(), the_run()) == result(folder, the_run(folder))
    stopped = the_run().data.metrics["train/last_epoch"]
    assert stopped < 12 and f"stopped after epoch {stopped:.0f} of 12" in again.output


def test_a_second_ctrl_c_stops_at_once(start: Callable[..., Started]) -> None:
    # A step that takes long: all the images in one batch, enlarged.
    long = [*STUDENT, "train.batch_size=323", "model.image_size=160", "train.epochs=1000"]
    run = start(*long)
    run.wait_for("10 classes")
    while not list(Path("outputs/runs").glob("*/config.yaml")):
        time.sleep(0.02)
    time.sleep(1)
    run.send(signal.SIGINT)
    run.wait_for("Ctrl-C again stops at once")
    run.send(signal.SIGINT)
    assert run.end() == 130
    assert "kdpipe: stopped; this continues from the last checkpoint" in run.output
    assert not checkpoints()
    assert the_run().info.status == "KILLED"


def test_resume_never_begins_anew(start: Callable[..., Started], whole: dict[str, object]) -> None:
    kill_at("epoch 2/4", start(*STUDENT))
    again = start(*STUDENT, "train.resume=never")
    assert again.end() == 0, again.output
    assert "epoch 1/4" in again.output
    experiment = client().get_experiment_by_name("kdpipe").experiment_id
    runs = client().search_runs([experiment], order_by=["attributes.start_time ASC"])
    assert [run.info.status for run in runs] == ["KILLED", "FINISHED"]
    assert result(Path(), runs[1]) == whole


def test_an_interrupted_run_that_trains_anew_goes_on_and_is_not_taken_for_the_earlier_one(
    start: Callable[..., Started], whole: dict[str, object]
) -> None:
    assert start(*STUDENT).end() == 0
    again = start(*STUDENT, "train.resume=never")
    again.wait_for("epoch 2/4")
    again.send(signal.SIGTERM)
    assert again.end() == 143
    assert "train.resume" not in again.output.splitlines()[-1]
    rest = start(*STUDENT)
    assert rest.end() == 0, rest.output
    assert "continues at epoch" in rest.output
    experiment = client().get_experiment_by_name("kdpipe").experiment_id
    runs = client().search_runs([experiment], order_by=["attributes.start_time ASC"])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert result(Path(), runs[1]) == whole


def test_a_head_on_a_frozen_backbone_goes_on_whatever_is_cached(start: Callable[..., Started]) -> None:
    head = [*STUDENT, "model=resnet20", "~model.weights", "+model.weights=null", "model.freeze=backbone"]
    head = [word for word in head if "squeezenet" not in word and "model.weights" not in word]
    kill_at("epoch 2/300", start(*head, "train.epochs=300", "augmentation=none"))
    rest = start(*head, "train.epochs=300", "augmentation=none", "distillation.cache_max_gb=0")
    rest.wait_for("continues at epoch")
    kill_at("/300  loss", rest)


def test_in_another_store_the_run_goes_on_and_that_store_gets_all_of_it(
    start: Callable[..., Started], whole: dict[str, object], tmp_path: Path
) -> None:
    kill_at("epoch 2/4", start(*STUDENT))
    Path("outputs/mlflow.db").rename("outputs/lost.db")
    again = start(*STUDENT)
    assert again.end() == 0, again.output
    assert "epoch 1/4" not in again.output
    assert result(Path(), the_run()) == whole


def test_a_run_whose_process_is_gone_is_put_right_by_the_next_command(
    start: Callable[..., Started], kdpipe: Callable
) -> None:
    kill_at("epoch 1/4", start(*STUDENT))
    assert the_run().info.status == "RUNNING"
    outcome = kdpipe(*SMALL, "experiment=student", "train.epochs=0")
    assert outcome.status == 0, outcome.errors
    assert the_run(name="squeezenet1_1_alone_s0").info.status == "KILLED"
    assert the_run(name="squeezenet1_1_alone_s0").data.tags["kdpipe.reason"] == "its process is gone"


TEACHER = [*SMALL, "experiment=teacher", "model=resnet20", "model.depth=8", "train.epochs=1"]
SWEEP = [
    *("experiment=sweep", *SMALL, "model@teacher=resnet20", "teacher.depth=8", "train.epochs=4"),
    *("augmentation=crop_flip", "scheduler=cosine", "loss.alpha=0,0.5", "loss.temperature=2", "seed=0,1"),
]
CELLS = ["a0_s0", "a0_s1", "a0.5_T2_s0", "a0.5_T2_s1"]


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_that_is_killed_at_random_moments_ends_as_if_nothing_had_been(
    start: Callable[..., Started], tmp_path: Path, launcher: str
) -> None:
    sweep = [*SWEEP, f"hydra/launcher={launcher}", OFTEN]
    found = []
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()
        run = start(*TEACHER, folder=folder)
        assert run.end() == 0, run.output
        kills = 0 if folder.name == "whole" else 12
        survived = killed_until_it_ends(
            lambda folder=folder: start(*sweep, folder=folder), kills, random.Random(launcher), seconds=8
        )
        print(f"{survived} kills survived")
        assert bool(survived) == bool(kills)
        found.append({name: result(folder, the_run(folder, name)) for name in CELLS})
    assert found[0] == found[1]


@pytest.mark.faults
def test_ctrl_c_ends_the_workers_of_a_sweep_with_a_checkpoint(start: Callable[..., Started]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert start(*TEACHER).end() == 0
    command = [sys.executable, "-m", "kdpipe", *SWEEP, "train.epochs=200", "hydra/launcher=joblib"]
    with Path("log").open("w") as log:
        sweep = subprocess.Popen(
            command, stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        )
    while len({file.parent for file in checkpoints()}) < 2:
        assert sweep.poll() is None, Path("log").read_text()
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)  # to one of them, as `kill` would
    sent = time.monotonic()
    assert sweep.wait(60) == 130, Path("log").read_text()
    assert time.monotonic() - sent < 10
    told = Path("log").read_text()
    assert "this continues from there: python -m kdpipe experiment=sweep" in told and "Traceback" not in told
    statuses = {name: the_run(name=name).info.status for name in CELLS[:2]}
    assert statuses == dict.fromkeys(CELLS[:2], "KILLED")
    reasons = {the_run(name=name).data.tags["kdpipe.reason"] for name in CELLS[:2]}
    assert reasons == {"Interrupted: SIGTERM"}  # they ended by themselves
