"""MLflow, with real stores: sqlite files and a server."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs

import pytest
import sqlalchemy
from helpers import KEPT, Forwarding, Outcome, client, free_port, the_run
from mlflow import MlflowClient
from mlflow.entities import Run

from kdpipe.runs.journal import CREATION_TOKEN, NOT_CREATED, Journal, read_rows
from kdpipe.runs.names import TIMED_ON
from kdpipe.runs.store_address import check_uri, store_uri
from kdpipe.tracking import ActiveRun, Recovery, Tracker
from kdpipe.tracking.delivery import new_token
from kdpipe.tracking.server import check_store

STUDENT = ["dataset=digits", "experiment=student", "train.epochs=1", "train.threads=1"]


def test_a_run_goes_to_a_server_and_its_weights_come_back(
    kdpipe: Callable, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    teacher = kdpipe(*STUDENT, "stage=teacher", "tracking.experiment=served", f"tracking.uri={server}")
    assert teacher.status == 0, teacher.errors
    client = MlflowClient(server)
    (run,) = client.search_runs([client.get_experiment_by_name("served").experiment_id])
    assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == KEPT
    assert f"{server}/#/experiments/" in teacher.output

    distilled = kdpipe("dataset=digits", "train.epochs=0", "model@teacher=student_cnn", f"tracking.uri={server}")
    assert distilled.status == 0, distilled.errors
    assert f"teacher: run {run.info.run_id}" in distilled.output
    assert not list(scratch.rglob("*.safetensors"))
    assert not MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}").get_experiment_by_name("served")


def test_the_command_line_overrides_the_environment_and_that_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri(None, tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert store_uri(None, tmp_path) == "http://environment"
    assert store_uri("http://command-line", tmp_path) == "http://command-line"


def test_a_server_that_accepts_a_connection_and_never_answers_is_refused_within_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(ValueError, match="no tracking server answers"):
            check_store(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 10


@pytest.fixture
def answering() -> Iterator[Callable[[int, str], str]]:
    """`answering(status, text)` is the URI of a server that answers every request with these."""
    servers = []

    def start(status: int, text: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_with_an_internal_error_is_refused_in_one_line(answering: Callable[[int, str], str]) -> None:
    uri = answering(503, '{"message": "(psycopg.OperationalError)\n connection refused"}\n')
    with pytest.raises(ValueError) as refused:
        check_store(uri)
    problem = 'answers 503, its database may be down: {"message": "(psycopg.OperationalError) connection refused"}'
    assert str(refused.value) == f"tracking.uri={uri}: the server there {problem}"


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (401, r"does not accept this name and password \(no\); MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, r"does not permit this user to read its experiments \(no\)"),
        (404, r"is no MLflow server \(404"),
    ],
)
def test_a_server_that_refuses_is_told_from_one_that_is_down(
    answering: Callable[[int, str], str], status: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        check_store(answering(status, "no"))
    check_store(answering(200, "{}"))


@pytest.mark.parametrize("uri", ["http://me:s3cret@127.0.0.1:1", "postgresql://me:s3cret@127.0.0.1:1/db"])
def test_the_error_about_a_store_that_is_down_hides_its_password(kdpipe: Callable, command: Callable, uri: str) -> None:
    for outcome in (kdpipe(*STUDENT, f"tracking.uri={uri}"), command("predict", "0123", "photo.png", "--uri", uri)):
        assert outcome.status == 1
        assert "me:PASSWORD@127.0.0.1:1" in outcome.errors
        assert "s3cret" not in outcome.errors + outcome.output


def test_a_server_that_does_not_speak_http_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        Thread(target=lambda: listening.accept()[0].sendall(b"\0\1\2\n"), daemon=True).start()
        with pytest.raises(ValueError, match="no tracking server answers there"):
            check_store(uri)


@pytest.mark.parametrize("database", ["postgresql", "postgresql+psycopg", "mysql+pymysql", "mssql+pyodbc"])
def test_a_database_that_is_down_is_refused_at_once(database: str) -> None:
    place = f"127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"tracking\.uri=.*: no database answers at {place} \(.*refused\)") as refused:
        check_uri(f"{database}://user:secret@{place}/mlflow")
    assert time.monotonic() - started < 10
    assert "secret" not in str(refused.value)
    with socket.create_server(("127.0.0.1", int(place.partition(":")[2]))):
        check_uri(f"{database}://user:secret@{place}/mlflow")


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql:///mlflow",
        "postgresql+psycopg://mlflow@/mlflow?host=/var/run/postgresql&port=5433",
        "mysql://mlflow@localhost/mlflow?unix_socket=/var/run/mysqld.sock",
        "mssql+pyodbc://user:password@a_data_source",
        "sqlite:////tmp/mlflow.db",
    ],
)
def test_a_database_without_host_and_port_is_left_to_its_driver(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize("uri", ["postgresql://host:port/mlflow", "mysql:", "postgresql://user:p@ss@host/mlflow"])
def test_a_database_url_that_cannot_be_parsed_is_refused(uri: str) -> None:
    with pytest.raises(
        ValueError, match=r"^tracking\.uri=.*: expected .*://USER:PASSWORD@HOST:PORT/DATABASE, .*percent-encoded"
    ):
        check_uri(uri)


@pytest.mark.parametrize("uri", ["outputs/mlruns", "file:///tmp/mlruns", "ftp://host", "", "C:\\mlruns"])
def test_an_unknown_kind_of_store_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"^tracking\.uri=.*: expected sqlite:///FILE, postgresql"):
        check_uri(uri)


def open_new_store(uri: str) -> str:
    return Tracker(uri, "together", Path(uri.removeprefix("sqlite:///")).parent).experiment_id


@pytest.mark.faults
def test_processes_can_create_the_same_store_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        assert len(set(pool.map(open_new_store, [uri] * 3))) == 1


def test_metrics_are_in_the_folder_before_they_are_sent(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "lines", tmp_path)
    with tracker.run("a run", tmp_path, {"seed": 0}, {}) as run:
        run.log({"train/loss": 1.5}, step=1)
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 1.5}
        assert not tracker.client.get_run(run.id).data.metrics  # not before there is a checkpoint of it
        run.commit()
        while not tracker.client.get_run(run.id).data.metrics:
            time.sleep(0.01)
        run.log({"train/loss": 1.25}, step=2)
    known = tracker.get_run(run.id)
    assert known and known.metrics == {"train/loss": 1.25}


class Lossy(Forwarding):
    """Hangs up instead of answering the first request that creates a run."""

    lost = False

    def answer(self, status: int, content: bytes) -> None:
        if self.path.endswith("/runs/create") and not Lossy.lost:
            Lossy.lost = self.close_connection = True
        else:
            super().answer(status, content)


def test_a_run_whose_creation_was_not_answered_exists_once(server: str, tmp_path: Path) -> None:
    Lossy.lost, Lossy.behind = False, server
    with ThreadingHTTPServer(("127.0.0.1", 0), Lossy) as lossy:
        Thread(target=lossy.serve_forever, daemon=True).start()
        tracker = Tracker(f"http://127.0.0.1:{lossy.server_port}", "once", tmp_path)
        with tracker.run("a run", tmp_path, {"seed": 0}, {}) as run:
            pass
        lossy.shutdown()
    assert Lossy.lost
    (found,) = runs_of(Tracker(server, "once", tmp_path))
    assert (found.info.run_id, found.info.status) == (run.id, "FINISHED")


def test_a_run_whose_process_is_killed_during_creation_is_marked_killed(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "killed", tmp_path)
    left = Journal(tmp_path, tracker.uri, NOT_CREATED, {CREATION_TOKEN: new_token(tracker.experiment_id)})
    left.write()
    run_id = tracker.client.create_run(tracker.experiment_id, tags=left.tags).info.run_id
    tracker.recover(tmp_path)
    assert [(run.info.run_id, run.info.status) for run in runs_of(tracker)] == [(run_id, "KILLED")]
    journal = Journal.read(tmp_path)
    assert journal
    assert journal.run_id == run_id  # the same command goes on with it


def test_a_run_that_a_server_creates_late_is_deleted(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "late", tmp_path)
    token = {CREATION_TOKEN: new_token(tracker.experiment_id)}
    Journal(tmp_path, tracker.uri, NOT_CREATED, token).write()
    tracker.recover(tmp_path)  # the process was killed before the server, which hung, began its run
    with tracker.run("a run", tmp_path, {}, {}) as run:
        tracker.client.create_run(tracker.experiment_id, tags=token)
    assert [(found.info.run_id, found.info.status) for found in runs_of(tracker)] == [(run.id, "FINISHED")]


def runs_of(tracker: Tracker) -> list[Run]:
    return list(tracker.client.search_runs([tracker.experiment_id]))


def test_a_metric_that_mlflow_refuses_ends_the_run_and_stays_in_its_folder(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "lines", tmp_path)
    with pytest.raises(ValueError, match=r"MLflow refuses this run's data: Invalid .*train/loss\?"):  # noqa: SIM117
        with tracker.run("a run", tmp_path, {"seed": 0}, {}) as run:
            for step in range(1, 1000):
                run.log({"train/loss?": 1.5}, step)
                run.commit()
                time.sleep(0.01)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "train/loss?": 1.5}


def test_long_values_and_many_params_are_kept(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "params", tmp_path)
    params = {f"key{number}": number for number in range(250)} | {"long": "x" * 7000}
    with tracker.run("many", tmp_path, params, {}) as run:
        pass
    kept = tracker.client.get_run(run.id).data.params
    assert len(kept) == 251
    assert kept["long"] == "x" * 6000


def test_latencies_on_one_cpu_thread_are_dropped_when_timed_again_on_a_gpu(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "times", tmp_path)
    with tracker.run("run", tmp_path, {}, {TIMED_ON: "cpu (2 threads), float32"}) as run:
        run.log({"model/latency_ms": 1.0, "model/latency_ms_1_thread": 1.5}, step=1)
    known = tracker.get_run(run.id)
    assert known and known.metrics == {"model/latency_ms": 1.0, "model/latency_ms_1_thread": 1.5}
    tracker.log_metrics(run.id, {"model/latency_ms": 0.1}, step=1)
    tracker.set_tag(run.id, TIMED_ON, "cuda (H100), float32")  # timed again there, where one thread says nothing
    known = tracker.get_run(run.id)
    assert known and known.metrics == {"model/latency_ms": 0.1}


def test_other_splits_of_the_same_images_are_logged_as_such(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "splits", tmp_path)
    for sizes in ({"train": 90, "validation": 10}, {"train": 80, "validation": 20}):
        with tracker.run("run", tmp_path, {}, {}) as run:
            tracker.log_dataset(run.id, "photos", "0123456789abcdef", "photos", sizes)
        (given,) = tracker.client.get_run(run.id).inputs.dataset_inputs
        assert json.loads(given.dataset.profile) == sizes


# In each pair a run has the first, and another one, newer, has the second.
ODD_VALUES = [
    ("bob's photos", "bobs photos"),
    ('the "best" photos', "the best photos"),
    ('bob\'s "best" photos', "bob's 'best' photos"),
    ("100%", "1000"),
    ("a_b", "acb"),
    ("C:\\photos\\", "C:\\\\photos\\\\"),
    ("a\\'b", "a'b"),
    ("`photos`", "photos"),
    ("photos' and tags.`kdpipe.stage` = 'teacher", "photos"),
    ("--'\"; /*", "--"),
    ("photos", "Photos"),
    ("", " "),
]


@pytest.mark.parametrize(("value", "other"), ODD_VALUES)
def test_runs_are_found_by_values_with_any_characters(
    empty_store: Path, tmp_path: Path, value: str, other: str
) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "quotes", tmp_path)
    found = {}
    for text in (value, other):
        tags = {"kdpipe.identity": text, "kdpipe.stage": "teacher", "kdpipe.data": text, "kdpipe.sweep": text}
        params = {"dataset.name": text, "train.epochs": 1, "model.weights": None}
        with tracker.run("run", tmp_path, params, tags) as run:
            found[text] = run.id
    for text in (value, other):
        for record in (
            tracker.find_finished({"kdpipe.identity": text, "kdpipe.stage": "teacher"}),
            tracker.find_teacher({"dataset.name": text, "model.weights": None}, text),
        ):
            assert record and record.id == found[text]
    assert tracker.find_teacher({"dataset.name": value}, other) is None
    assert tracker.find_finished({"kdpipe.identity": value, "kdpipe.stage": other}) is None
    assert tracker.find_sweep(value) is None
    parent = tracker.client.create_run(tracker.experiment_id, tags={"kdpipe.stage": "sweep", "kdpipe.sweep": value})
    sweep = tracker.find_sweep(value)
    assert sweep and sweep.id == parent.info.run_id


def test_a_teacher_is_found_across_pages_of_experiments(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdpipe.tracking.tracker.PAGE", 1)
    trackers = [Tracker(f"sqlite:///{empty_store}", name, tmp_path) for name in ("first", "second", "third")]
    tags = {"kdpipe.stage": "teacher", "kdpipe.data": "abc"}
    with trackers[0].run("run", tmp_path, {"train.epochs": 1, "model.weights": None}, tags) as run:
        pass
    found = trackers[2].find_teacher({}, "abc")
    assert found
    assert found.id == run.id


def shell(command: str) -> None:
    """Run a command as a user pastes it, in a shell where MLflow's store is another one."""
    command = command.replace(" mlflow ", f" {sys.executable} -m mlflow ")
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///another.db"}
    subprocess.run(command, shell=True, check=True, capture_output=True, env=environment)


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(empty_store: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{empty_store}"
    tracker = Tracker(uri, "deleted", tmp_path)
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(ValueError, match=r"tracking\.experiment=deleted: this experiment was deleted; ") as error:
        Tracker(uri, "deleted", tmp_path)
    restore = str(error.value).partition("deleted; ")[2].removesuffix(" brings it back")
    assert restore == f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {tracker.experiment_id}"
    shell(restore)
    assert Tracker(uri, "deleted", tmp_path).experiment_id == tracker.experiment_id


def test_a_sweep_whose_run_was_deleted_gets_its_children_back(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "sweeps", tmp_path)
    parents = []
    with tracker.run("a run", tmp_path, {}, {"kdpipe.identity": "1"}):
        pass
    (record,) = tracker.finished_runs()
    for _ in range(2):
        with tracker.sweep("abc", "a sweep", {}, tmp_path / "runs") as parent:
            tracker.adopt(record, "abc", parent)
        parents.append(parent)
        assert tracker.client.get_run(record.id).data.tags["mlflow.parentRunId"] == parent
        tracker.client.delete_run(parent)
    assert parents[0] != parents[1]


def test_a_sweep_whose_run_is_deleted_while_it_runs_says_so(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "sweeps", tmp_path)
    said = r"the sweep's run \w+ was deleted in sqlite.*mlflow runs restore --run-id"
    with pytest.raises(ValueError, match=said), tracker.sweep("abc", "a sweep", {}, tmp_path / "runs") as parent:
        tracker.client.delete_run(parent)
        tracker.attach(parent, {}, {"tag": "value"}, {})


@pytest.mark.parametrize("kind", ["sqlite", "database"])
def test_files_of_the_experiment_default_are_with_those_of_others(
    kind: str, empty_store: Path, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = database if kind == "database" else f"sqlite:///{empty_store}"
    client = MlflowClient(uri)
    client.search_experiments()  # makes a new database
    engine = sqlalchemy.create_engine(uri)

    def place_default(where: str) -> None:
        with engine.begin() as connection:
            change = sqlalchemy.text("UPDATE experiments SET artifact_location = :where WHERE experiment_id = 0")
            connection.execute(change, {"where": where})

    place_default(str(tmp_path / "mlruns/0"))  # as MLflow does in a new database, in the folder of that moment
    tracker = Tracker(uri, "Default", tmp_path / "outputs/mlartifacts")
    (tmp_path / "weights").write_text("weights")
    with tracker.run("a run", tmp_path, {}, {}) as run:
        run.save(tmp_path / "weights")
    assert (tmp_path / "outputs/mlartifacts" / run.id / "artifacts/weights").exists()
    assert not (tmp_path / "mlruns").exists()

    place_default("mlflow-artifacts:/0")  # of a server, which uses the database, too
    Tracker(uri, "Default", tmp_path / "elsewhere")
    assert client.get_experiment("0").artifact_location == "mlflow-artifacts:/0"
    engine.dispose()


def test_a_run_that_is_deleted_while_it_trains_loses_nothing(
    empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "outputs/runs/0123"
    folder.mkdir(parents=True)
    tracker = Tracker(f"sqlite:///{empty_store}", "deleted", tmp_path)
    with tracker.run("a run", folder, {}, {}) as run:
        delete_once_it_has_metrics(tracker, run)
        run.log({"train/loss": 1.0}, step=2)
        run.commit()
        while "training continues, though its run" not in caplog.text:
            time.sleep(0.01)
        run.log({"train/loss": 0.5}, step=3)
    tracker.recover(folder)  # as every command does
    restore, sync = caplog.messages[-1].partition("; ")[2].split(" brings it back, then ")
    assert sync.startswith(f"python -m kdpipe.sync --output-dir {tmp_path / 'outputs'} delivers the rest")
    shell(restore)
    assert Recovery().recover(folder) == ""
    found = tracker.client.get_run(run.id)
    assert (found.info.status, found.data.metrics["train/loss"]) == ("FINISHED", 0.5)


def test_a_run_that_is_gone_for_good_goes_on_as_a_new_one(
    empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "gone", tmp_path)
    with tracker.run("a run", tmp_path, {}, {}) as run:
        delete_once_it_has_metrics(tracker, run)
        tracker.client._tracking_client.store._hard_delete_run(run.id)  # as `mlflow gc` does
        run.log({"train/loss": 1.0}, step=2)
    assert "no longer exists" in caplog.messages[-1] and "its command makes a new run" in caplog.messages[-1]
    with tracker.run("a run", tmp_path, {}, {}, run_id=run.id, history=read_rows(tmp_path)) as again:
        pass
    assert again.id != run.id
    assert tracker.client.get_run(again.id).data.metrics["train/loss"] == 1.0


def delete_once_it_has_metrics(tracker: Tracker, run: ActiveRun) -> None:
    run.log({"train/loss": 2.0}, step=1)
    run.commit()
    while not tracker.client.get_run(run.id).data.metrics:
        time.sleep(0.01)
    tracker.client.delete_run(run.id)


def sections(metrics: Iterable[str]) -> list[str]:
    """The sections of charts on MLflow's pages, in their order there."""
    return sorted({name.rpartition("/")[0] for name in metrics})


def test_pages_in_mlflow_begin_with_accuracy_and_loss_by_epoch(kdpipe: Callable[..., Outcome]) -> None:
    kdpipe(
        "dataset=digits", "train.threads=1", "experiment=student", "train.epochs=3", "evaluation.timing_seconds=0.01"
    )
    run = the_run()
    assert sections(run.data.metrics)[:2] == ["accuracy", "loss"]
    for split, what in product(("train", "val"), ("accuracy", "loss")):
        points, again = (
            [(point.step, point.value) for point in client().get_metric_history(run.info.run_id, name)]
            for name in (f"{split}/{what}", f"{what}/{split}")
        )
        assert points == again and [step for step, _ in points] == [1, 2, 3]
    assert {"accuracy/test", "loss/test"}.isdisjoint(run.data.metrics)  # one-off here
    contract = {"train/loss", "train/ce", "val/loss", "test/accuracy", "test/loss", "model/params", "model/size_mb"}
    assert contract <= run.data.metrics.keys()


def test_the_tutorial_s_test_accuracy_by_epoch_is_there_too(kdpipe: Callable[..., Outcome]) -> None:
    kdpipe("dataset=digits", "train.threads=1", "experiment=student", "train.epochs=2", "train.test_each_epoch=true")
    history = client().get_metric_history(the_run().info.run_id, "accuracy/test")
    assert [point.step for point in history] == [1, 2]


def test_the_table_that_is_linked_has_accuracy_alpha_temperature_and_seed(kdpipe: Callable[..., Outcome]) -> None:
    outcome = kdpipe("dataset=digits", "train.threads=1", "experiment=student", "train.epochs=0")
    link = re.search(r"all runs there: (\S+)", outcome.output)
    assert link
    key = parse_qs(link[1].partition("?")[2])["viewStateShareKey"][0]
    tags = client().get_experiment_by_name("kdpipe").tags
    columns = json.loads(tags[f"mlflow.sharedViewState.{key}"])["selectedColumns"]
    wanted = ["selected/accuracy", "test/accuracy", "loss.alpha", "loss.temperature", "seed"]
    assert [column.split("`")[1] for column in columns][:5] == wanted


def test_two_runs_of_one_name_say_how_they_differ(kdpipe: Callable[..., Outcome]) -> None:
    teacher = ["dataset=digits", "train.threads=1", "experiment=teacher", "model=resnet20", "train.epochs=0"]
    for more in (
        [],
        ["model.depth=8"],
        ["model.depth=8", "model.image_size=24"],
        ["model.depth=8", "train.resume=never"],
    ):
        assert kdpipe(*teacher, *more).status == 0
    experiment = client().get_experiment_by_name("kdpipe").experiment_id
    names = [run.info.run_name for run in client().search_runs([experiment], order_by=["attributes.start_time ASC"])]
    plain = "resnet20_teacher_s0"
    assert names == [plain, f"{plain} depth=8", f"{plain} image_size=24 depth=8", f"{plain} depth=8"]
