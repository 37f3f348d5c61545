"""What several tests share: real photos, a fresh folder with an MLflow store, and a run as a user starts one."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from sklearn.datasets import load_sample_image

from kdpipe import config as settings
from kdpipe import main

SHARED_DATA = Path(os.environ.get("KDPIPE_DATA") or Path(__file__).parents[2] / "shared" / "data")

settings.register_resolvers()


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
def composed() -> Callable[..., DictConfig]:
    """The config that a command line composes, without Hydra's own part."""

    def compose_config(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(settings.CONF), version_base="1.3"):
            return compose("config", list(overrides))

    return compose_config


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


@dataclass
class Outcome:
    """What a command came to."""

    status: int | str | None
    output: str
    errors: str


@pytest.fixture
def kdpipe(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`kdpipe("seed=1", …)` is `python -m kdpipe seed=1 …` in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def command(*overrides: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kdpipe", *overrides])
        status: int | str | None = 0
        with pytest.MonkeyPatch.context() as environment:
            # What the command sets itself must not outlive it.
            environment.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0"))
            try:
                main.cli()
            except SystemExit as end:
                status = end.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return command
