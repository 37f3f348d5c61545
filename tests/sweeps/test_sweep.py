"""Sweeps: the grid, its parent in MLflow, what is run again and what is not, side by side, and on a cluster."""

import csv
import io
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import assert_refused, free_port, in_a_hurry
from mlflow import MlflowClient
from mlflow.entities import Run

from kdpipe.assembly import devices
from kdpipe.settings.composition import Invocation
from kdpipe.sweeps.grid import GridCell, PlannedRun
from kdpipe.sweeps.sweep import alone, runs_here

SMALL = ["dataset=digits", "dataset.train_fraction=0.2", "train.threads=1", "train.epochs=1"]
TEACHER = [*SMALL, "experiment=teacher", "model=resnet20", "model.depth=8"]
STUDENT = ["model@teacher=resnet20", "teacher.depth=8"]
SWEEP = ["experiment=sweep", *SMALL, *STUDENT, "loss.alpha=0,0.5", "loss.temperature=2,4", "seed=0,1"]
NAMES = ["a0_s0", "a0_s1", "a0.5_T2_s0", "a0.5_T2_s1", "a0.5_T4_s0", "a0.5_T4_s1"]


def runs(uri: str = "") -> dict[str, list[Run]]:
    """The runs of a store by name, the oldest first; of the present folder's, unless another is named."""
    client = MlflowClient(uri or f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("kdpipe")
    if experiment is None:
        return {}
    found: dict[str, list[Run]] = {}
    for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
        found.setdefault(run.info.run_name.partition(" ")[0], []).append(run)
    return found


def artifacts(run: Run) -> set[str]:
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def results(uri: str = "") -> dict[str, dict[str, float]]:
    """The metrics of each run of a sweep by its name, without those that depend on the clock."""
    return {
        name: {key: value for key, value in found[-1].data.metrics.items() if key != "train/images_per_second"}
        for name, found in runs(uri).items()
        if name in NAMES
    }


def in_progress() -> list[Path]:
    """The folders of runs between their first epoch and their end. MLflow knows, too, but may take longer to say so
    than a run takes."""
    folders = [file.parent for file in Path("outputs/runs").glob("*/metrics.jsonl")]
    return [folder for folder in folders if not (folder / "model.safetensors").exists()]


@pytest.fixture
def teacher(kdpipe: Callable) -> Run:
    assert kdpipe(*TEACHER).status == 0
    (run,) = runs()["resnet20_teacher_s0"]
    return run


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "kdpipe", *in_a_hurry(overrides)]


def test_a_sweep_has_one_parent_with_its_summary_and_a_child_for_each_run(kdpipe: Callable, teacher: Run) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a commit"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    outcome = kdpipe(*SWEEP)  # no -m: the experiment is a sweep
    assert outcome.status == 0, outcome.errors
    found = runs()
    (parent,) = found["sweep"]
    children = [found[name][0] for name in NAMES]  # at alpha 0 one run for both temperatures
    assert len(found) == len(NAMES) + 2
    sweep = parent.data.tags["kdpipe.sweep"]
    for child in children:
        assert child.info.status == parent.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["kdpipe.sweep"] == sweep
        assert not any(key.startswith("sweep.") for key in child.data.params)
    stages = [child.data.tags["kdpipe.stage"] for child in children]
    assert stages == ["student", "student", "distill", "distill", "distill", "distill"]
    assert "teacher.name" not in children[0].data.params
    assert children[2].data.tags["kdpipe.teacher_run"] == teacher.info.run_id

    pictures = {"gains.png", "heatmap.png", "pareto.png"}  # of one epoch there is no curve
    assert artifacts(parent) == pictures | {"comparison.txt", "comparison.csv", "comparison.html"}
    assert parent.data.tags["kdpipe.verdict"] in outcome.output
    assert parent.data.tags["kdpipe.verdict"] in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["best/temperature"] in (2, 4)
    assert {run.data.tags["git.commit"] for run in (parent, *children)} == {commit}
    assert f"compare --experiment kdpipe --sweep {sweep}" in outcome.output
    assert outcome.output.count("logits of resnet20 for") == 0  # only where a run starts and ends, and what warns
    lines = [line.partition("] ")[2] for line in outcome.output.splitlines() if re.match(r"\[[\d:]+\] \[\d/6\] ", line)]
    for number, name in enumerate(NAMES, start=1):
        start, *warnings, end = (line for line in lines if line.startswith(f"[{number}/6] {name}: "))
        assert start.endswith(": starts")
        accuracy = 100 * runs()[name][0].data.metrics["selected/accuracy"]
        assert re.search(rf": validation accuracy {accuracy:.2f} % in \d+ s \({number} of 6 done", end)
        assert end.endswith(" left)") == (number < 6)
        assert not [line for line in warnings if "predicts" not in line and "teacher" not in line]
    assert "the trained network predicts" not in re.sub(r"\[\d/6\] .*", "", outcome.output)
    assert not list(Path("outputs/runs").glob(".progress*"))

    logs = "".join(file.read_text() for file in Path("outputs/runs").glob("*/kdpipe.log"))
    assert logs.count("s and cached") == 2  # of the training and of the test images
    # Three times those of the training images; the test images' are looked at before training, and used by each exam.
    assert logs.count("images of digits: from the cache") == 3 + 4


