"""A table of images with their labels: a CSV file, or Parquet, which may hold the images themselves."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe.data.dataset import Source
from kdpipe.data.decode import ImageFile, ImageSize, OnBadImage, image_file
from kdpipe.data.folders import LeftOut, is_left_by_system, split_named
from kdpipe.data.listed import AUTO, NAME_COLUMNS, Listed, arranged, called, listed_source, usable_names
from kdpipe.settings.errors import ConfigError, flat, shortened
from kdpipe.settings.values import StoredResize, checked

log = logging.getLogger("kdpipe")

# What people call their columns, as `folded` has it.
LABEL_COLUMNS = (
    *("label", "labels", "class", "classes", "classname", "classlabel", "labelname", "target", "category"),
    *("diagnosis", "dx", "breed", "species", "y"),
)
SPLIT_COLUMNS = ("split", "subset", "partition", "set", "usage")


@dataclass(frozen=True)
class Table:
    """A table's columns of text, with "" for a missing value, and the name of the column of encoded images, if any."""

    text: pd.DataFrame
    images: str | None = None


@checked
def csv_table(
    file: str,
    root: str,
    image_column: str,
    label_column: str | list[str],
    split_column: str | None,
    class_names: list[str] | None,
    image_size: ImageSize | None,
    on_bad_image: OnBadImage,
    cache_dir: str,
    resize: StoredResize = "squeeze",
) -> Source:
    """Images as uint8 [N, 3, H, W] that a table lists: a row for each, with a file name (its extension may be missing)
    or, in Parquet, the content of an image file; a label, or columns of 0 and 1 for the classes; and, if there is such
    a column, the split. Rows without a label are images for which a teacher answers.

    Args:
        root: the folder where file names start.
        image_column, label_column, split_column: "auto" finds them by their names. Several label columns are classes
            with 0 or 1. A `split_column` of None leaves the splits to the shares.
        class_names: the classes in their order; None for the sorted labels.

    Raises ConfigError for columns that are not there, missing files, images that are listed twice, and labels that
    cannot be used.
    """
    path = Path(file).expanduser()
    table = _read(path, file)
    column = _image_column(table, file, image_column)
    split = _split_column(table, file, split_column, column)
    splits = _splits(table.text[split].tolist(), split) if split else ["train"] * len(table.text)
    labels = _labels(table, file, label_column, [column, split])
    if column == table.images:
        files, named = _embedded(path, table, column)
    else:
        files, found = _files(table.text[column].tolist(), file, Path(root), on_bad_image)
        labels, splits = [labels[row] for row in found], [splits[row] for row in found]
        named = [one.name for one in files]
    listed = [Listed(*one) for one in zip(labels, splits, named, strict=True)]
    plan = arranged(listed, class_names, "file", file)
    how = {"image_size": image_size, "on_bad_image": on_bad_image, "cache_dir": cache_dir, "resize": resize}
    return listed_source(files, plan, splits, "file", file, **how)


def _read(path: Path, file: str) -> Table:
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise ConfigError("file", file, "a CSV or Parquet file with a row for each image", problem)
    try:
        table = _read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _read_csv(path)
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise all kinds
        raise ConfigError("file", file, problem=f"not a readable table ({flat(error, 300)})") from error
    if table.text.empty and not (table.images and len(table.text)):
        raise ConfigError("file", file, "a header and a row for each image", "it has no rows")
    return table


def _read_csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as opened:
        header = opened.readline()
    separator = "\t" if path.suffix.lower() in (".tsv", ".tab") else max(",;\t|", key=header.count)
    # As text: 007 is a class, and so may NA be; a value is missing where there is nothing.
    text = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    return Table(text.fillna("").rename(columns=str.strip).apply(lambda column: column.str.strip()))


def _read_parquet(path: Path) -> Table:
    schema = pq.read_schema(path)
    images = [field.name for field in schema if _holds_images(field.type)]
    plain = [field.name for field in schema if not (pa.types.is_nested(field.type) or _holds_images(field.type))]
    columns = pq.read_table(path, columns=plain)
    text = {
        name: columns[name].cast(pa.string()).fill_null("").to_pylist()
        for name in plain
        if not pa.types.is_null(columns[name].type)
    }
    return Table(pd.DataFrame(text, index=range(len(columns))), images[0] if images else None)


