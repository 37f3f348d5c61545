"""Tables of images: columns as people call them, and what is wrong with a table."""

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kdpipe.settings.errors import ConfigError

NAMES = [f"{kind}/{number:02}.jpg" for kind in ("flower", "temple") for number in range(20)]
LABELS = [name.partition("/")[0] for name in NAMES]


@pytest.fixture
def table(class_folders: Path) -> Callable[..., Path]:
    """`table(file=NAMES, label=LABELS)` writes these columns to labels.csv, in the folder of the photos."""

    def written(separator: str = ",", **columns: list) -> Path:
        pd.DataFrame(columns).to_csv(class_folders / "labels.csv", index=False, sep=separator)
        return class_folders / "labels.csv"

    return written


@pytest.mark.parametrize(
    ("columns", "overrides"),
    [
        ({"image": NAMES, "label": LABELS}, []),
        ({"Image_ID": [name.removesuffix(".jpg") for name in NAMES], "dx": LABELS, "age": NAMES}, []),
        ({"path": [name.replace("/", "\\") for name in NAMES], "Class Name": LABELS}, []),
        ({"file": [f"./{name}" for name in NAMES], "kind": LABELS}, []),
        ({"photo": NAMES, "kind": LABELS, "x": LABELS}, ["dataset.image_column=photo", "dataset.label_column=kind"]),
        ({"id": NAMES, "flower": 20 * [1.0] + 20 * [0.0], "temple": 20 * [0.0] + 20 * [1.0], "score": NAMES}, []),
        (
            {"id": NAMES, "flower": 20 * [1] + 20 * [0], "temple": 20 * [0] + 20 * [1], "x": 40 * [0]},
            ["dataset.label_column=[flower,temple]"],
        ),
        ({"id": NAMES, "label": 20 * [0] + 20 * [1]}, ["dataset.class_names=[flower,temple]"]),
    ],
    ids=["plain", "no extension", "Windows", "one left", "named", "one-hot", "some one-hot", "numbers"],
)
def test_columns_are_found(
    read: Callable, class_folders: Path, table: Callable, columns: dict, overrides: list
) -> None:
    data = read("dataset=csv", f"dataset.file={table(';', **columns)}", *overrides)
    assert data.fingerprint == read("dataset=image_folder", f"dataset.root={class_folders}").fingerprint
    assert data.name == "labels.csv"


def test_class_names_fix_their_order_and_numbers_are_sorted_as_numbers(read: Callable, table: Callable) -> None:
    path = table(file=NAMES, label=LABELS)
    data = read("dataset=csv", f"dataset.file={path}", "dataset.class_names=[temple,flower]")
    assert data.class_names == ("temple", "flower") and data.labels.tolist() == 20 * [0] + 20 * [1]
    path = table(file=NAMES, label=20 * [10] + 20 * [9])
    assert read("dataset=csv", f"dataset.file={path}").class_names == ("9", "10")


def test_a_changed_split_is_seen_though_the_order_stays(read: Callable, table: Callable) -> None:
    def sizes(tested: int) -> tuple:
        path = table(file=NAMES, label=LABELS, split=(40 - tested) * ["train"] + tested * ["test"])
        data = read("dataset=csv", f"dataset.file={path}", "dataset.val_fraction=0")
        return len(data.splits["test"]), data.fingerprint

    (first, one), (second, other) = sizes(3), sizes(4)
    assert (first, second) == (3, 4) and one != other