def test_what_is_finished_is_not_run_again_and_the_parent_is_the_same(kdpipe: Callable, teacher: Run) -> None:
    kdpipe(*SWEEP, "seed=0", "loss.temperature=2")
    before = runs()
    again = kdpipe(*SWEEP, "seed=0", "loss.temperature=2")
    assert "2 of 2 runs are finished already" in again.output
    assert {name: len(found) for name, found in runs().items()} == {name: len(found) for name, found in before.items()}

    wider = kdpipe(*SWEEP, "loss.temperature=2")  # another sweep, that shares two runs
    assert "2 of 4 runs are finished already" in wider.output
    shared = runs()["a0_s0"][0].data.tags
    assert len(shared["kdpipe.sweep"].split()) == 2
    assert len(runs()["sweep"]) == 2

    forced = kdpipe(*SWEEP, "seed=0", "loss.temperature=2", "sweep.rerun=true")
    assert "finished already" not in forced.output
    assert len(runs()["a0_s0"]) == len(runs()["a0.5_T2_s0"]) == 2
    assert len(runs()["sweep"]) == 2


@pytest.mark.faults
def test_a_newer_teacher_makes_another_sweep(kdpipe: Callable, teacher: Run) -> None:
    kdpipe(*SWEEP, "seed=0", "loss.temperature=2")
    kdpipe(*TEACHER, "seed=1")
    again = kdpipe(*SWEEP, "seed=0", "loss.temperature=2")
    assert "1 of 2 runs are finished already" in again.output  # the student alone has no teacher
    teachers = [run.data.tags["kdpipe.teacher_run"] for run in runs()["a0.5_T2_s0"]]
    assert teachers == [teacher.info.run_id, runs()["resnet20_teacher_s1"][0].info.run_id]


def test_the_best_cell_is_run_again_on_new_seeds(kdpipe: Callable, teacher: Run) -> None:
    outcome = kdpipe(*SWEEP, "sweep.confirm_seeds=2")
    assert outcome.status == 0, outcome.errors
    (parent,) = runs()["sweep"]
    assert parent.data.tags["kdpipe.confirm_seeds"] == "2 3"
    best = f"a0.5_T{parent.data.metrics['best/temperature']:g}"
    later = {name for name in runs() if name.endswith(("_s2", "_s3"))}
    assert later == {"a0_s2", "a0_s3", f"{best}_s2", f"{best}_s3"}
    assert "the verdict rests on seeds that the choice did not see: 2, 3" in outcome.output
    gains = [
        runs()[f"{best}_s{seed}"][0].data.metrics["test/accuracy"]
        - runs()[f"a0_s{seed}"][0].data.metrics["test/accuracy"]
        for seed in (2, 3)
    ]
    assert parent.data.metrics["best/gain"] == pytest.approx(sum(gains) / 2)

    again = kdpipe(*SWEEP, "sweep.confirm_seeds=1")  # what was confirmed stays out of the choice
    assert again.output.count("finished already") == 2
    assert runs()["sweep"][0].data.tags["kdpipe.confirm_seeds"] == "2 3"
    assert "the verdict rests on seeds that the choice did not see: 2, 3" in again.output


