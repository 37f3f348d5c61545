"""A teacher's answers in a file, as an API, another framework or a script has written them."""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from kdpipe.data.dataset import ImageDataset, PerImageValues
from kdpipe.settings.errors import ConfigError, first_line, shortened
from kdpipe.settings.values import composed

log = logging.getLogger("kdpipe")

FORMATS = (".npz", ".parquet", ".csv")
NAMES = ("image", "name", "file")  # the column with the images' names, or their positions
POSITIONS = "index"
KINDS = ("logits", "probabilities")
OFF_BY = 0.01  # how far the probabilities of an image may be from one in sum, as those with two digits are


@dataclass(frozen=True)
class Rows:
    """What a file says of n images.

    Attributes:
        images: their names, or their positions in the data set, int64.
        values: [n, columns].
        columns: the names of the classes; None for those of the data set.
        kind: "logits" or "probabilities"; "auto" where the file does not say.
    """

    images: pd.Index
    values: NDArray[np.number]
    columns: Sequence[str] | None
    kind: str


def read_answers(data: ImageDataset, file: str, values: str, floor: float) -> PerImageValues:
    """The answers in a file for the images of a data set, as logits, float32 [n, classes].

    A `.npz` has `logits` or `probabilities` [N, classes], optionally `names` or `index` (by default positions 0 … N−1)
    and `class_names` (by default the data set's). A table (`.parquet`, `.csv`) has a column `image`, `name`, `file` or
    `index`, and one for each class, by its name or by numbers from 0.

    Args:
        values: "logits", "probabilities", or "auto": probabilities where none is below 0 or above 1.
        floor: probabilities below it count as this much.

    Raises:
        ConfigError: the file cannot be read, lacks training images, or has anything that does not belong to the data
            set; the key is relative to the teacher's section.
    """
    path = Path(file).expanduser()
    try:
        rows = _read_npz(path) if path.suffix == ".npz" else _read_table(path, data.class_names)
        found = rows.values if rows.columns is None else rows.values[:, _places(rows.columns, data)]
        if found.shape[1] != data.num_classes:
            known = f"{data.num_classes} ({shortened(data.class_names)})"
            raise ValueError(f"it has {found.shape[1]} classes; {data.name} has {known}")
        kind = _kind(found, rows.kind if values == "auto" else values)
        images, known = _matched(rows.images, data)
    except ValueError as error:
        raise ConfigError("file", file, problem=str(error)) from error
    if problems := [*_problems_of_images(images, known, data), *_problems_of_values(found, kind, images)]:
        raise ConfigError("file", file, problem="; ".join(problems))
    places = images.get_indexer(known)
    positions = np.flatnonzero(places >= 0)
    logits, raised = found[places[positions]], ""
    if kind == "probabilities":
        below = float((logits < floor).mean())
        raised = f", {100 * below:.2g} % of them below teacher.floor={floor:g}" if below else ""
        logits = np.log(np.maximum(logits, floor, dtype=np.promote_types(logits.dtype, np.float32)))
    log.info("teacher: %s for %s images from %s%s", kind, f"{len(positions):,}", path.name, raised)
    return PerImageValues(torch.from_numpy(positions), torch.from_numpy(logits.astype(np.float32)))