def test_files_that_the_table_does_not_list_are_named(
    read: Callable, table: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    read("dataset=csv", f"dataset.file={table(file=NAMES[1:], label=LABELS[1:])}")
    assert "not read: flower/00.jpg" in caplog.text and "labels.csv" not in caplog.text.partition("not read")[2]


def test_missing_and_unreadable_files_can_be_left_out(
    read: Callable, class_folders: Path, table: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    path = table(file=[*NAMES, "flower/nowhere.jpg"], label=[*LABELS, "flower"])
    (class_folders / NAMES[0]).write_bytes(b"no image")
    data = read("dataset=csv", f"dataset.file={path}", "dataset.on_bad_image=skip")
    assert len(data.labels) == 39
    assert "1 of the 41 images that" in caplog.text and "1 of 40 files are not readable" in caplog.text


def test_rows_without_a_label_are_images_for_the_teacher(
    read: Callable, kdpipe: Callable, table: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kdpipe")
    split = 18 * ["train"] + 2 * ["test"] + 16 * ["train"] + 4 * ["test"]
    labels = [*LABELS[:14], *4 * [""], *LABELS[18:38], "", ""]
    path = table(split=split, file=NAMES, label=labels)
    path.write_text(path.read_text().replace("test,temple/19.jpg,\n", "test,temple/19.jpg\n"))  # a short row
    assert len(read("dataset=csv", f"dataset.file={path}").labels) == 34
    assert "4 training images have no label" in caplog.text
    assert "2 validation or test images have no label and are left out" in caplog.text
    photos = ["dataset=csv", f"dataset.file={path}", "train.epochs=1", "train.batch_size=8", "train.threads=1"]
    small = ["model=resnet20", "model.depth=8", "model@teacher=resnet20", "teacher.depth=8"]
    for more in (["experiment=teacher"], ["loss.alpha=0.9"], ["loss.alpha=0.9", "train.mixup=0.2"]):
        done = kdpipe(*more, *photos, *small)
        assert done.status == 0, done.errors
        said = done.output + done.errors
        assert ("images without labels: 4" in said) == (more == ["loss.alpha=0.9"])
        assert ("images without a label are left out" in said) == (len(more) == 2)


@pytest.mark.parametrize(
    ("columns", "overrides", "said"),
    [
        ({"x": NAMES, "label": LABELS}, [], ["image_column=auto", "x, label", "expected the column of file names"]),
        ({"id": NAMES, "label": LABELS, "class": LABELS}, [], ["several that could be: label, class", "=… names it"]),
        ({"id": NAMES, "shape": LABELS, "color": LABELS}, [], ["several that could be: shape, color"]),
        ({"id": NAMES}, [], ["label_column=auto", "no other column"]),
        ({"id": NAMES, "a": 40 * [1], "b": 39 * [0] + [1]}, [], ["1 of 40 rows of a, b have not one 1", "(row 40)"]),
        ({"id": NAMES, "label": LABELS}, ["dataset.label_column=kind"], ["=kind", "one of the columns id, label"]),
        ({"id": NAMES, "label": LABELS}, ["dataset.class_names=[flower,dog]"], ["class_names=[flower,dog]", "temple"]),
        ({"id": NAMES, "label": LABELS}, ["dataset.class_names=[a,a]"], ["a is repeated"]),
        ({"id": NAMES, "label": 40 * ["a"]}, [], ["two or more classes", "all of its 40 images have the label a"]),
        ({"id": NAMES, "label": LABELS, "split": LABELS}, [], ["split_column=split", "it has flower, temple", "null"]),
        ({"id": NAMES, "label": LABELS, "split": 20 * ["train"] + 20 * ["test"]}, [], ["temple has none, only test"]),
        ({"id": NAMES, "label": LABELS, "split": 40 * ["dev"]}, [], ["all images are test or validation images"]),
        ({"id": [*NAMES, "a.jpg"], "label": [*LABELS, "dog"]}, [], ["dataset.root=", "1 of the 41", "there (a.jpg)"]),
        (
            {"id": [n[-6:] for n in NAMES], "label": LABELS},
            [],
            ["40 of the 40", "did you mean dataset.root=", "flower?"],
        ),
        ({"id": [*NAMES, NAMES[0]], "label": [*LABELS, "temple"]}, [], ["1 images are listed more than once (00.jpg)"]),
    ],
)
def test_bad_tables_are_one_line_errors(
    read: Callable, table: Callable, columns: dict, overrides: list, said: list
) -> None:
    with pytest.raises(ConfigError) as error:
        read("dataset=csv", f"dataset.file={table(**columns)}", *overrides)
    assert [text for text in ("dataset.", *said) if text not in str(error.value)] == [], error.value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "not a readable table"),
        (b"file,label\n", "it has no rows"),
        (b"\xff\xfe\x00", "not a readable table"),
        (b"file,label\na,b,c\nd,e,f,g,h\n", "not a readable table"),
    ],
)
def test_files_that_are_no_tables_are_errors(
    read: Callable, class_folders: Path, content: bytes | None, said: str
) -> None:
    path = class_folders / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^dataset\.file={path}: .*{said}"):
        read("dataset=csv", f"dataset.file={path}")


def test_the_identity_does_not_depend_on_where_a_table_is(composed: Callable) -> None:
    one, other, renamed = (
        composed("dataset=csv", f"dataset.file={path}") for path in ("a/x.csv", "b/x.csv", "a/y.csv")
    )
    assert one.identity == other.identity != renamed.identity
