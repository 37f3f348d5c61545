"""Stores that fail during runs: a real server that dies, hangs and comes back; locked and half-made sqlite files."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest
from helpers import KEPT, Started, free_port
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from kdpipe.runs.journal import Journal, has_row, read_rows, rows_since, sync_command
from kdpipe.runs.names import CHARTED
from kdpipe.tracking.delivery import Delivery

STUDENT = ["dataset=digits", "experiment=student", "train.threads=1", "train.batch_size=20"]
LONG = [*STUDENT, "train.epochs=15"]


class Server:
    """An MLflow server that can be killed, stopped and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                output = (self.folder / "server.log").read_text()
                assert self.process.poll() is None and time.monotonic() < deadline, output
                time.sleep(0.2)

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    @property
    def run(self) -> Run:
        """Its only run."""
        client = MlflowClient(self.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])
        return run

    def steps(self, metric: str = "train/loss") -> list[int]:
        return [point.step for point in MlflowClient(self.uri).get_metric_history(self.run.info.run_id, metric)]


@pytest.fixture
def mlflow_server(tmp_path: Path, store_template: Path) -> Iterator[Server]:
    (tmp_path / "server.db").write_bytes(store_template.read_bytes())
    server = Server(tmp_path)
    yield server
    server.send(signal.SIGKILL)


def rows() -> list[dict[str, float]]:
    (file,) = Path("outputs/runs").glob("*/metrics.jsonl")
    return read_rows(file.parent)


def sync() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kdpipe.sync"], capture_output=True, text=True, check=False)


def assert_complete(server: Server, epochs: int) -> None:
    assert server.steps() == list(range(1, epochs + 1))
    assert server.steps("test/accuracy") == [epochs]
    last: dict[str, float] = {}
    for row in rows():
        last |= row
    charted = {CHARTED[name]: last[name] for name in CHARTED if name in last and not name.startswith("test/")}
    assert server.run.data.metrics == charted | {name: value for name, value in last.items() if name != "step"}
    client = MlflowClient(server.uri)
    artifacts = {file.path for file in client.list_artifacts(server.run.info.run_id)}
    assert artifacts == KEPT
    assert server.run.info.status == "FINISHED"
    assert not list(Path("outputs/runs").glob("*/tracking.json"))


@pytest.mark.faults
def test_a_server_that_dies_and_comes_back_misses_nothing(start: Callable[..., Started], mlflow_server: Server) -> None:
    run = start(*LONG, f"tracking.uri={mlflow_server.uri}")
    run.wait_for("epoch 3/15")
    mlflow_server.send(signal.SIGKILL)
    run.wait_for("training continues")
    run.wait_for("epoch 8/15")
    run.send(signal.SIGSTOP)  # while the server starts, which may take longer than the run
    mlflow_server.start()
    run.send(signal.SIGCONT)
    assert run.end() == 0, run.output
    assert "is back, and has what it missed" in run.output
    assert_complete(mlflow_server, 15)


@pytest.mark.faults
def test_sync_delivers_to_a_server_that_was_down_until_the_end(
    start: Callable[..., Started], mlflow_server: Server
) -> None:
    run = start(*LONG, "train.epochs=8", f"tracking.uri={mlflow_server.uri}")
    run.wait_for("epoch 3/8")
    mlflow_server.send(signal.SIGKILL)
    assert run.end() == 0, run.output
    assert "python -m kdpipe.sync" in run.output and "test accuracy" in run.output
    refused = sync()
    assert refused.returncode == 1
    assert f"tracking.uri={mlflow_server.uri}: " in refused.stdout and "Traceback" not in refused.stderr
    mlflow_server.start()
    delivered = sync()
    assert delivered.returncode == 0, delivered.stdout
    assert_complete(mlflow_server, 8)
    assert "all is delivered" in sync().stdout


@pytest.mark.faults
def test_repeating_the_command_delivers_what_is_missing(start: Callable[..., Started], mlflow_server: Server) -> None:
    command = [*LONG, "train.epochs=8", f"tracking.uri={mlflow_server.uri}"]
    run = start(*command)
    run.wait_for("epoch 3/8")
    mlflow_server.send(signal.SIGKILL)
    assert run.end() == 0, run.output
    mlflow_server.start()
    again = start(*command)
    assert again.end() == 0, again.output
    assert "this run is already finished" in again.output
    assert_complete(mlflow_server, 8)


@pytest.mark.faults
def test_a_hanging_server_delays_no_epoch(start: Callable[..., Started], mlflow_server: Server) -> None:
    run = start(*LONG, f"tracking.uri={mlflow_server.uri}")
    run.wait_for("epoch 3/15")
    mlflow_server.send(signal.SIGSTOP)
    run.wait_for("epoch 4/15")
    for epoch in range(5, 9):
        before = time.monotonic()
        run.wait_for(f"epoch {epoch}/15")
        assert time.monotonic() - before < 5  # each request waits for four times as long
    mlflow_server.send(signal.SIGCONT)
    assert run.end() == 0, run.output
    assert_complete(mlflow_server, 15)


