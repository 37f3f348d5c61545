"""Output folders that were moved or copied: their runs have their artifacts, and new ones go beside them."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from helpers import KEPT
from mlflow import MlflowClient
from mlflow.entities import Run

from kdpipe import sync
from kdpipe.compare import compare_runs
from kdpipe.export.__main__ import export_arguments
from kdpipe.runs.command_line import existing_store
from kdpipe.runs.journal import Journal
from kdpipe.runs.moved_store import correct_artifacts
from kdpipe.runs.sqlite_address import sqlite_uri
from kdpipe.runs.store_address import store_uri
from kdpipe.tracking import RunStore, Tracker

TEACHER = ("experiment=teacher", "model=resnet20", "dataset=digits", "train.epochs=0", "model.weights=null")


def runs_in(folder: Path) -> list[Run]:
    client = MlflowClient(sqlite_uri(folder.resolve() / "mlflow.db"))
    return client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])


def places(folder: Path) -> set[str]:
    return {run.info.artifact_uri.removesuffix(f"/{run.info.run_id}/artifacts") for run in runs_in(folder)}


@pytest.fixture
def made(tmp_path: Path, empty_store: Path) -> Path:
    """An output folder A with a finished run that has one artifact."""
    folder = tmp_path / "A"
    shutil.copytree(tmp_path / "outputs", folder)
    tracker = Tracker(sqlite_uri(folder / "mlflow.db"), "kdpipe", folder / "mlartifacts")
    (folder / "runs/1").mkdir(parents=True)
    with tracker.run("one", folder / "runs/1", {}, {"kdpipe.identity": "1"}) as run:
        (folder / "runs/1/config.yaml").write_text("of A")
        run.save(folder / "runs/1/config.yaml")
    return folder


def open_store(folder: Path) -> RunStore:
    """As the commands on finished runs do."""
    return RunStore(existing_store(export_arguments(["RUN", "--out", "x", "--output-dir", str(folder)])))


def test_a_teacher_in_a_moved_folder_teaches_and_nothing_is_written_to_the_former_one(
    kdpipe: Callable, tmp_path: Path
) -> None:
    shutil.copytree("outputs", "A")
    assert kdpipe(*TEACHER, "output_dir=A").status == 0
    (teacher,) = runs_in(Path("A"))
    Path("A").rename("B")
    distil = ("model@teacher=resnet20", f"teacher.weights=runs:/{teacher.info.run_id}", "dataset=digits")
    outcome = kdpipe(*distil, "train.epochs=0", "output_dir=B")
    assert outcome.status == 0, outcome.errors
    assert not Path("A").exists()
    assert places(Path("B")) == {(tmp_path / "B/mlartifacts").as_uri()}
    client = MlflowClient(sqlite_uri(tmp_path / "B/mlflow.db"))
    for run in runs_in(Path("B")):
        assert {file.path for file in client.list_artifacts(run.info.run_id)} >= KEPT
    assert compare_runs(output_dir="B")


def test_what_a_dead_process_left_is_delivered_to_the_moved_store(made: Path, tmp_path: Path) -> None:
    tracker = Tracker(store_uri(None, made), "kdpipe", made / "mlartifacts")
    (made / "runs/2").mkdir()
    with suppress(KeyboardInterrupt), tracker.run("two", made / "runs/2", {}, {"kdpipe.identity": "2"}) as run:
        raise KeyboardInterrupt
    journal = Journal.read(made / "runs/2")
    journal.status, journal.delivered = "RUNNING", False  # as a process that was killed leaves it
    journal.write()
    made.rename(tmp_path / "B")
    Tracker(store_uri(None, tmp_path / "B"), "kdpipe", tmp_path / "B/mlartifacts").recover_all(tmp_path / "B/runs")
    assert Journal.read(tmp_path / "B/runs/2").delivered
    (left,) = [found for found in runs_in(tmp_path / "B") if found.info.run_id == run.id]
    assert left.data.tags["kdpipe.reason"] == "its process is gone"
    assert not made.exists()


def test_a_copy_has_its_own_artifacts_and_the_original_keeps_its(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "B")
    (run,) = runs_in(made)
    artifact = Path("mlartifacts", run.info.run_id, "artifacts/config.yaml")
    (tmp_path / "B" / artifact).write_text("of B")
    assert open_store(made).read(run.info.run_id, "config.yaml") == b"of A"
    assert open_store(tmp_path / "B").read(run.info.run_id, "config.yaml") == b"of B"
    assert open_store(made).read(run.info.run_id, "config.yaml") == b"of A"
    tracker = Tracker(store_uri(None, tmp_path / "B"), "kdpipe", tmp_path / "B/mlartifacts")
    assert (
        tracker.client.get_experiment(tracker.experiment_id).artifact_location == (tmp_path / "B/mlartifacts").as_uri()
    )


def test_artifacts_elsewhere_are_left_there(made: Path, tmp_path: Path) -> None:
    (tmp_path / "database").mkdir()
    elsewhere = Path(shutil.copy(made / "mlflow.db", tmp_path / "database/mlflow.db"))
    for store in (elsewhere, made / "mlflow.db"):
        before = store.read_bytes()
        correct_artifacts(sqlite_uri(store), made / "mlartifacts")
        assert store.read_bytes() == before


def test_a_store_outside_of_a_moved_output_folder_finds_its_artifacts(made: Path, tmp_path: Path) -> None:
    (tmp_path / "database").mkdir()
    store = Path(shutil.move(made / "mlflow.db", tmp_path / "database/runs.db"))
    made.rename(tmp_path / "B")
    correct_artifacts(sqlite_uri(store), tmp_path / "B/mlartifacts")
    with closing(sqlite3.connect(store)) as database:
        found = [address for (address,) in database.execute("SELECT artifact_location FROM experiments")]
    assert (tmp_path / "B/mlartifacts").as_uri() in found


def test_one_word_corrects_a_moved_store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.rename(tmp_path / "B")
    monkeypatch.setattr("sys.argv", ["sync", "--output-dir", str(tmp_path / "B")])
    sync.cli()
    assert places(tmp_path / "B") == {(tmp_path / "B/mlartifacts").as_uri()}


def test_a_journal_belongs_to_the_store_beside_it(made: Path, tmp_path: Path) -> None:
    folder = made / "runs/1"
    for uri in (store_uri(None, made), "http://host:5000", sqlite_uri(tmp_path / "other.db")):
        Journal(folder, uri, "id", {}).write()
        shutil.copytree(made, tmp_path / "B", dirs_exist_ok=True)
        expected = uri.replace("/A/", "/B/")
        assert Journal.read(tmp_path / "B/runs/1").uri == expected
        assert Journal.read(folder).uri == uri
