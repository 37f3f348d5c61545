"""Folders as people have them: splits under other names, what systems leave behind, links, forms of Unicode."""

import logging
import os
import shutil
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdpipe.data import Source
from kdpipe.data.dogs_vs_cats import dogs_vs_cats
from kdpipe.data.folders import files_below, split_named
from kdpipe.data.image_folder import image_folder


@pytest.fixture
def grow(tmp_path: Path, photo: Callable) -> Callable[..., Path]:
    """`grow("train/cat", "train/dog", …)` makes these folders below `photos`, each with four photos of its own."""
    number = 0

    def make(*folders: str, name: str = "{}.png") -> Path:
        nonlocal number
        for folder in folders:
            (tmp_path / "photos" / folder).mkdir(parents=True, exist_ok=True)
            for index in range(4):
                photo(0, number, (8, 8)).save(tmp_path / "photos" / folder / name.format(index))
                number += 1
        return tmp_path / "photos"

    return make


@pytest.fixture
def load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., Source]:
    caplog.set_level(logging.INFO, "kdpipe")
    return lambda root, **more: image_folder(str(root), more.get("size"), "stop", str(tmp_path / "cache"))


def sizes(source: Source) -> dict[str, int]:
    held_out = {name: len(positions) for name, positions in source.given.items()}
    return {"train": len(source.images) - sum(held_out.values()), **held_out}


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("Training", "Testing", "test"),
        ("TRAIN", "TEST", "test"),
        ("training_set", "test_set", "test"),
        ("trainset", "testset", "test"),
        ("train_images", "validation_images", "validation"),
        ("train-data", "dev", "validation"),
        ("Train", "Valid", "validation"),
        ("train", "eval", "test"),
        ("train", "Evaluation", "test"),
        ("training_set/training_set", "test_set/test_set", "test"),
    ],
)
def test_known_names_of_splits_are_splits(grow: Callable, load: Callable, train: str, other: str, split: str) -> None:
    source = load(grow(f"{train}/cat", f"{train}/dog", f"{other}/cat", f"{other}/dog"))
    assert source.class_names == ("cat", "dog")
    assert sizes(source) == {"train": 8, split: 8}


def test_evaluation_images_are_for_validation_where_there_is_a_test_folder(grow: Callable, load: Callable) -> None:
    root = grow(*(f"{part}/{kind}" for part in ("train", "test", "eval") for kind in ("cat", "dog")))
    assert sizes(load(root)) == {"train": 8, "test": 8, "validation": 8}


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["set_a/cat", "set_a/dog", "set_b/cat", "set_b/dog"], "both hold cat/, dog/: probably splits"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "both hold test/, train/: probably classes with splits"),
        (["cat", "dog", "copy/cat", "copy/dog"], "copy would be a class, but holds cat/, dog/ as"),
        (["cat", "dog", "test/cat", "test/dog"], "test/ would be a class, but seems to be a split"),
        (["seg_train/seg_train/cat", "seg_test/seg_test/cat"], "seg_test/, seg_train/ would be classes, but seem to"),
        (["catsTrain", "catsTest"], "catsTest/, catsTrain/ would be classes, but seem to be splits"),
        (["test/cat", "test/dog", "val/cat", "val/dog"], "test/, val/ would be classes, but seem to be splits"),
        (["train/cat", "train/dog", "training/cat"], "one folder of train images"),
        (["train", "test"], "train has no class folders, only 4 files (0.png, 1.png, …); expected a folder for each"),
        (["."], "has no class folders, only 4 files (0.png, 1.png, …); expected a folder for each class"),
        (["inner/cat", "inner/dog"], "expected two or more class folders; did you mean"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[:2]),
)
def test_splits_and_copies_never_become_classes(grow: Callable, load: Callable, folders: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"^root=.*photos: ") as error:
        load(grow(*folders))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "folders",
    [
        ["flower", "test"],
        ["bus", "car", "train"],
        ["valid", "invalid"],
        ["bullet_train", "test_tube", "zebra"],
        ["cat/images", "dog/images"],
        ["cat/2023", "cat/2024", "dog/2025"],
        ["cat", "dog/left", "dog/right"],
    ],
    ids=" ".join,
)
def test_class_folders_stay_classes(grow: Callable, load: Callable, folders: list[str]) -> None:
    source = load(grow(*folders))
    assert source.class_names == tuple(sorted({folder.split("/")[0] for folder in folders}))
    assert sizes(source) == {"train": 4 * len(folders)}


def test_files_called_as_kaggle_s_point_to_their_data_set(grow: Callable, load: Callable) -> None:
    with pytest.raises(ValueError, match=r"train/cat/1\.jpg\), or dataset=dogs_vs_cats for these names$"):
        load(grow("train", name="cat.{}.jpg"))


def test_what_is_not_read_is_named(grow: Callable, load: Callable, caplog: pytest.LogCaptureFixture) -> None:
    root = grow("train/cat", "train/dog", "test", "notes", "train/cat/@eaDir/0.png")
    shutil.copy(root / "train/cat/0.png", root / "train/stray.png")
    (root / "README.md").touch()
    assert sizes(load(root)) == {"train": 8}
    said = "not read: README.md, notes/, test/ (it has no class folders), train/stray.png"
    assert f"dataset.root={root}: {said}" in caplog.messages
    assert f"dataset.root={root}: left by systems and tools, not read: @eaDir" in caplog.messages