@pytest.mark.faults
def test_an_interrupted_run_with_a_hanging_server_ends_within_seconds(
    start: Callable[..., Started], mlflow_server: Server
) -> None:
    run = start(*LONG, f"tracking.uri={mlflow_server.uri}")
    run.wait_for("epoch 3/15")
    mlflow_server.send(signal.SIGSTOP)
    run.wait_for("epoch 5/15")
    run.send(signal.SIGTERM)
    sent = time.monotonic()
    assert run.end() == 143
    assert time.monotonic() - sent < 10
    mlflow_server.send(signal.SIGCONT)
    again = start(*LONG, f"tracking.uri={mlflow_server.uri}")
    assert again.end() == 0, again.output
    assert_complete(mlflow_server, 15)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(3))
def test_server_and_run_are_killed_at_random_moments(
    start: Callable[..., Started], mlflow_server: Server, number: int
) -> None:
    """Both, repeatedly, until the run ends: the server has every step once."""
    draw = random.Random(number)
    command = [*LONG, f"tracking.uri={mlflow_server.uri}", "train.checkpoint_minutes=0.001"]
    run, kills = start(*command), [0, 0]
    while kills[0] < 5:
        time.sleep(draw.uniform(0, 6))
        if draw.random() < 0.5 and kills[1] < 5:
            mlflow_server.send(signal.SIGKILL)
            time.sleep(draw.uniform(0, 2))
            mlflow_server.start()
            kills[1] += 1
        elif run.process.is_alive():
            run.kill()
            kills[0] += 1
            run = start(*command)
        else:
            break
    status = run.end()
    if status or "already finished" not in run.output:
        assert start(*command).end() == 0
    print(f"killed: run {kills[0]} times, server {kills[1]} times")
    assert_complete(mlflow_server, 15)


@pytest.mark.faults
def test_a_locked_sqlite_file_delays_no_epoch(start: Callable[..., Started], tmp_path: Path) -> None:
    run = start(*LONG)
    run.wait_for("epoch 2/15")
    with closing(sqlite3.connect(tmp_path / "outputs/mlflow.db", timeout=30, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        run.wait_for("epoch 4/15")
        before = time.monotonic()
        run.wait_for("epoch 6/15")
        assert time.monotonic() - before < 10  # each write waits for twice as long
        database.execute("ROLLBACK")
    assert run.end() == 0, run.output
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "kdpipe"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(found.info.run_id, "val/loss")] == list(range(1, 16))


@pytest.mark.faults
def test_eight_runs_at_once_on_one_sqlite_file_lose_nothing(start: Callable[..., Started], tmp_path: Path) -> None:
    runs = [start(*STUDENT, "train.epochs=5", f"seed={seed}", folder=_folder(tmp_path, seed)) for seed in range(8)]
    assert [run.end() for run in runs] == [0] * 8, "".join(run.output for run in runs)
    assert not any("takes no metrics" in run.output for run in runs)
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])
    assert sorted(run.data.params["seed"] for run in found) == [str(seed) for seed in range(8)]
    for run in found:
        assert run.info.status == "FINISHED"
        lines = read_rows(tmp_path / "outputs/runs" / run.data.tags["kdpipe.identity"])
        assert len(lines) == 6
        for name in ("train/loss", "val/accuracy"):
            points = client.get_metric_history(run.info.run_id, name)
            assert [point.value for point in points] == [line[name] for line in lines[:-1]]


def _folder(tmp_path: Path, seed: int) -> Path:
    """A working folder that shares its outputs with the others."""
    folder = tmp_path / str(seed)
    folder.mkdir()
    (folder / "outputs").symlink_to(tmp_path / "outputs")
    return folder


CREATE = (
    "from kdpipe.tracking import Tracker; from pathlib import Path; Tracker('sqlite:///new.db', 'kdpipe', Path('a'))"
)


