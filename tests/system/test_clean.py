"""Cleaning an output folder: what is not needed is listed, and removed when asked for."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kdpipe import clean
from kdpipe.runs.claim import claim
from kdpipe.runs.sqlite_address import sqlite_uri
from kdpipe.system.disk_cache import META, ensure_entry
from kdpipe.tracking import Tracker


def is_there(entry: Path) -> bool:
    return (entry / META).exists()


def write(folder: Path) -> None:
    (folder / META).write_text('{"about": "logits of a teacher"}')


@pytest.fixture
def command(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def begin(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["clean", *words])
        clean.cli()
        return capsys.readouterr().out

    return begin


@pytest.fixture
def runs(command: Callable, tmp_path: Path) -> tuple[MlflowClient, dict[str, str]]:
    """The ids of runs by name; the name's first letter is the identity."""
    tracker = Tracker(sqlite_uri(tmp_path / "outputs/mlflow.db"), "kdpipe", tmp_path / "outputs/mlartifacts")
    ids = {}
    for name in ("a", "b1", "b2"):
        folder = Path("outputs/runs", name[0])
        folder.mkdir(parents=True, exist_ok=True)
        with tracker.run(name, folder, {}, {"kdpipe.identity": name[0]}) as run:
            ids[name] = run.id
    Path("outputs/runs/of_another_store").mkdir()
    return tracker.client, ids


def folders() -> list[str]:
    return sorted(path.name for path in Path("outputs/runs").iterdir())


def test_folders_of_deleted_runs_are_listed_and_removed(runs: tuple, command: Callable) -> None:
    client, ids = runs
    assert "in 0 folders would be removed" in command()
    client.delete_run(ids["a"])
    client.delete_run(ids["b1"])  # another run of the same identity is left
    assert f"runs/a  run {ids['a']} was deleted in MLflow" in command() and "--yes removes them" in command()
    assert folders() == ["a", "b", "of_another_store"]
    assert "in 1 folders removed from outputs" in command("--yes")
    assert folders() == ["b", "of_another_store"]
    client.delete_experiment(client.get_experiment_by_name("kdpipe").experiment_id)
    command("--yes")
    assert folders() == ["of_another_store"]


def test_a_run_in_progress_is_kept(runs: tuple, command: Callable) -> None:
    client, ids = runs
    client.delete_run(ids["a"])
    with claim(Path("outputs/runs/a")):
        assert "kept, because it is being written" in command("--yes")
    assert "a" in folders()


def test_old_and_unfinished_caches_go_and_those_in_use_stay(command: Callable) -> None:
    entries = {name: Path("outputs/cache/teacher", name) for name in ("old", "used", "new", "odd.unfinished")}
    for name, entry in entries.items():
        ensure_entry(entry, is_there, write) if name != "odd.unfinished" else entry.mkdir()
    for name in ("old", "used"):
        os.utime(entries[name], (0, time.time() - 31 * clean.DAY))
    ensure_entry(entries["used"], is_there, write)
    assert "logits of a teacher" in command()
    assert "in 2 folders removed" in command("--yes")
    assert [name for name, entry in entries.items() if entry.exists()] == ["used", "new"]
    assert "in 2 folders would be removed" in command("--caches")
    assert "in 2 folders removed" in command("--caches", "--yes")


def test_an_entry_that_is_being_written_is_not_removed(command: Callable) -> None:
    messages = []

    def make(folder: Path) -> None:
        write(folder)
        messages.append(command("--caches", "--yes"))
        assert is_there(folder)

    entry = Path("outputs/cache/teacher/entry")
    ensure_entry(entry, is_there, make)
    assert "kept, because it is being written" in messages[0] and is_there(entry)


def test_the_number_of_days_is_checked(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("--days", "-1")
    assert "--days -1: expected" in capsys.readouterr().err
