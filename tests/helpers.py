"""What several tests share besides fixtures: a command as a process, servers, a short training, their constants."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from torch import nn

from kdpipe import main
from kdpipe.data import ImageDataset, split
from kdpipe.data.augmentation import Views
from kdpipe.data.digits import digits
from kdpipe.data.mixing import Mixing
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.system.hardware import Hardware
from kdpipe.tracking import RunStore
from kdpipe.training.loop import Hooks, Recipe, fit
from kdpipe.training.observed import Observed
from kdpipe.training.schedules import constant
from kdpipe.training.state import Training
from kdpipe.training.teacher import Teacher

SHARED_DATA = Path(os.environ.get("KDPIPE_DATA") or Path(__file__).parents[2] / "shared" / "data")


# At the end of each of hundreds of runs: pictures take a second, and timing as long as one likes.
KEPT = {"config.yaml", "model.safetensors", "predictions.csv", "classes.csv"}  # of such a run


IN_A_HURRY = ["evaluation.pictures=false", "evaluation.timing_seconds=0"]


def in_a_hurry(overrides: Sequence[str]) -> list[str]:
    """A command's overrides, without pictures and timing unless it asks for them."""
    asked = {word.partition("=")[0] for word in overrides}
    return [*overrides, *(word for word in IN_A_HURRY if word.partition("=")[0] not in asked)]


def restore_later(environment: pytest.MonkeyPatch) -> None:
    """Let what commands set for the processes that they start not outlive this."""
    for name in ("HYDRA_FULL_ERROR", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        value = os.environ.get(name)
        environment.setenv(name, value or "")
        if value is None:
            environment.delenv(name)


@dataclass
class Outcome:
    """What a command came to."""

    status: int | str | None
    output: str
    errors: str


def assert_refused(outcome: Outcome, *said: str) -> None:
    """The command failed with one line that says this."""
    assert outcome.status == 1, outcome.output
    assert outcome.errors.count("\n") == 1, outcome.errors
    assert [text for text in said if text not in outcome.errors] == [], outcome.errors


def exit_status(cli: Callable[[], object]) -> int | str | None:
    """What a command ends with."""
    try:
        cli()
    except SystemExit as end:
        return end.code
    return 0


@dataclass
class Taught:
    """Finished runs for the commands on them: a folder with a store, a teacher's run and its student's by their ids."""

    folder: Path
    teacher: str
    student: str

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'outputs' / 'mlflow.db'}"


# Processes that have imported everything already, which takes seconds, and are real ones in all else.
_ready = multiprocessing.get_context("forkserver")


_ready.set_forkserver_preload(["kdpipe.main", "kdpipe.tracking"])


def _command(folder: Path, overrides: list[str], log: Path) -> None:
    os.chdir(folder)
    os.setsid()  # with the processes that it starts, a group that can be killed
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where tests run in the background
    sys.argv = ["kdpipe", *in_a_hurry(overrides)]
    status = exit_status(main.cli)
    if loky := sys.modules.get("joblib.externals.loky"):  # which such a process would wait for
        loky.get_reusable_executor(reuse=True).shutdown(kill_workers=True)
    sys.exit(status)


