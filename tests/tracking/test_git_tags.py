"""The commit that a run is tagged with."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Outcome
from mlflow import MlflowClient

from kdpipe.tracking.tracker import git_tags

IDENTITY = {f"GIT_{role}_{key}": "x" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}


def run_git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], env=os.environ | IDENTITY, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit; the working folder is in a folder of it."""
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    run_git("init", "-q", "..")
    (tmp_path / "model.py").write_text("depth = 8\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    run_git("add", "../model.py", "../.gitignore")
    run_git("commit", "-q", "-m", "first")
    return tmp_path


def test_a_run_has_its_commit(
    kdpipe: Callable[..., Outcome], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)  # now with outputs/, which is new and no code
    assert kdpipe("dataset=digits", "experiment=student", "train.epochs=0").status == 0
    client = MlflowClient(f"sqlite:///{repository}/outputs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])
    assert run.data.tags["git.commit"] == run_git("rev-parse", "HEAD")
    assert run.data.tags["git.dirty"] == "false"


def test_uncommitted_code_makes_it_dirty(repository: Path) -> None:
    commit = run_git("rev-parse", "HEAD")
    for name in ("config.yaml", "ignored.py"):
        (repository / name).touch()
    os.utime(repository / "model.py", (0, 0))
    assert git_tags() == {"git.commit": commit, "git.dirty": "false"}
    (repository / "löss.py").touch()
    assert git_tags() == {"git.commit": commit, "git.dirty": "true"}
    run_git("add", "../löss.py")
    assert git_tags()["git.dirty"] == "true"
    run_git("commit", "-q", "-m", "second")
    assert git_tags() == {"git.commit": run_git("rev-parse", "HEAD"), "git.dirty": "false"}
    (repository / "model.py").write_text("depth = 20\n")
    assert git_tags()["git.dirty"] == "true"


def test_no_tags_outside_of_a_repository_and_before_the_first_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_tags() == {}
    run_git("init", "-q")
    (tmp_path / "model.py").touch()
    run_git("add", "--all")
    assert git_tags() == {}


def test_no_tags_from_another_owner_s_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(subprocess.CalledProcessError):
        run_git("status")
    assert git_tags() == {}


def test_no_tags_without_a_git_executable(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from kdpipe.tracking.tracker import git_tags; print(git_tags())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PATH": ""}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
    assert git_tags() != {}
    monkeypatch.setenv("PATH", "")  # it is gone while a process runs
    assert git_tags() == {}
