"""Data sets that Hugging Face's `datasets` read, from local files: there is no network here."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_refused

from kdpipe.settings.errors import ConfigError
from kdpipe.system import hub


@pytest.fixture
def saved(tmp_path: Path, photo: Callable, hub_cache: Path) -> Callable[..., Path]:
    """`saved(train=…, test=…)` is a folder of `save_to_disk`: splits by their columns, and `of` the types of some."""
    import datasets

    def save(of: dict | None = None, **splits: dict[str, list]) -> Path:
        parts = {}
        for name, columns in splits.items():
            part = datasets.Dataset.from_dict(columns)
            for column, kind in (of or {}).items():
                part = part.cast_column(column, kind)
            parts[name] = part
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def photos(photo: Callable, count: int = 12, first: int = 0) -> dict[str, list[Any]]:
    """Columns of photos and their labels, temples and flowers in turn."""
    numbers = range(first, first + count)
    return {"img": [photo(number % 2, number) for number in numbers], "label": [number % 2 for number in numbers]}


def test_columns_are_found_by_their_types_and_splits_by_their_names(
    read: Callable, photo: Callable, saved: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import ClassLabel

    parts = {name: photos(photo, 20, 100 * n) for n, name in enumerate(("train", "eval", "extra"))}
    path = saved({"label": ClassLabel(names=["temple", "flower"])}, **parts)
    data = read("dataset=huggingface", f"dataset.path={path}")
    assert data.class_names == ("temple", "flower")
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 18, "validation": 2, "test": 20}
    assert data.labels.tolist() == 20 * [0, 1]  # in their own order: the photos have no names
    assert "splits not read: extra" in caplog.text
    data = read("dataset=huggingface", f"dataset.path={path}", "dataset.splits={train:extra,validation:eval}")
    assert set(data.splits) == {"train", "validation", "test"} and len(data.splits["validation"]) == 20


def test_images_without_a_label_are_for_the_teacher(read: Callable, photo: Callable, saved: Callable) -> None:
    from datasets import ClassLabel

    columns = photos(photo, 40)
    columns["label"][:3] = [-1, None, -1]
    path = saved({"label": ClassLabel(names=["temple", "flower"])}, train=columns)
    data = read("dataset=huggingface", f"dataset.path={path}")
    assert len(data.labels) == 37 and len(data.more().images) == 3


def test_labels_may_be_text_in_metadata(read: Callable, class_folders: Path, hub_cache: Path) -> None:
    files = sorted(class_folders.glob("*/*"))
    lines = ["file_name,label", *(f"{file.parent.name}/{file.name},{file.parent.name}" for file in files)]
    (class_folders / "metadata.csv").write_text("\n".join(lines))
    data = read("dataset=huggingface", f"dataset.path={class_folders}")
    assert data.fingerprint == read("dataset=image_folder", f"dataset.root={class_folders}").fingerprint


def test_images_that_were_written_anew_are_read_anew(read: Callable, photo: Callable, saved: Callable) -> None:
    def fingerprint(first: int) -> str:
        return read("dataset=huggingface", f"dataset.path={saved(train=photos(photo, 40, first))}").fingerprint

    assert fingerprint(0) != fingerprint(100)
    assert fingerprint(0) == fingerprint(0)


def test_an_unreadable_image_can_be_left_out(read: Callable, photo: Callable, saved: Callable) -> None:
    from datasets import Image

    columns = photos(photo, 40)
    columns["img"] = [
        {"bytes": b"no image", "path": None},
        *({"bytes": png(one), "path": None} for one in columns["img"][1:]),
    ]
    path = saved({"img": Image()}, train=columns)
    with pytest.raises(ValueError, match=r"on_bad_image=stop: 1 of 40 files .* train image 0 \(unknown image format\)"):
        read("dataset=huggingface", f"dataset.path={path}")
    assert len(read("dataset=huggingface", f"dataset.path={path}", "dataset.on_bad_image=skip").labels) == 39


def png(image: Any) -> bytes:
    import io

    image.save(content := io.BytesIO(), "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("columns", "overrides", "said"),
    [
        (["img", "mask", "label"], [], ["image_column=auto", "img and mask has the type Image"]),
        (["label"], [], ["image_column=auto", "none has the type Image"]),
        (["img", "fine", "coarse"], [], ["label_column=auto", "none has the type ClassLabel"]),
        (["img", "label"], ["dataset.label_column=kind"], ["label_column=kind", "one of the columns img, label"]),
        (["img", "label"], ["dataset.splits={train:all}"], ["dataset.splits.train=all", "expected train"]),
        (["img", "label"], ["dataset.splits={learn:train}"], ["dataset.splits=learn", "one of train"]),
        (["img", "label"], ["dataset.class_names=[a,b,c]"], ["c has none", "training images of each class"]),
    ],
)
def test_bad_columns_and_splits_are_one_line_errors(
    read: Callable, photo: Callable, saved: Callable, columns: list, overrides: list, said: list
) -> None:
    known = photos(photo)
    path = saved(train={name: known["label" if name in ("label", "fine", "coarse") else "img"] for name in columns})
    with pytest.raises(ConfigError) as error:
        read("dataset=huggingface", f"dataset.path={path}", *overrides)
    assert [text for text in ("dataset.", *said) if text not in str(error.value)] == [], error.value


def test_a_data_set_of_the_hub_without_a_network_is_a_one_line_error(
    kdpipe: Callable, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_answers", lambda address: False)
    outcome = kdpipe("experiment=student", "dataset=huggingface", "dataset.path=somebody/pets")
    assert_refused(outcome, "dataset.path=somebody/pets", "it cannot be read", "a data set on the Hub (USER/NAME)")


def test_the_extra_is_named_where_it_is_missing(kdpipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    outcome = kdpipe("experiment=student", "dataset=huggingface", "dataset.path=photos")
    assert_refused(outcome, "dataset.path=photos", "pip install 'kdpipe[huggingface]'")
