"""What several tests share: real photos, a fresh folder with an MLflow store, and a run as a user starts one."""

import importlib
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SHARED_DATA,
    Outcome,
    Started,
    Taught,
    exit_status,
    free_port,
    in_a_hurry,
    postgres,
    postgres_programs,
    restore_later,
    running_server,
)
from PIL import Image
from sklearn.datasets import load_sample_image

from kdpipe import main
from kdpipe.settings.composition import compose_settings, register_resolvers
from kdpipe.settings.schema import Settings

# Of the servers that tests start: their queue of jobs would be six processes each.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


register_resolvers()


def pytest_configure() -> None:
    """Tests side by side (`pytest -n 2`) share the cores, and so does what they start."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        threads = max((os.cpu_count() or 1) // workers, 1)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process runs the tests that need the database or the server, which start slowly (`--dist loadgroup`)."""
    for item in items:
        if "database" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("database"))


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables have all their columns, however wide the terminal is that the tests are started from."""
    monkeypatch.setenv("COLUMNS", "10000")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which not everybody has."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data in {SHARED_DATA} (KDPIPE_DATA says where)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def photo() -> Callable[..., Image.Image]:
    """Pieces of two real photos: `photo(kind, number, size)`, kind 0 a temple, kind 1 a flower."""
    scenes = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]

    def piece(kind: int, number: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
        draw = np.random.default_rng([kind, number])
        scene = scenes[kind]
        left, top = draw.integers(0, scene.width - 200), draw.integers(0, scene.height - 200)
        return scene.crop((left, top, left + 200, top + 200)).resize(size)

    return piece


@pytest.fixture
def class_folders(tmp_path: Path, photo: Callable[..., Image.Image]) -> Path:
    """A folder `photos` with the class folders flower and temple, 20 JPEG files each."""
    root = tmp_path / "photos"
    for kind, class_name in enumerate(("temple", "flower")):
        (root / class_name).mkdir(parents=True)
        for number in range(20):
            photo(kind, number).save(root / class_name / f"{number:02}.jpg")
    return root


@pytest.fixture
def composed() -> Callable[..., Settings]:
    """The settings that a command line composes."""
    return lambda *overrides: compose_settings(overrides)


@pytest.fixture(scope="session")
def store_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database: setting one up takes seconds, copying it takes none."""
    from kdpipe.tracking import Tracker

    folder = tmp_path_factory.mktemp("store")
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}", "Default", folder)
    assert tracker.experiment_id == "0"
    return folder / "mlflow.db"


@pytest.fixture
def empty_store(tmp_path: Path, store_template: Path) -> Path:
    """An MLflow database of one's own, where runs of this folder would have it: outputs/mlflow.db."""
    (tmp_path / "outputs").mkdir()
    return Path(shutil.copy(store_template, tmp_path / "outputs" / "mlflow.db"))


@pytest.fixture
def kdpipe(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`kdpipe("seed=1", …)` is `python -m kdpipe seed=1 …` in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def command(*overrides: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kdpipe", *in_a_hurry(overrides)])
        with pytest.MonkeyPatch.context() as environment:
            restore_later(environment)
            status = exit_status(main.cli)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory, store_template: Path) -> Taught:
    """A student of digits and its teacher, of some epochs. Tests read them, and leave them as they are."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("taught")
    (folder / "outputs").mkdir()
    shutil.copy(store_template, folder / "outputs" / "mlflow.db")
    digits = ["dataset=digits", "train.threads=1", "train.epochs=3", "train.batch_size=50", "optimizer.lr=3e-3"]
    digits.append("train.keep_epochs=[1]")
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(folder)
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        environment.setenv("HYDRA_FULL_ERROR", "0")
        for words in (["experiment=teacher", "model=resnet20"], ["model@teacher=resnet20"]):
            environment.setattr(sys, "argv", ["kdpipe", *in_a_hurry([*digits, *words])])
            main.cli()
    client = MlflowClient(f"sqlite:///{folder / 'outputs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])
    by_stage = {run.data.tags["kdpipe.stage"]: run.info.run_id for run in runs}
    return Taught(folder, by_stage["teacher"], by_stage["distill"])


@pytest.fixture
def command(
    taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`command("export", …)` is `python -m kdpipe.export …` in an empty folder, on the runs of `taught`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", taught.uri)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def begin(name: str, *words: object) -> Outcome:
        module = importlib.import_module(f"kdpipe.{name}.__main__" if name == "export" else f"kdpipe.{name}")
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as environment:
            restore_later(environment)
            status = exit_status(module.cli)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return begin


@pytest.fixture
def start(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Started]]:
    """`start("seed=1", …)` is `python -m kdpipe seed=1 … &` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    started: list[Started] = []

    def begin(*overrides: str, folder: Path = tmp_path) -> Started:
        started.append(Started(folder, overrides))
        return started[-1]

    yield begin
    for one in started:
        if one.process.is_alive():
            one.kill()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose downloads are refused at once."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # urllib keeps the proxies of its first download, also for the tests after this one.
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk("16M")` is the folder of a file system of that size."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a small file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PostgreSQL where it is installed, with a database of its own for these tests; else a sqlite file."""
    programs = postgres_programs()
    if programs is None:
        yield f"sqlite:///{tmp_path_factory.mktemp('database') / 'mlflow.db'}"
    else:
        with postgres(programs) as (uri, _):
            yield uri


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[str]:
    """A real tracking server with a store of its own."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(folder)]
    with running_server(command, port, folder) as uri:
        yield uri