def _holds_images(kind: pa.DataType) -> bool:
    """Whether values are bytes, or have some, as the images of Hugging Face's data sets do."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(table: Table, file: str, named: str) -> str:
    columns = [*([table.images] if table.images else []), *table.text.columns]
    if named != AUTO:
        return _existing("image_column", named, columns)
    if table.images:
        return table.images
    found = called(table.text.columns, NAME_COLUMNS)
    if not found:
        raise ConfigError("image_column", AUTO, "the column of file names", _has_columns(file, columns))
    return found[0]


def _split_column(table: Table, file: str, named: str | None, images: str) -> str | None:
    if named is None:
        return None
    if named != AUTO:
        return _existing("split_column", named, table.text.columns)
    found = [column for column in called(table.text.columns, SPLIT_COLUMNS) if column != images]
    if len(found) > 1:
        raise ConfigError("split_column", AUTO, "one of them, or null", f"{file} has {' and '.join(found)}")
    return found[0] if found else None


def _splits(names: Sequence[str], column: str) -> list[str]:
    """The splits that names stand for, such as Training and dev. Evaluation images are test images, or validation
    images where there are test images."""
    known = {name: split_named(name) for name in dict.fromkeys(names)}
    if unknown := [name or "nothing" for name, split in known.items() if split is None]:
        expected = "names such as train, validation and test in it; dataset.split_column=null leaves it out"
        raise ConfigError("split_column", column, expected, f"it has {shortened(unknown)}")
    evaluation = "validation" if "test" in known.values() else "test"
    return [evaluation if known[name] == "evaluation" else str(known[name]) for name in names]


def _labels(table: Table, file: str, named: str | list[str], taken: Sequence[str | None]) -> list[str | None]:
    """The label of each row, None where there is none."""
    if isinstance(named, list):
        return _one_hot(table, [_existing("label_column", name, table.text.columns) for name in named], named)
    free = [column for column in table.text.columns if column not in taken]
    if named != AUTO:
        found = [_existing("label_column", named, table.text.columns)]
    else:
        found = [column for column in called(table.text.columns, LABEL_COLUMNS) if column in free]
    if not found:
        binary = [column for column in free if set(table.text[column]) <= {"", "0", "1", "0.0", "1.0"}]
        if len(binary) > 1:
            if rest := set(free).difference(binary):
                log.info("dataset.file=%s: columns not read: %s", file, shortened(sorted(rest)))
            return _one_hot(table, binary, AUTO)
        found = free
    if len(found) != 1:
        several = f"{file} has several that could be: {', '.join(found)}" if found else _has_columns(file, free)
        raise ConfigError("label_column", AUTO, "the column of labels; dataset.label_column=… names it", several)
    return [label or None for label in table.text[found[0]]]


def _one_hot(table: Table, columns: Sequence[str], named: str | list[str]) -> list[str | None]:
    """From a column of 0 and 1 for each class to labels."""
    try:
        numbers = table.text[list(columns)].replace("", "nan").astype(float)
    except ValueError as error:
        raise ConfigError("label_column", named, "columns of 0 and 1, one for each class", flat(error)) from error
    is_missing = numbers.isna().all(axis=1)
    is_one = numbers.isin([0, 1]).all(axis=1) & (numbers.sum(axis=1) == 1)
    if wrong := (~(is_one | is_missing)).to_numpy().nonzero()[0].tolist():
        problem = f"{len(wrong)} of {len(numbers)} rows of {shortened(columns)} have not one 1 among zeros"
        problem += f" (row {wrong[0] + 1})"
        raise ConfigError("label_column", named, "one class for each image", problem)
    names = numbers.fillna(0).idxmax(axis=1).tolist()
    return [None if missing else str(name) for name, missing in zip(names, is_missing, strict=True)]


def _existing(key: str, name: str, columns: Sequence[str]) -> str:
    if name not in columns:
        raise ConfigError(key, name, f"one of the columns {', '.join(columns)}")
    return name


def _has_columns(file: str, columns: Sequence[str]) -> str:
    return f"the first line of {file} has {', '.join(columns)}" if len(columns) else f"{file} has no other column"


def _files(names: Sequence[str], file: str, top: Path, on_bad_image: str) -> tuple[list[ImageFile], list[int]]:
    """The files that the rows name, without those that do not exist, and their rows."""
    folders = _Folders()
    paths = [folders.find(os.path.normpath(top / name.replace("\\", "/"))) if name else None for name in names]
    if missing := [names[row] or f"row {row + 1}" for row, path in enumerate(paths) if path is None]:
        problem = f"{len(missing)} of the {len(names)} images that {file} lists are not there ({shortened(missing)})"
        if on_bad_image == "stop" or len(missing) == len(names):
            if near := folders.near(top, missing[0]):
                problem += f"; did you mean dataset.root={near}?"
            raise ConfigError("root", str(top), "the folder where file names start", problem)
        log.warning("dataset.on_bad_image=skip: %s, left out", problem)
    found = [(row, path) for row, path in enumerate(paths) if path is not None]
    counts = Counter(path for _, path in found)
    if doubled := [path for path, number in counts.items() if number > 1]:
        problem = f"{len(doubled)} images are listed more than once ({shortened(map(os.path.basename, doubled))})"
        raise ConfigError("file", file, "one row, with one label, for each image", problem)
    left_out = LeftOut("dataset.root", top)
    left_out.add(*folders.others(counts))
    left_out.report()
    root = Path(os.path.normpath(top))
    return [image_file(path, root, label=0) for _, path in found], [row for row, _ in found]


class _Folders:
    """The files of folders, each folder listed once."""

    def __init__(self) -> None:
        self.listed: dict[str, dict[str, list[str]]] = {}

    def find(self, path: str) -> str | None:
        """An existing file; of a name without an extension the only one that begins with it."""
        folder, name = os.path.split(path)
        found = self._content(folder).get(name, [])
        return found[0] if len(found) == 1 else None

    def near(self, top: Path, name: str) -> str | None:
        """The folder in `top` that has a file of this name."""
        folders = (str(folder) for folder in sorted(top.glob("*/")))
        return next((folder for folder in folders if self.find(os.path.join(folder, name))), None)  # noqa: PTH118

    def others(self, known: Counter[str]) -> list[str]:
        """What lies beside known files and is not one of them."""
        folders = {os.path.dirname(path) for path in known}  # noqa: PTH120 - for speed
        suffixes = {os.path.splitext(path)[1].lower() for path in known}  # noqa: PTH122
        paths = {path for folder in folders for found in self._content(folder).values() for path in found}
        return [path for path in paths - known.keys() if os.path.splitext(path)[1].lower() in suffixes]  # noqa: PTH122

    def _content(self, folder: str) -> dict[str, list[str]]:
        """The paths of a folder's files by their names, and by these without an extension where no file has that."""
        if folder not in self.listed:
            by_name: dict[str, list[str]] = {}
            try:
                names = [name for name in os.listdir(folder) if not is_left_by_system(name)]  # noqa: PTH208 - for speed
            except OSError:
                names = []
            for name in names:
                by_name.setdefault(os.path.splitext(name)[0], []).append(os.path.join(folder, name))  # noqa: PTH118, PTH122
            by_name |= {name: [os.path.join(folder, name)] for name in names}  # noqa: PTH118
            self.listed[folder] = by_name
        return self.listed[folder]


