"""The same photos and labels are the same data set, whatever they came in."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data.listed import SPLITS, Listed, arranged
from kdpipe.settings.errors import ConfigError

Table = Callable[..., Path]


@pytest.fixture
def table(class_folders: Path) -> Table:
    """`table("csv")` writes a table of the class folders, its rows in no order; with split=True, the photos whose names
    end with 8 are for testing, those with 9 for validation."""

    def written(kind: str, split: bool = False) -> Path:
        files = sorted(class_folders.glob("*/*"), key=lambda file: (file.name[::-1], file.parent.name))
        rows = pd.DataFrame(
            {
                "file_name": [file.relative_to(class_folders).as_posix() for file in files],
                "label": [file.parent.name for file in files],
            }
        )
        if split:
            rows["split"] = [{"8": "Testing", "9": "val"}.get(file.stem[-1], "train") for file in files]
        path = class_folders / f"labels.{kind}"
        if kind == "csv":
            rows.to_csv(path, index=False)
        elif kind == "tsv":
            rows.to_csv(path, index=False, sep="\t")
        elif kind == "parquet":
            rows.to_parquet(path)
        else:  # pq
            rows["image"] = [file.read_bytes() for file in files]
            rows.to_parquet(path)
        return path

    return written


@pytest.fixture
def split_photos(class_folders: Path) -> Path:
    """The photos in train, test and val folders, as the table splits them."""
    for file in sorted(class_folders.glob("*/*")):
        split = {"8": "test", "9": "val"}.get(file.stem[-1], "train")
        place = class_folders.parent / "split" / split / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return class_folders.parent / "split"


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "pq"])
def test_a_table_is_the_same_data_set_as_class_folders(
    read: Callable, class_folders: Path, split_photos: Path, table: Table, kind: str
) -> None:
    folders = read("dataset=image_folder", f"dataset.root={class_folders}")
    listed = read("dataset=csv", f"dataset.file={table(kind)}")
    assert listed.class_names == folders.class_names == ("flower", "temple")
    assert listed.fingerprint == folders.fingerprint
    assert {name: part.tolist() for name, part in listed.splits.items()} == {
        name: part.tolist() for name, part in folders.splits.items()
    }
    with_splits = read("dataset=csv", f"dataset.file={table(kind, split=True)}")
    assert with_splits.fingerprint == read("dataset=image_folder", f"dataset.root={split_photos}").fingerprint
    assert {name: len(part) for name, part in with_splits.splits.items()} == {"train": 32, "test": 4, "validation": 4}


@pytest.mark.parametrize("folder", ["photos", "split"])
def test_hugging_face_s_datasets_give_the_same(
    read: Callable, class_folders: Path, split_photos: Path, hub_cache: Path, folder: str, capfd: pytest.CaptureFixture
) -> None:
    import datasets

    root = class_folders.parent / folder
    expected = read("dataset=image_folder", f"dataset.root={root}").fingerprint
    assert read("dataset=huggingface", f"dataset.path={root}").fingerprint == expected
    assert "examples" not in capfd.readouterr().err  # no bars, which `datasets` draws unless it is told not to
    saved, shards = class_folders.parent / "saved", class_folders.parent / "shards"
    parts = datasets.load_dataset(str(root))
    parts.save_to_disk(saved)
    assert read("dataset=huggingface", f"dataset.path={saved}").fingerprint == expected
    shards.mkdir()
    for split in parts:
        datasets.load_from_disk(saved)[split].shuffle(seed=0).to_parquet(shards / f"{split}.parquet")
    assert read("dataset=huggingface", f"dataset.path={shards}").fingerprint == expected


@pytest.mark.parametrize("form", ["pil", "array", "tensor"])
def test_a_user_s_dataset_gives_the_same(read: Callable, class_folders: Path, pets: None, form: str) -> None:
    expected = read("dataset=image_folder", f"dataset.root={class_folders}", "dataset.image_size=24")
    mine = ("dataset=torch", f"+dataset.folder={class_folders}", "dataset.image_size=24")
    named = read(*mine, "dataset._target_=pets.Photos", f"+dataset.form={form}")
    unnamed_but_sorted = read(*mine, "dataset._target_=pets.sorted_photos")
    assert named.fingerprint == unnamed_but_sorted.fingerprint == expected.fingerprint
    assert named.names == ["00.jpg", "01.jpg", *named.names[2:]] and unnamed_but_sorted.names == ()


def test_runs_on_them_are_the_same_to_the_last_bit(
    kdpipe: Callable, class_folders: Path, table: Table, pets: None, hub_cache: Path
) -> None:
    runs = [
        ["dataset=image_folder", f"dataset.root={class_folders}"],
        ["dataset=csv", f"dataset.file={table('csv')}"],
        ["dataset=csv", f"dataset.file={table('pq')}"],
        ["dataset=torch", "dataset._target_=pets.Photos", f"+dataset.folder={class_folders}"],
    ]
    often = ["dataset.test_fraction=0.3", "train.epochs=2", "train.batch_size=8", "train.threads=1"]
    results = set()
    for overrides in runs:
        done = kdpipe("experiment=student", *overrides, *often)
        assert done.status == 0, done.errors
        (file,) = Path("outputs/runs").glob("*/model.safetensors")
        accuracy, loss = (
            re.search(rf"test {what} +(.*)", done.errors + done.output)[1] for what in ("accuracy", "loss")
        )
        results.add((accuracy, loss, file.read_bytes()))
        shutil.rmtree("outputs/runs")
    assert len(results) == 1


LABELS = st.sampled_from(["cat", "dog", "3", None])


@given(st.lists(st.tuples(LABELS, st.sampled_from(SPLITS), st.integers(0, 99)), max_size=30), st.randoms())
def test_the_order_of_rows_means_nothing_where_images_have_names(rows: list, random: object) -> None:
    one = [Listed(label, split, f"{number}/{name}.jpg") for number, (label, split, name) in enumerate(rows)]
    other = list(one)
    random.shuffle(other)  # type: ignore[attr-defined]

    def order(listed: list[Listed]) -> object:
        try:
            plan = arranged(listed, None, "file", "labels.csv")
        except ConfigError as error:
            return str(error)
        return [listed[position] for position in plan.labelled], plan.classes, plan.class_names

    assert order(one) == order(other)