@pytest.mark.faults
@pytest.mark.parametrize("seconds", [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
def test_a_half_made_store_is_set_aside(kdpipe: Callable, tmp_path: Path, seconds: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", CREATE], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "new.db").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds - 1)
    process.kill()
    process.wait()
    outcome = kdpipe(*STUDENT, "train.epochs=0", f"tracking.uri=sqlite:///{tmp_path}/new.db")
    assert outcome.status == 0, outcome.errors
    if list(tmp_path.glob("new.db.half-made-*")):
        assert "was left half-made, without any run" in outcome.output


def test_a_store_with_runs_is_never_set_aside(start: Callable[..., Started]) -> None:
    assert start(*STUDENT, "train.epochs=0").end() == 0
    with closing(sqlite3.connect("outputs/mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'another'")
        database.commit()
    run = start(*STUDENT, "train.epochs=0", "seed=1")
    assert run.end() == 1
    assert "this store cannot be opened" in run.output and "Traceback" not in run.output
    assert not list(Path("outputs").glob("*half-made*"))


def test_the_sync_command_names_the_folder() -> None:
    assert sync_command(Path("outputs/runs/0123").resolve()) == "python -m kdpipe.sync"
    assert sync_command(Path("/my runs/runs/0123")) == "python -m kdpipe.sync --output-dir '/my runs'"


def test_incomplete_lines_are_not_read(tmp_path: Path) -> None:
    whole = [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25}]
    text = "".join(json.dumps(row) + "\n" for row in whole)
    for end in (
        '{"step": 3, "train/l',
        '{"step": 3',
        "3\n",
        '{"train/loss": 1}\n',
        '{"step": 3, "a": "b"}\n',
        "\x00\xff",
    ):
        (tmp_path / "metrics.jsonl").write_text(text + end)
        assert read_rows(tmp_path) == whole
    assert rows_since(tmp_path, whole[:1]) == whole[:1]  # there is no checkpoint of the second
    Journal(tmp_path, "sqlite:///mlflow.db", "0", {}, released=2).write()
    assert rows_since(tmp_path, whole[:1]) == whole  # there was one, which is damaged
    assert rows_since(tmp_path, [*whole, {"step": 3, "train/loss": 0.1}])[-1]["step"] == 3  # lost ones come back
    assert has_row(whole, 2, {"train/loss": 9.0})
    assert not has_row(whole, 2, {"test/loss": 9.0})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"uri": 1}', '{"uri": "a", "run_id": 2}', "\x00"])
def test_an_unreadable_journal_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "tracking.json").write_text(content)
    assert Journal.read(tmp_path) is None


class FakeStore:
    """In place of MLflow's client, for one run. `behave` is called before each request."""

    def __init__(self, behave: Callable[[], object]) -> None:
        self.behave = behave
        self.requests: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., list[object]]:
        def request(*_: object, **__: object) -> list[object]:
            self.requests.append(name)
            self.behave()
            return []

        return request


def has_ended(thread: Thread) -> bool:
    thread.join(5)
    return not thread.is_alive()


def new_delivery(folder: Path, behave: Callable[[], object]) -> tuple[Delivery, FakeStore, Thread]:
    store = FakeStore(behave)
    before = set(threading.enumerate())
    journal = Journal(folder, "sqlite:///x", "0", {}, released=1, times=[0], status="KILLED")
    delivery = Delivery(store, journal, [{"step": 1, "train/loss": 0.5}])
    (thread,) = (found for found in set(threading.enumerate()) - before if found.name == "kdpipe-delivery")
    return delivery, store, thread


def fail(error: Exception) -> Callable[[], None]:
    def behave() -> None:
        raise error

    return behave


def test_no_thread_is_left_when_all_is_delivered(tmp_path: Path) -> None:
    delivery, store, thread = new_delivery(tmp_path, lambda: None)
    delivery.wake()
    assert delivery.finish(30)
    assert has_ended(thread)
    assert store.requests == ["get_metric_history", "log_batch", "set_tag", "set_terminated"]
    journal = Journal.read(tmp_path)
    assert journal and journal.delivered


@pytest.mark.parametrize("is_awake", [True, False])
def test_no_thread_is_left_when_a_hanging_store_answers_after_all(tmp_path: Path, is_awake: bool) -> None:
    hanging = threading.Event()
    delivery, store, thread = new_delivery(tmp_path, hanging.wait)
    if is_awake:
        delivery.wake()
    assert not delivery.finish(0.2)
    assert thread.is_alive()
    hanging.set()
    assert has_ended(thread)
    assert store.requests == ["get_metric_history"]  # and nothing more: another process may have the folder


def test_no_thread_is_left_when_the_store_is_down(tmp_path: Path) -> None:
    delivery, store, thread = new_delivery(tmp_path, fail(MlflowException("down")))
    started = time.monotonic()
    assert not delivery.finish(30)
    assert time.monotonic() - started < 10  # two attempts, and no longer
    assert has_ended(thread)
    assert store.requests == ["get_metric_history"] * 2
    assert Journal.read(tmp_path) is None  # it is not marked as delivered


def test_a_store_that_was_down_gets_one_more_attempt(tmp_path: Path) -> None:
    delivery, store, thread = new_delivery(tmp_path, fail(MlflowException("down")))
    delivery.wake()
    while not store.requests:
        time.sleep(0.01)
    time.sleep(0.1)
    assert not delivery.finish(30)
    assert has_ended(thread)
    assert len(store.requests) == 2


@pytest.mark.parametrize("is_awake", [True, False])
def test_no_thread_is_left_when_the_store_refuses(tmp_path: Path, is_awake: bool) -> None:
    refusal = MlflowException("no", error_code=INVALID_PARAMETER_VALUE)
    delivery, store, thread = new_delivery(tmp_path, fail(refusal))
    if is_awake:
        delivery.wake()
        assert has_ended(thread)
        with pytest.raises(ValueError, match="MLflow refuses this run's data: no"):
            delivery.raise_refusal()
    assert not delivery.finish(30)
    assert has_ended(thread)
    assert store.requests == ["get_metric_history", "get_run"]  # which may be deleted