REMAINS = [
    *("@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"),
    *(".thumbnails", ".@__thumb", ".ipynb_checkpoints", ".git", ".Trash-1000", "Thumbs.db", "THUMBS.DB"),
    *("desktop.ini", "Icon\r", ".DS_Store", "._0.png", "0.png:Zone.Identifier"),
]


@pytest.mark.parametrize("remains", REMAINS)
def test_what_systems_leave_is_no_image_and_no_class(
    grow: Callable, load: Callable, tmp_path: Path, remains: str
) -> None:
    root = grow("train/cat", "train/dog", "test/cat")
    before = load(root)
    for place in (".", "train", "train/cat", "test/cat"):
        if "." in remains[1:] and not remains.startswith(("$", ".")):
            (root / place / remains).write_bytes(b"no image")
        else:
            shutil.copytree(root / "train/dog", root / place / remains / "0.png")
    after = load(root)
    assert (after.class_names, after.fingerprint) == (before.class_names, before.fingerprint)
    assert len(files_below(root)) == 12


def test_an_empty_remainder_is_no_class(grow: Callable, load: Callable) -> None:
    root = grow("cat", "dog")
    (root / "lost+found").mkdir()
    assert load(root).class_names == ("cat", "dog")


@pytest.mark.parametrize("inside", ["mlflow.db", "runs/0123456789ab/kdpipe.log"])
def test_our_own_outputs_are_no_images(
    grow: Callable, load: Callable, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    root = grow("cat", "dog", "outputs/runs/0123456789ab")
    (root / "outputs" / inside).touch()
    monkeypatch.chdir(root)
    assert load(".").class_names == ("cat", "dog")
    assert len(files_below(Path())) == 8


def test_files_that_are_links_to_nowhere_are_bad_images(grow: Callable, load: Callable) -> None:
    root = grow("cat", "dog")
    (root / "cat/0.png").unlink()
    (root / "cat/0.png").symlink_to("/nowhere/annex/0.png")
    (root / "dog/self.png").symlink_to("self.png")
    os.mkfifo(root / "dog/pipe.png")  # reading it would take for ever
    with pytest.raises(ValueError, match=r"3 of 10 files are not readable images") as error:
        load(root)
    for said in ("cat/0.png (a link to /nowhere/annex/0.png, which does not exist)", "dog/pipe.png (not a file)"):
        assert said in str(error.value)
    (root / "cat/0.png").unlink()
    shutil.copy(root / "dog/0.png", root / "cat/0.png")  # repaired
    (root / "dog/self.png").unlink()
    (root / "dog/pipe.png").unlink()
    assert sizes(load(root)) == {"train": 8}


@pytest.mark.parametrize("folder", ["bird", "train/bird", "test"])
def test_a_folder_that_is_a_link_to_nowhere_is_an_error(grow: Callable, load: Callable, folder: str) -> None:
    root = grow(*(["train/cat", "train/dog"] if folder != "bird" else ["cat", "dog"]))
    (root / folder).symlink_to("/nowhere")
    with pytest.raises(ValueError, match=rf"^root: .*{folder} is a link to /nowhere, which does not exist"):
        load(root)


def test_one_name_in_two_forms_of_unicode_is_one_class(grow: Callable, load: Callable) -> None:
    composed, decomposed = (unicodedata.normalize(form, "bébé") for form in ("NFC", "NFD"))
    root = grow(f"train/{composed}", f"train/{decomposed}", "train/dog", f"test/{decomposed}")
    source = load(root)
    assert source.class_names == (composed, "dog")
    assert sizes(source) == {"train": 12, "test": 4}
    assert source.labels.tolist() == [0] * 8 + [1] * 4 + [0] * 4


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_order_of_classes_does_not_depend_on_the_form(grow: Callable, load: Callable, form: str) -> None:
    names = [unicodedata.normalize(form, name) for name in ("bébé", "bzz")]
    assert load(grow(*names)).class_names == ("bzz", "bébé")


@pytest.mark.parametrize("validation", ["validation", "val", "Valid"])
def test_kaggle_s_photos_in_a_validation_folder_are_the_validation_images(
    grow: Callable, tmp_path: Path, validation: str
) -> None:
    for kind in ("cat", "dog"):
        root = grow(f"train/{kind}s", f"{validation}/{kind}s", name=f"{kind}.{{}}.jpg")
    archive = tmp_path / "filtered.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in root.rglob("*.jpg"):
            packed.write(file, Path("cats_and_dogs_filtered") / file.relative_to(root))
    for source in (root, tmp_path, archive):
        read = dogs_vs_cats(str(source), 8, "stop", str(tmp_path / "cache"))
        assert sizes(read) == {"train": 8, "validation": 8}
        assert torch.bincount(read.labels[read.given["validation"]]).tolist() == [4, 4]


def test_what_is_not_read_of_kaggle_s_is_named(
    grow: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = grow("train", name="cat.{}.jpg")
    grow("train", name="dog.{}.jpg")
    grow("test1")
    grow("test", name="{}.jpg")
    (root / "sampleSubmission.csv").touch()
    (root / "train/dog.jpg").touch()
    assert sizes(dogs_vs_cats(str(root), 8, "stop", str(tmp_path / "cache"))) == {"train": 8}
    note = "(no file is called cat.N.jpg or dog.N.jpg)"
    assert f"not read: sampleSubmission.csv, test/ {note}, test1/, train/dog.jpg" in caplog.text


@pytest.mark.parametrize("name", ["tests", "pretrained", "cat", "valid_cats", "trainer"])
def test_other_names_are_no_splits(name: str) -> None:
    assert split_named(name) is None
