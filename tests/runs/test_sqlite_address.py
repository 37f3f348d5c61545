"""Addresses of sqlite stores, read as SQLAlchemy reads them; and those that MLflow would try for minutes."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers import assert_refused
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow import MlflowClient
from sqlalchemy.engine import make_url

from kdpipe.compare.__main__ import run_comparison
from kdpipe.runs.sqlite_address import problem_of, sqlite_file, sqlite_uri, write_problem
from kdpipe.runs.store_address import check_uri, store_uri

NAMES = st.text(st.characters(exclude_categories=["C"], exclude_characters="/"), min_size=1).filter(
    lambda name: name not in (".", "..")
)
STRANGE = "what? 100%20 of%2F#ü@b:c&d=e"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(st.lists(NAMES, min_size=1, max_size=4))
@example(["what?", "x%20y", "of%2F", "ü#", "mlflow.db"])
def test_any_file_has_an_address(names: list[str]) -> None:
    file = Path("/", *names)
    uri = sqlite_uri(file)
    assert make_url(uri).database == str(file) == str(sqlite_file(uri))
    # MLflow makes this folder, as it is written.
    assert Path(uri.removeprefix("sqlite:///")).parent in file.parents
    assert store_uri(f"{uri}?timeout=60", Path()) == f"{uri}?timeout=60"


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///runs/mlflow.db", "{here}/runs/mlflow.db"),
        ("sqlite:///~/mlflow.db?timeout=60", "{home}/mlflow.db"),
        ("sqlite+pysqlite:////tmp/a%20b/mlflow.db", "/tmp/a b/mlflow.db"),
        ("sqlite:///file:/tmp/a%2520b.db?uri=true&mode=rw", "/tmp/a b.db"),
        ("postgresql://host/mlflow", None),
        ("http://host:5000", None),
    ],
)
def test_the_file_of_an_address(uri: str, file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    expected = file and Path(file.format(here=tmp_path, home="/home/me"))
    assert sqlite_file(uri) == sqlite_file(store_uri(uri, Path())) == expected


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sqlite:///folder", "is a folder, not a file"),
        ("sqlite:///text", "text is not a sqlite database"),
        ("sqlite:///text/mlflow.db", "text is a file, not a folder"),
        ("sqlite://", "the runs would be lost; expected sqlite:///FILE"),
        ("sqlite:///:memory:", "the runs would be lost; expected sqlite:///FILE"),
    ],
)
def test_a_store_that_cannot_be_one_is_refused_at_once(
    uri: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text").write_text("some text, longer than the name of a format")
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^tracking\.uri=sqlite.*") as caught:
        check_uri(store_uri(uri, Path()))
    assert said in str(caught.value) and time.monotonic() - started < 10  # MLflow itself tries for minutes


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="folders in which nobody may write, not even root")
@pytest.mark.parametrize("folder", ["/proc", "/proc/self", "/proc/self/nothing"])
def test_a_folder_in_which_nothing_can_be_written_is_refused_at_once(kdpipe: Callable, folder: str) -> None:
    started = time.monotonic()
    outcome = kdpipe("dataset=digits", "experiment=student", f"tracking.uri=sqlite:///{folder}/mlflow.db")
    assert_refused(outcome, f"tracking.uri=sqlite:///{folder}/mlflow.db: ")
    assert time.monotonic() - started < 60  # MLflow itself tries for minutes


@pytest.fixture
def not_root() -> Iterator[Path]:
    """A folder, seen by a user whom permissions apply to."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        if is_root := os.geteuid() == 0:
            os.setresuid(65534, 65534, 0)
        yield Path(folder)
        if is_root:
            os.setresuid(0, 0, 0)


def test_what_a_user_may_not_write_is_named(not_root: Path) -> None:
    store, folder = not_root / "mlflow.db", not_root / "folder"
    assert write_problem(store) == problem_of(store) == ""
    store.touch(0o444)
    assert write_problem(store) == f"{store} is read-only"
    folder.mkdir(0o500)
    assert problem_of(folder / "new/mlflow.db") == f"the folder {folder} does not let you write in it"


@pytest.mark.parametrize("key", ["output_dir", "tracking.uri"])
def test_any_folder_holds_runs_and_is_compared(
    kdpipe: Callable, key: str, tmp_path: Path, store_template: Path
) -> None:
    folder = tmp_path / STRANGE
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(store_template.read_bytes())
    uri = f"{sqlite_uri(folder / 'mlflow.db')}?timeout=60"
    overrides, flags = [f"output_dir='{STRANGE}'"], ["--output-dir", STRANGE]
    if key == "tracking.uri":
        overrides, flags = [f"tracking.uri='{uri}'"], ["--uri", uri]
    outcome = kdpipe("dataset=digits", "experiment=student", "train.epochs=0", *overrides)
    assert outcome.status == 0, outcome.errors
    assert names_in(tmp_path) == ["outputs", STRANGE]
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])
    assert "model.safetensors" in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert "student_cnn" in run_comparison(flags)


def test_a_tilde_is_the_home_folder(
    kdpipe: Callable, tmp_path: Path, store_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home/store").mkdir(parents=True)
    (tmp_path / "home/store/mlflow.db").write_bytes(store_template.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = ("dataset=digits", "experiment=student", "train.epochs=0")
    outcome = kdpipe(*run, "output_dir='~/results'", "tracking.uri='sqlite:///~/store/mlflow.db'")
    assert outcome.status == 0, outcome.errors
    assert names_in(tmp_path / "home") == ["results", "store"]
    assert "~" not in names_in(tmp_path)
    assert list((tmp_path / "home/results/runs").glob("*/model.safetensors"))