class Started:
    """`python -m kdpipe …` in a process of its own."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.log = folder / "log"
        self.log.touch()
        self.before = self.log.stat().st_size
        self.process = _ready.Process(target=_command, args=(folder, list(overrides), self.log))
        self.process.start()

    @property
    def output(self) -> str:
        """What it printed."""
        return self.log.read_bytes()[self.before :].decode()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.is_alive() and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, for it and all that it started."""
        for kill in (os.killpg, os.kill):  # it may not lead a group yet
            with suppress(ProcessLookupError):
                kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def end(self, seconds: float = 300) -> int:
        """Its exit status."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.output
        return self.process.exitcode


def postgres_programs() -> Path | None:
    """Where PostgreSQL is installed, if it is."""
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    return Path(found).resolve().parent if found else None


@contextmanager
def postgres(programs: Path) -> Iterator[tuple[str, int]]:
    """A PostgreSQL of its own: its URI, and the number of its first process."""
    folder = Path(tempfile.mkdtemp(prefix="kdpipe-database-"))
    as_user = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    cluster = folder / "cluster"
    quiet = {"stdout": subprocess.DEVNULL, "cwd": folder}
    initdb = [*as_user, programs / "initdb", "--auth=trust", "--username=mlflow", f"--pgdata={cluster}"]
    subprocess.run(initdb, check=True, **quiet)
    control = [*as_user, programs / "pg_ctl", f"--pgdata={cluster}", f"--log={folder / 'log'}", "--wait"]
    port = free_port()
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    subprocess.run([*control, "start", f"--options={options}"], check=True, **quiet)
    process = int((cluster / "postmaster.pid").read_text().split()[0])
    try:
        yield f"postgresql://mlflow@127.0.0.1:{port}/postgres", process
    finally:
        # Not an error where a test has stopped it.
        subprocess.run([*control, "--mode=immediate", "stop"], check=False, stderr=subprocess.DEVNULL, **quiet)
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(
    command: Sequence[str], port: int, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The address of an `mlflow server` on this port, once it answers, until the block ends."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


class Forwarding(BaseHTTPRequestHandler):
    """Forwards requests to the server `behind`."""

    protocol_version = "HTTP/1.1"
    behind: str

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        request = Request(self.behind + self.path, body or None, headers, method=self.command)
        try:
            with urlopen(request) as answer:
                self.answer(answer.status, answer.read())
        except HTTPError as error:
            self.answer(error.code, error.read())

    do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def fit_for_test(
    learner: nn.Module,
    data: ImageDataset,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    teacher: Teacher | None = None,
    views: Views | None = None,
    seed: int = 0,
    clip_norm: float | None = None,
    mixing: Mixing | None = None,
    balanced: bool = False,
) -> list[dict[str, float]]:
    """The metrics of each epoch of a training on the CPU, without those that depend on the clock."""
    logged: list[dict[str, float]] = []
    hardware, schedule = Hardware(torch.device("cpu")), constant(optimizer, epochs, 1)
    recipe = Recipe(epochs, batch_size=50, seed=seed, teacher=teacher, views=views, mixing=mixing, clip_norm=clip_norm)
    recipe = replace(recipe, balanced=balanced)

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        logged.append({name: value for name, value in metrics.items() if "second" not in name})

    fit(Training(Observed(learner), loss, optimizer, schedule, hardware), data, recipe, Hooks(on_epoch))
    return logged


def some_digits() -> ImageDataset:
    return split(digits(), "digits", train_fraction=0.2, val_fraction=0.1, test_fraction=0.25, split_seed=0)


def classifier() -> Classifier:
    return Classifier(ResNet(8, 10), 8, [0.5] * 3, [0.5] * 3)


SMALL = ["dataset=digits", "dataset.train_fraction=0.3", "train.threads=1"]


# A schedule, augmentation and dropout: what would go wrong if a step came twice, or its chance was another.
STUDENT = [
    *SMALL,
    *(
        "experiment=student",
        "model=torchvision",
        "model.name=squeezenet1_1",
        "model.weights=null",
        "model.image_size=32",
    ),
    *("augmentation=pipeline", "scheduler=cosine", "optimizer.lr=3e-4", "train.epochs=4", "train.batch_size=20"),
]


OFTEN = "train.checkpoint_minutes=0.0001"  # after every step


def client(folder: Path = Path()) -> MlflowClient:
    return MlflowClient(f"sqlite:///{(folder / 'outputs/mlflow.db').resolve()}")


def the_run(folder: Path = Path(), name: str = "") -> Run:
    """The one run of a folder's store, or the one with this name."""
    experiment = client(folder).get_experiment_by_name("kdpipe").experiment_id
    runs = [run for run in client(folder).search_runs([experiment]) if name in run.info.run_name]
    (run,) = [run for run in runs if name in ("", run.info.run_name)]
    return run


def result(folder: Path, run: Run) -> dict[str, object]:
    """All that came of a run, but for what depends on the clock: weights, lines, and every value in MLflow."""
    of_run = folder / "outputs/runs" / run.data.tags["kdpipe.identity"]
    lines = [json.loads(line) for line in (of_run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("train/images_per_second", None)
    history = {
        name: [(point.step, point.value) for point in client(folder).get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
        if name != "train/images_per_second"
    }
    assert len(client(folder).get_metric_history(run.info.run_id, "train/images_per_second")) == len(lines) - 1
    return {"weights": (of_run / "model.safetensors").read_bytes(), "lines": lines, "history": history}


def checkpoints() -> list[Path]:
    """The oldest first."""
    return sorted(Path("outputs/runs").glob("*/checkpoints/*.pt"))


QUICK = ("--seconds", 0, "--images", 100, "--max-loss", 10)


ALL = ("onnx", "torch_export", "safetensors")


def no_store() -> RunStore:
    raise AssertionError("opening a file needs no store")