def _embedded(path: Path, table: Table, column: str) -> tuple[list[ImageFile], list[str | None]]:
    """The images in a Parquet file, and the names of their files, if it has them all and no two are the same."""
    stamp = image_file(str(path), path.parent, label=0).stamp
    names = _names_in(path, table, column)
    content = _Content(path, column)
    files = [
        ImageFile(name or f"row {row + 1}", 0, (*stamp, row), partial(content.read, row))
        for row, name in enumerate(names)
    ]
    return files, names


def _names_in(path: Path, table: Table, column: str) -> list[str | None]:
    if pa.types.is_struct(pq.read_schema(path).field(column).type):
        names = pq.read_table(path, columns=[f"{column}.path"])[column].combine_chunks().field("path").to_pylist()
        if all(names):
            return usable_names(names)
    found = called(table.text.columns, NAME_COLUMNS)
    return usable_names(table.text[found[0]].tolist() if found else [None] * len(table.text))


class _Content:
    """The encoded images of a Parquet file, which are read when the first one is needed."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self.lock = Lock()
        self.images: Any = None

    def read(self, row: int) -> bytes:
        with self.lock:
            if self.images is None:
                self.images = pq.read_table(self.path, columns=[self.column])[self.column]
        value = self.images[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise ValueError("no image in this row")
        return bytes(content)