@pytest.mark.parametrize(
    ("loss", "control"),
    [
        (["loss=dkd", "loss.beta=1"], ["loss=cross_entropy"]),
        (["loss.alpha=0.9"], ["loss.alpha=0"]),
    ],
)
def test_a_student_is_confirmed_against_one_with_the_same_class_weights_and_sampler(
    composed: Callable, loss: list[str], control: list[str]
) -> None:
    shared = ["dataset.sampler=balanced", "loss.class_weights=balanced"]
    overrides = [*loss, *shared, "seed=0"]
    invocation = Invocation(overrides, {}, [], "")
    run = PlannedRun("", GridCell(tuple(overrides), composed(*overrides), invocation), {}, "")
    assert alone(run) == [*shared, *control]


@pytest.mark.faults
def test_any_method_is_confirmed_against_the_student_alone(kdpipe: Callable, teacher: Run) -> None:
    """DKD's alpha is no weight against the labels: the student alone is another loss, without the second method."""
    methods = ["loss=dkd", "loss.beta=1,2", "loss@also=logit_mse", "also.alpha=0.5", "seed=0"]
    outcome = kdpipe("-m", *SMALL, *STUDENT, *methods, "sweep.confirm_seeds=1")
    assert outcome.status == 0, outcome.errors
    children = [run for found in runs().values() for run in found if run.data.tags.get("mlflow.parentRunId")]
    distilled = [run for run in children if run.data.tags["kdpipe.stage"] == "distill"]
    (alone,) = (run for run in children if run not in distilled)
    assert [(run.data.params["seed"], run.data.params["loss.beta"]) for run in distilled[:2]] == [
        ("0", "1"),
        ("0", "2"),
    ]
    assert [run.data.params["seed"] for run in (*distilled[2:], alone)] == ["1", "1"]
    assert alone.data.params["loss._target_"] == "kdpipe.losses.CrossEntropy"
    assert not any(key.startswith("also.") for key in alone.data.params)
    assert "the verdict rests on seeds that the choice did not see: 1" in outcome.output
    assert "DKD alpha 1 beta" in outcome.output and "+ LogitMSE alpha 0.5" in outcome.output


