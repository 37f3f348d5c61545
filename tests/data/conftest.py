"""Data sets as a command composes and reads them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdpipe.assembly.datasets import build_data, check_dataset, forget_data
from kdpipe.data import ImageDataset
from kdpipe.settings.components import ALLOW
from kdpipe.settings.composition import compose_settings

PETS = '''
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset


class Photos(Dataset):
    """The photos in class folders, in no order."""

    classes = ["flower", "temple"]

    def __init__(self, folder, form="pil", named=True, step=-1):
        self.files = sorted(Path(folder).glob("*/*"))[::step]
        self.form, self.named = form, named

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image, label = Image.open(self.files[index]), self.classes.index(self.files[index].parent.name)
        if self.form == "array":
            image = np.asarray(image)
        elif self.form == "tensor":
            image = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
        return (image, label, self.files[index].name) if self.named else (image, label)


def sorted_photos(folder):
    return Photos(folder, named=False, step=1)


class Given(Dataset):
    """Items of two photos: what `change` makes of the one at `at`."""

    def __init__(self, folder, change, at=1):
        self.photos, self.change, self.at = Photos(folder), change, at

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, index):
        image, label, name = self.photos[index]
        return eval(self.change) if index == self.at else (image, label, name)


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()
'''


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ImageDataset]:
    """`read("dataset=csv", …)` is the data set that a run with these overrides reads."""

    def read_as_a_run(*overrides: str) -> ImageDataset:
        settings = compose_settings([f"output_dir={tmp_path / 'outputs'}", *overrides])
        forget_data()
        check_dataset(settings.dataset)
        return build_data(settings.dataset)

    return read_as_a_run


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module `pets` with data sets, which the user allows."""
    (tmp_path / "pets.py").write_text(PETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pets", raising=False)
    monkeypatch.setenv(ALLOW, "pets")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for `datasets`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return tmp_path / "hub"
