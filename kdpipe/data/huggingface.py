"""Data sets of Hugging Face's `datasets`, which is an extra: from the hub, its cache, or local files."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from kdpipe.data.dataset import Source
from kdpipe.data.decode import ImageFile, ImageSize, OnBadImage, image_file
from kdpipe.data.folders import split_named
from kdpipe.data.listed import AUTO, NAME_COLUMNS, SPLITS, Listed, arranged, called, listed_source, usable_names
from kdpipe.settings.errors import ConfigError, first_line, one_of, shortened
from kdpipe.settings.values import StoredResize, checked
from kdpipe.system.hub import without_retries
from kdpipe.system.silence import quiet

if TYPE_CHECKING:
    from datasets import Dataset, Features

log = logging.getLogger("kdpipe")

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
WHERE = "a data set on the Hub (USER/NAME), a folder of save_to_disk, of images or of Parquet files, or a Parquet file"


@checked
def huggingface(
    path: str,
    subset: str | None,
    revision: str | None,
    data_files: str | list[str] | dict[str, str | list[str]] | None,
    splits: dict[str, str] | None,
    image_column: str,
    label_column: str,
    class_names: list[str] | None,
    image_size: ImageSize | None,
    on_bad_image: OnBadImage,
    cache_dir: str,
    resize: StoredResize = "squeeze",
) -> Source:
    """Images as uint8 [N, 3, H, W] of a data set that `datasets` reads; without a network from its cache.

    Args:
        path, subset, revision, data_files: as for `datasets.load_dataset`, which calls the second `name`; or a folder
            of `save_to_disk`, or one Parquet file.
        splits: the names of the splits to use as train, validation and test; None for those of these names.
        image_column, label_column: "auto" finds them by their type, `Image` and `ClassLabel`.
        class_names: the classes in their order; None for that of the `ClassLabel`, or the sorted labels.

    Raises ConfigError for a data set that cannot be read, and columns or splits that are not as expected.
    """
    with quiet():
        found = _load(path, subset, revision, data_files)
    parts = _splits(found, path, splits)
    files: list[ImageFile] = []
    listed: list[Listed] = []
    for split, part in parts.items():
        image = _column("image_column", image_column, part.features, "Image")
        label = _column("label_column", label_column, part.features, "ClassLabel")
        labels, order = _labels(part, label)
        class_names = class_names or order
        some, names = _images(part, image, Path(path).expanduser(), split, labels)
        files += some
        listed += [Listed(label, split, name) for label, name in zip(labels, names, strict=True)]
    plan = arranged(listed, class_names, "path", path)
    how = {"image_size": image_size, "on_bad_image": on_bad_image, "cache_dir": cache_dir, "resize": resize}
    return listed_source(files, plan, [one.split for one in listed], "path", path, **how)


def _load(
    path: str,
    subset: str | None,
    revision: str | None,
    data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None,
) -> "dict[str, Dataset]":
    """The splits of a data set by their names."""
    try:
        import datasets
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        problem = "Hugging Face's datasets are not installed; pip install 'kdpipe[huggingface]'"
        raise ConfigError("path", path, problem=problem) from error
    datasets.disable_progress_bars()
    disable_progress_bars()
    local = Path(path).expanduser()
    try:
        if any((local / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(local))
        elif local.is_file():
            if local.suffix.lower() not in BUILDERS:
                raise ConfigError("path", path, WHERE, "dataset=csv reads tables" if local.suffix == ".csv" else "")
            found = datasets.load_dataset(BUILDERS[local.suffix.lower()], data_files=str(local))
        elif local.exists():
            found = datasets.load_dataset(str(local), name=subset, data_files=data_files)
        else:
            with without_retries():
                found = datasets.load_dataset(path, name=subset, revision=revision, data_files=data_files)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # from readers of all kinds of files, and from the network
        raise ConfigError("path", path, WHERE, f"it cannot be read ({first_line(error)})") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _splits(found: "Mapping[str, Dataset]", path: str, named: Mapping[str, str] | None) -> "dict[str, Dataset]":
    """The data sets of our splits. A single one of any name is the training images."""
    if named is not None:
        for split, name in named.items():
            if split not in SPLITS or name not in found:
                key, value, choices = ("splits", split, SPLITS) if split not in SPLITS else (split, name, [*found])
                raise ConfigError(key if key == "splits" else f"splits.{key}", value, one_of(choices))
        chosen = dict(named)
    else:
        chosen = {}
        for name in found:
            meant = "train" if len(found) == 1 else split_named(name)
            if meant == "evaluation":
                meant = next((free for free in ("test", "validation") if free not in map(split_named, found)), None)
            if meant:
                chosen.setdefault(meant, name)
    if "train" not in chosen:
        expected = "a split train, or one that dataset.splits={train:NAME} names"
        raise ConfigError("splits", named and dict(named), expected, f"{path} has {', '.join(found)}")
    if others := [name for name in found if name not in chosen.values()]:
        log.warning("dataset.path=%s: splits not read: %s", path, shortened(others))
    return {split: found[chosen[split]] for split in SPLITS if split in chosen}


def _column(key: str, named: str, features: "Features", kind: str) -> str:
    """A column by its name, or the only one of a type."""
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if named != AUTO:
        if named not in features:
            raise ConfigError(key, named, f"one of the columns {', '.join(features)}")
        return named
    if len(of_kind) != 1:
        plain = {"label", "labels", "class", "target"} & features.keys() if kind == "ClassLabel" else set()
        if not of_kind and len(plain) == 1:  # text or numbers
            return plain.pop()
        problem = f"of the columns {', '.join(features)} {' and '.join(of_kind) or 'none'} has the type {kind}"
        raise ConfigError(key, AUTO, f"one {kind}; dataset.{key}=… names a column", problem)
    return of_kind[0]


def _labels(part: "Dataset", column: str) -> tuple[list[Any], list[str] | None]:
    """The label of each row, None where there is none, and the classes in their order, if the data set knows them."""
    labels = part.data.column(column).to_pylist()
    names = getattr(part.features[column], "names", None)
    if names is None:
        if wrong := next((one for one in labels if not isinstance(one, str | int | None)), None):
            raise ConfigError("label_column", column, "a class for each image", f"it has {wrong!r}")
        return labels, None
    return [None if label is None or label < 0 else names[label] for label in labels], list(names)


def _images(
    part: "Dataset", column: str, top: Path, split: str, labels: Sequence[Any]
) -> tuple[list[ImageFile], list[str | None]]:
    """The images of a split, and the names that they are sorted by, if they have them and no two are the same."""
    import datasets

    with quiet():
        encoded = part.cast_column(column, datasets.Image(decode=False)).data.column(column)
    places = pc.struct_field(encoded, "path").to_pylist()
    is_file = pc.is_null(pc.struct_field(encoded, "bytes")).to_pylist()
    if not all(places) and (found := [name for name in called(part.column_names, NAME_COLUMNS) if name != column]):
        places = [None if name is None else str(name) for name in part.data.column(found[0]).to_pylist()]
    # Stamps of the files that `datasets` maps into memory change with their content.
    stamps = [image_file(cached["filename"], top, label=0).stamp for cached in part.cache_files]
    stamp = int(hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:12], 16)
    files = []
    for row, (place, outside, label) in enumerate(zip(places, is_file, labels, strict=True)):
        if outside and place and Path(place).is_file():
            files.append(image_file(place, top.absolute(), label=0))
        else:
            name = f"{split}/{label}/{place}" if place else f"{split} image {row}"
            files.append(ImageFile(name, 0, (stamp, row), partial(_content, encoded, row)))
    names = usable_names([file.name if place else None for file, place in zip(files, places, strict=True)])
    if None in names:  # each file has a name of its own
        files = [replace(file, name=f"{split} image {row}") for row, file in enumerate(files)]
    return files, names


def _content(encoded: Any, row: int) -> bytes:
    value = encoded[row].as_py() or {}
    if value.get("bytes") is None:
        raise ValueError(f"{value['path']} does not exist" if value.get("path") else "no image in this row")
    return bytes(value["bytes"])