def digest_of_file(file: str) -> str:
    """16 hex digits that identify the content of a file of answers; computed once per process while the file's size,
    time of modification and inode stay the same. Raises ConfigError if there is no such file."""
    path = Path(file).expanduser()
    if path.suffix not in FORMATS:
        raise ConfigError("file", file, f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file")
    if not path.is_file():
        raise ConfigError("file", file, f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file", "file not found")
    status = path.stat()
    return _digest(path, (status.st_size, status.st_mtime_ns, status.st_ino))


@cache
def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def _read_npz(path: Path) -> Rows:
    try:
        with np.load(path, allow_pickle=False) as content:  # a pickle can run code
            arrays = {name: content[name] for name in content.files}
    except Exception as error:  # NumPy raises all kinds for damaged archives, and those of something else
        raise ValueError(f"not a readable .npz file of numbers and text ({first_line(error)})") from error
    kinds = [name for name in KINDS if name in arrays]
    if len(kinds) != 1:
        raise ValueError(f"it has the arrays {shortened(arrays)}; expected logits or probabilities, with one of them")
    values = arrays[kinds[0]]
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        raise ValueError(f"its {kinds[0]} are {values.dtype} {list(values.shape)}; expected numbers [N, classes]")
    if "names" in arrays and POSITIONS in arrays:
        raise ValueError("it has both names and index; expected one of them")
    images = arrays.get("names", arrays.get(POSITIONS, np.arange(len(values))))
    if images.shape != (len(values),):
        raise ValueError(f"its images are {list(images.shape)}, its {kinds[0]} {list(values.shape)}")
    columns = arrays["class_names"].astype(str).tolist() if "class_names" in arrays else None
    if columns is not None and len(columns) != values.shape[1]:
        raise ValueError(f"it has {len(columns)} class_names for {values.shape[1]} columns of {kinds[0]}")
    return Rows(_index(images), values, columns, kinds[0])


def _read_table(path: Path, class_names: Sequence[str]) -> Rows:
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
            is_number = frame.index.name is None and not {*NAMES, POSITIONS}.isdisjoint(frame.columns)  # of a row
            frame = frame.reset_index(drop=is_number or isinstance(frame.index, pd.RangeIndex))
        else:
            frame = pd.read_csv(path, dtype=dict.fromkeys(NAMES, str))  # a name such as 0017 is text
    except Exception as error:  # pandas and pyarrow raise all kinds
        raise ValueError(f"not a readable {path.suffix} file ({first_line(error)})") from error
    frame.columns = frame.columns.map(str)
    if frame.empty:
        raise ValueError("it has no rows")
    own = [name for name in (*NAMES, POSITIONS) if name in frame.columns and name not in class_names]
    if len(own) != 1:
        found = " and ".join(own) or f"none of them, but {shortened(frame.columns)}"
        raise ValueError(f"expected one column image, name, file or index, for what the row is about; it has {found}")
    answers = frame.drop(columns=own)
    if text := [name for name, kind in answers.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]:
        raise ValueError(f"its column {text[0]} has other values than numbers")
    values = answers.to_numpy()
    if values.dtype == object:  # of pandas' own types, in which a value may be missing
        values = answers.to_numpy(np.float64, na_value=np.nan)
    return Rows(_index(frame[own[0]].to_numpy()), values, list(answers.columns), "auto")


def _index(images: NDArray[np.generic]) -> pd.Index:
    """The images of the rows, positions as int64 and names as composed text."""
    if np.issubdtype(images.dtype, np.integer):
        return pd.Index(images.astype(np.int64))
    if missing := int(pd.isna(images).sum()):
        raise ValueError(f"{missing} of its {len(images):,} rows do not say which image they are about")
    return pd.Index(composed(images.astype(str)), dtype=object)


def _matched(images: pd.Index, data: ImageDataset) -> tuple[pd.Index, pd.Index]:
    """The images of the rows, and all the images of a data set in its order: by name, or by position where the rows
    have numbers, or text that is a number and no image's name."""
    names, positions = pd.Index(composed(data.names), dtype=object), pd.RangeIndex(len(data.labels))
    if images.dtype == np.int64:
        return images, positions
    if images.str.fullmatch(r"[0-9]{1,18}").all() and not images.isin(names).any():
        return images.astype(np.int64), positions
    if not len(names):
        raise ValueError(f"the images of {data.name} have no names; expected their positions, 0 to {positions[-1]}")
    if names.has_duplicates:
        several = names[names.duplicated()][0]
        raise ValueError(f"more than one image of {data.name} is called {several}; expected positions (index)")
    return images, names


def _places(columns: Sequence[str], data: ImageDataset) -> list[int]:
    """The column of each class.

    Raises:
        ValueError: columns that are named neither as the classes nor by numbers from 0.
    """
    given, wanted = composed(columns), composed(data.class_names)
    if sorted(given) == sorted(wanted):
        return [given.index(name) for name in wanted]
    numbered = [re.fullmatch(r"(\D*)(\d+)", name) for name in given]
    if all(numbered) and len({match[1] for match in numbered if match}) == 1:
        numbers = [int(match[2]) for match in numbered if match]
        if sorted(numbers) == list(range(len(numbers))):
            return [numbers.index(number) for number in range(len(numbers))]
    problems = []
    if unknown := [name for name in given if name not in wanted]:
        problems.append(f"{shortened(unknown)} {'is no class' if len(unknown) == 1 else 'are no classes'}")
    if missing := [name for name in wanted if name not in given]:
        problems.append(f"no column for {shortened(missing)}")
    if twice := sorted({name for name in given if given.count(name) > 1}):
        problems.append(f"{shortened(twice)} more than once")
    classes = f"the {data.num_classes} classes of {data.name} are {shortened(data.class_names)}"
    raise ValueError(f"among its columns {', '.join(problems)}; {classes}")


def _kind(values: NDArray[np.number], kind: str) -> str:
    """Whether values [n, classes] are logits or probabilities; of values that are not finite either is wrong.

    Raises:
        ValueError: they are per cent.
    """
    if kind != "auto" or not len(values) or values.min() < 0:
        return "logits" if kind == "auto" else kind
    if values.max() <= 1 + OFF_BY:
        return "probabilities"
    if np.allclose(values.sum(axis=1, dtype=np.float64), 100, atol=100 * OFF_BY):
        raise ValueError("its rows sum to 100; expected probabilities from 0 to 1, or teacher.values=logits")
    return "logits"


def _problems_of_images(images: pd.Index, known: pd.Index, data: ImageDataset) -> Iterator[str]:
    """What is wrong with the images that the rows are about."""
    if images.has_duplicates:
        twice = images[images.duplicated()].unique()
        yield f"more than one row for {_number(twice)} ({shortened(twice)})"
    rows = images.unique()
    train = known[data.splits["train"].sort().values.numpy()]
    if len(missing := train[rows.get_indexer(train) < 0]):
        yield f"no answer for {len(missing):,} of {len(train):,} training images ({shortened(missing)})"
    if len(unknown := rows[known.get_indexer(rows) < 0]):
        yield f"{_number(unknown)} not among {known[0]} to {known[-1]} of {data.name} ({shortened(unknown)})"


def _problems_of_values(values: NDArray[np.number], kind: str, images: pd.Index) -> Iterator[str]:
    """What is wrong with values [n, classes]."""
    # As they are used; a larger number is infinite in float32.
    with np.errstate(over="ignore"):
        is_wrong = ~np.isfinite(values.astype(np.float32, copy=False)).all(axis=1)
    if is_wrong.any():
        yield f"NaN or infinite values for {_number(images[is_wrong])} ({shortened(images[is_wrong])})"
    if kind != "probabilities":
        return
    is_negative = (values < 0).any(axis=1)
    if is_negative.any():
        yield f"probabilities below 0 for {_number(images[is_negative])} ({shortened(images[is_negative])})"
    sums = values.sum(axis=1, dtype=np.float64)
    if (is_off := (abs(sums - 1) > OFF_BY) & ~is_wrong).any():
        first = f"{images[is_off][0]}: {sums[is_off][0]:.4g}; teacher.values=logits takes them as logits"
        yield f"probabilities that do not sum to 1 for {_number(images[is_off])} ({first})"


def _number(images: pd.Index) -> str:
    return f"{len(images):,} image{'s' * (len(images) > 1)}"