def test_a_failing_cell_leaves_the_others_and_the_summary(kdpipe: Callable, teacher: Run) -> None:
    outcome = kdpipe("-m", *SWEEP, "loss.temperature=2", "seed=0", "optimizer=sgd", "optimizer.lr=0.01,1e30")
    assert outcome.status == 1
    (parent,) = runs()["sweep"]
    assert parent.info.status == "FAILED"
    assert "2 of 4 runs failed: lr1e+30_a0_s0, lr1e+30_a0.5_T2_s0 (epoch 1: the loss is " in outcome.errors
    assert outcome.errors.count("\n") == 1
    statuses = [runs()[name][0].info.status for name in ("lr0.01_a0_s0", "lr0.01_a0.5_T2_s0", "lr1e+30_a0.5_T2_s0")]
    assert statuses == ["FINISHED", "FINISHED", "FAILED"]
    rows = list(csv.DictReader(io.StringIO(Path(f"{parent.info.artifact_uri[7:]}/comparison.csv").read_text())))
    assert len(rows) == 3  # teacher, alone, distilled


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.alpha=0,0.5,1.5"], "loss.alpha=1.5: expected a number from 0 to 1"),
        (["loss.temperature=4,0"], "loss.temperature=0: expected a number above 0"),
        (["train.metric=accuracy,macro_f1"], "train.metric=accuracy,macro_f1: expected one value for the whole sweep"),
        (["seed=0,1,0"], "seed=0: it is in the grid twice; expected each value once"),
        (["loss.alpha=0.5,0.50"], "loss.alpha=0.5: it is in the grid twice"),
        (["seed=range(0,0)"], "seed=range(0,0): the grid is empty; expected at least one value"),
        (["loss.alpha=interval(0,1)"], "loss.alpha=interval(0,1): expected a list"),
        (["optimizer=adam,adamm"], "optimizer=adamm: expected one of adafactor, adam, adamw, "),
        (["loss.alfa=0.1,0.2"], "loss.alfa: no such key; did you mean loss.alpha?"),
        (["model=resnet20", "model.image_size=32,0"], "model.image_size=0: "),
        (["tracking.experiment=one,two"], "tracking.experiment=one,two: expected one value for the whole sweep"),
        (["teacher.weights=nowhere.pt"], "teacher.weights=nowhere.pt: file not found"),
        (["sweep.confirm_seeds=-1"], "sweep.confirm_seeds=-1: "),
        (
            ["distillation.outputs=cached", "augmentation=none,crop_flip"],
            "distillation.outputs=cached: augmentation",
        ),
        (["hydra/launcher=nothing"], "hydra/launcher=nothing"),
        (["train.device=gpu"], "train.device=gpu: expected "),
        (["train.device=cuda:99"], "train.device=cuda:99: expected one of auto, "),
        (["sweep.rerun=maybe"], "sweep.rerun=maybe: "),
        (["sweep.confirm_seeds=0,1"], "sweep.confirm_seeds=0,1: expected one value for the whole sweep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_cell_is_named_before_the_first_one_trains(kdpipe: Callable, overrides: list[str], said: str) -> None:
    outcome = kdpipe("-m", *SWEEP, *overrides)
    assert_refused(outcome, said)
    assert not runs()


def test_without_a_teacher_the_sweep_says_how_to_train_one(kdpipe: Callable) -> None:
    outcome = kdpipe(*SWEEP)
    assert outcome.status == 1
    assert "no finished teacher run of resnet20" in outcome.errors
    assert (
        "python -m kdpipe experiment=teacher dataset=digits dataset.train_fraction=0.2 model=resnet20" in outcome.errors
    )


@pytest.mark.faults
def test_two_seeds_of_a_teacher_can_be_an_axis(kdpipe: Callable, teacher: Run) -> None:
    kdpipe(*TEACHER, "seed=1")
    ids = [runs()[f"resnet20_teacher_s{seed}"][0].info.run_id for seed in (0, 1)]
    weights = f"teacher.weights={','.join(f'runs:/{run_id}' for run_id in ids)}"
    outcome = kdpipe("-m", *SMALL, *STUDENT, weights, "loss.alpha=0,0.5", "seed=0")
    assert outcome.status == 0, outcome.errors
    assert "4 cells, 3 runs" in outcome.output
    assert "not the teacher (the rows have different ones)" in outcome.output
    for run_id in ids:
        (run,) = runs()[f"weights{run_id[:8]}_a0.5_T5_s0"]
        assert run.data.tags["kdpipe.teacher_run"] == run_id


@pytest.mark.faults
def test_each_budget_of_a_sweep_has_a_verdict_of_its_own(kdpipe: Callable, teacher: Run) -> None:
    outcome = kdpipe(*SWEEP, "loss.temperature=2", "train.epochs=1,2")
    assert outcome.status == 0, outcome.errors
    (parent,) = runs()["sweep"]
    assert outcome.output.count("verdict: ") == 2
    assert {"1_pareto.png", "2_pareto.png"} <= artifacts(parent)


def test_there_has_to_be_something_to_confirm(kdpipe: Callable) -> None:
    outcome = kdpipe("-m", *SMALL, "experiment=student", "seed=0,1", "sweep.confirm_seeds=2")
    assert outcome.status == 1
    assert "sweep.confirm_seeds=2: the grid has no distilled student to confirm; expected 0" in outcome.errors
    assert not runs()


@pytest.mark.faults
def test_a_lost_process_does_not_end_the_sweep(kdpipe: Callable, teacher: Run) -> None:
    """A worker is killed, as the kernel does when memory runs out: what it and the others had is done all the same."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    longer = [*SWEEP, "train.epochs=10", "hydra/launcher=joblib"]
    with Path("log").open("w") as log:
        sweep = subprocess.Popen(command(*longer), stdout=log, stderr=log)
    while "2 of 6 done" not in Path("log").read_text():
        assert sweep.poll() is None, Path("log").read_text()
        time.sleep(0.05)
    while not (victims := in_progress()):
        assert sweep.poll() is None, Path("log").read_text()
    os.kill(json.loads((victims[0] / "owner.json").read_text())["pid"], signal.SIGKILL)
    assert sweep.wait(timeout=300) == 0, Path("log").read_text()
    assert "a job was lost" in Path("log").read_text()
    assert {name: [run.info.status for run in runs()[name]] for name in NAMES} == {name: ["FINISHED"] for name in NAMES}


@pytest.mark.faults
def test_a_killed_sweep_goes_on_where_it_was(kdpipe: Callable, teacher: Run) -> None:
    """SIGKILL in the middle: what was finished stays, what was running is closed, the parent is the same."""
    longer = [*SWEEP, "train.epochs=5"]
    with Path("log").open("w") as log:
        killed = subprocess.Popen(command(*longer), stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while "[4/6]" not in Path("log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    while not in_progress():
        assert killed.poll() is None, Path("log").read_text()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    open_runs = [name for name in NAMES if name in runs() and runs()[name][0].info.status == "RUNNING"]
    assert len(open_runs) == 1
    finished = [name for name in NAMES if name in runs() and runs()[name][0].info.status == "FINISHED"]
    assert 3 <= len(finished) < 6
    assert runs()["sweep"][0].info.status == "RUNNING"

    outcome = kdpipe(*longer)
    assert outcome.status == 0, outcome.errors
    assert f"{len(finished)} of 6 runs are finished already" in outcome.output
    assert len(runs()["sweep"]) == 1
    assert all([run.info.status for run in found] == ["FINISHED"] for found in runs().values())


@pytest.mark.faults
def test_two_processes_share_a_sweep_and_train_nothing_twice(kdpipe: Callable, teacher: Run) -> None:
    longer = [*SWEEP, "train.epochs=3"]
    logs = [Path("log0"), Path("log1")]
    both = [subprocess.Popen(command(*longer), stdout=log.open("w"), stderr=subprocess.STDOUT) for log in logs]
    assert [process.wait(timeout=300) for process in both] == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert {name: [run.info.status for run in runs()[name]] for name in NAMES} == {name: ["FINISHED"] for name in NAMES}
    assert len(runs()["sweep"]) == 1
    assert all("verdict: " in log.read_text() for log in logs)


def test_a_single_run_that_another_process_has_is_refused(kdpipe: Callable) -> None:
    overrides = [*SMALL, "experiment=student", "train.epochs=500"]
    first = subprocess.Popen(command(*overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(Path("outputs/runs").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        outcome = kdpipe(*overrides)
    finally:
        first.terminate()
        first.wait()
    assert outcome.status == 1
    assert f"process {first.pid} on " in outcome.errors
    assert "has this run in progress" in outcome.errors


@pytest.mark.faults
def test_several_processes_give_the_same_numbers_as_one(kdpipe: Callable, teacher: Run) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    kdpipe(*SWEEP)
    sequential = results()
    side_by_side = [*SWEEP, "sweep.rerun=true", "hydra/launcher=joblib"]
    done = subprocess.run(command(*side_by_side), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr
    assert all(len(found) == 2 for name, found in runs().items() if name in NAMES)
    assert results() == sequential


@pytest.mark.faults
def test_the_threads_are_divided_between_processes(kdpipe: Callable, teacher: Run) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    told = "import torch\ndef augmentation():\n    open('threads', 'a').write(f'{torch.get_num_threads()} ')\n"
    Path("counting.py").write_text(told)
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), environment.get("PYTHONPATH", "")])
    environment["KDPIPE_ALLOW_TARGETS"] = "counting"
    overrides = ["-m", *SMALL, *STUDENT, "train.threads=null", "seed=0,1", "hydra/launcher=joblib"]
    overrides += ["augmentation._target_=counting.augmentation", "train.epochs=0"]
    done = subprocess.run(command(*overrides), check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    assert int(Path("threads").read_text().split()[-1]) == max(cores // 2, 1)


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for _ in range(2):  # as two processes would
        monkeypatch.setattr(devices, "_own_gpu", [])
        taken.append((devices.own_gpu(2, tmp_path), devices._own_gpu))
    assert [number for number, _ in taken] == [0, 1]
    assert devices.own_gpu(2, tmp_path) == 1  # and keeps it for its next run
    monkeypatch.setattr(devices, "_own_gpu", [])
    assert devices.own_gpu(2, tmp_path) == os.getpid() % 2  # more processes than GPUs


@pytest.mark.parametrize(
    ("launcher", "here"),
    [
        ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", True),
        ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", True),
        ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", False),
        ("hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", False),
    ],
)
def test_a_launcher_that_is_not_known_may_use_other_machines(launcher: str, here: bool) -> None:
    assert runs_here(launcher) == here


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slurm on this machine as its only node, for the time of a test."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    path = f"{os.environ['PATH']}:/usr/sbin"
    if not all(shutil.which(program, path=path) for program in ("sbatch", "slurmctld", "slurmd")):
        pytest.skip("Slurm is not installed (apt install slurm-wlm)")
    folder = tmp_path_factory.mktemp("slurm")
    host, user = socket.gethostname().partition(".")[0], pwd.getpwuid(os.getuid()).pw_name
    ports = [free_port(), free_port()]
    (folder / "slurm.conf").write_text(f"""
        ClusterName=one
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={ports[0]}
        SlurmdPort={ports[1]}
        AuthType=auth/none
        CredType=cred/none
        SlurmUser={user}
        SlurmdUser={user}
        StateSaveLocation={folder}
        SlurmdSpoolDir={folder}/spool
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd.pid
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        MpiDefault=none
        NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=1000
        PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
        """)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    daemons = []
    for name in ("slurmctld", "slurmd"):
        with (folder / f"{name}.log").open("w") as log:
            program = shutil.which(name, path=path)
            daemons.append(subprocess.Popen([str(program), "-D"], stdout=log, stderr=log))
        time.sleep(1)
    try:
        for _ in range(40):
            asked = ["sinfo", "--noheader", "--format=%T"]
            if "idle" in subprocess.run(asked, capture_output=True, text=True, check=False).stdout:
                break
            time.sleep(0.5)
        else:
            pytest.fail("".join(file.read_text() for file in folder.glob("*.log")))
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


@pytest.mark.faults
def test_slurm_and_a_server_give_the_same_numbers_as_one_process(kdpipe: Callable, slurm: None, server: str) -> None:
    store = f"tracking.uri={server}"
    kdpipe(*TEACHER, store)
    few = [*SWEEP, "loss.temperature=2", "seed=0", store]
    kdpipe(*few)
    sequential = results(server)
    on_cluster = [*few, "sweep.rerun=true", "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1"]
    done = subprocess.run(command(*on_cluster), check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(len(runs(server)[name]) == 2 for name in ("a0_s0", "a0.5_T2_s0"))
    assert results(server) == sequential
    assert f"{server}/#/compare-runs?runs=" in done.stdout


@pytest.mark.faults
def test_a_job_that_slurm_signals_goes_on_when_it_is_queued_again(kdpipe: Callable, slurm: None, server: str) -> None:
    few = [*SWEEP, "loss.alpha=0", "loss.temperature=2", "seed=0", "train.epochs=60", f"tracking.uri={server}"]
    on_cluster = [*few, "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "tracking.experiment=queue"]
    with Path("log").open("w") as log:
        sweep = subprocess.Popen(command(*on_cluster), stdout=log, stderr=log)
    while len(list(Path("outputs/runs").glob("*/checkpoints/*.pt"))) < 2:
        assert sweep.poll() is None, Path("log").read_text()
        time.sleep(0.1)
    (job,) = subprocess.run(["squeue", "--noheader", "--format=%A"], capture_output=True, text=True).stdout.split()
    # As Slurm does some time before it ends a job.
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    client = MlflowClient(server)
    (experiment,) = [found.experiment_id for found in client.search_experiments() if found.name == "queue"]

    def run() -> Run:
        return next(run for run in client.search_runs([experiment]) if run.info.run_name == "a0_s0")

    sent = time.monotonic()
    while run().info.status != "KILLED":
        assert time.monotonic() - sent < 20, Path("log").read_text()
    assert run().data.tags["kdpipe.reason"] == "Interrupted: SIGUSR2"
    # It may be queued again with some delay, which the test does not wait for.
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, check=False)
    assert sweep.wait(timeout=300) == 0, Path("log").read_text()
    assert run().info.status == "FINISHED"
    told = next(Path("outputs/runs").glob("*/kdpipe.log")).read_text()
    assert told.count("epoch 60/60") == told.count("epoch 1/60") == told.count("continues at epoch") == 1


def test_a_job_override_survives_hydra_s_grammar(kdpipe: Callable, teacher: Run) -> None:
    """Names of runs may hold what people write into values."""
    outcome = kdpipe("-m", *SMALL, "experiment=student", "seed=0", "dataset.name='it is, (digits)','x: y'")
    assert outcome.status == 0, outcome.errors
    names = {run.data.params["dataset.name"] for found in runs().values() for run in found if run.data.metrics}
    assert names == {"digits", "it is, (digits)", "x: y"}
