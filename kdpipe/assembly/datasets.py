"""The data set, split."""

import logging
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from kdpipe.assembly.building import build, check_arguments
from kdpipe.data import ImageDataset, Source, split
from kdpipe.data.torch_dataset import check_map_style, torch_source
from kdpipe.data.unlabelled import with_its_unlabelled, with_unlabelled
from kdpipe.settings.components import find_target, parameters_of
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Component, DatasetSettings, Settings, validated

log = logging.getLogger("kdpipe")

OTHER_SPLITS = ("validation", "test")  # keys of the data sets of these splits
OF_KEY = {"dataset": "train"} | {f"dataset.{name}": name for name in OTHER_SPLITS}
# Keys of dataset=torch, which a data set gets only where it takes one of the same name.
OF_TORCH: dict[str, Any] = {
    **dict.fromkeys((*OTHER_SPLITS, "class_names", "image_size")),
    **{"on_bad_image": "stop", "resize": "squeeze", "cache_dir": tempfile.gettempdir()},
}


def build_data(settings: DatasetSettings) -> ImageDataset:
    """The data set, split; the runs of a sweep in one process share it."""
    return _read(_described(settings))


def _described(settings: DatasetSettings) -> str:
    """The settings that decide which images there are, as JSON."""
    return settings.model_dump_json(exclude_unset=True, by_alias=True, exclude={"sampler"})


@lru_cache(maxsize=1)
def _read(described: str) -> ImageDataset:
    settings = DatasetSettings.model_validate_json(described)
    log.info("data set %s", settings.name)
    if "root" in settings.arguments:
        if settings.arguments["root"] in (None, ""):
            raise ConfigError("dataset.root", settings.arguments["root"] or "", "a folder")
        root = str(Path(settings.root).expanduser())
        settings = validated(DatasetSettings, {**settings.plain, "root": root})
    source = _torch_source(settings) if _is_dataset(settings) else build("dataset", settings)
    if not isinstance(source, Source):
        expected = "a function that returns a kdpipe.data.Source, or a torch.utils.data.Dataset"
        raise ConfigError("dataset._target_", settings.target, expected)
    try:
        data = split(
            source,
            settings.name,
            train_fraction=settings.train_fraction,
            val_fraction=settings.val_fraction,
            test_fraction=settings.test_fraction,
            split_seed=settings.split_seed,
        )
    except ConfigError as error:
        raise error.under("dataset") from error
    sizes = ", ".join(f"{len(positions):,} {name}" for name, positions in data.splits.items())
    _, _, height, width = data.images.shape
    limit = "up to " if settings.resize == "keep" else ""
    classes = ", ".join(data.class_names[:10]) + (", …" if data.num_classes > 10 else "")
    shape = f"{limit}{width}×{height}×{data.image_shape[0]}"
    log.info("%d classes (%s); images of %s: %s", data.num_classes, classes, shape, sizes)
    for duplicates in data.duplicates:
        log.warning("data set %s: %s", settings.name, duplicates)
    return data


def check_dataset(settings: DatasetSettings) -> None:
    """Raise ConfigError where the data set does not exist or does not take its arguments: it is read later."""
    if not _is_dataset(settings):
        check_arguments("dataset", settings)
        return
    for key, part in _parts(settings).items():
        check_arguments(key, part)
        found = find_target(f"{key}._target_", part.target)
        if isinstance(found, type):
            try:
                check_map_style(found, part.target)
            except ConfigError as error:
                raise error.under(key) from error


def _is_dataset(settings: DatasetSettings) -> bool:
    """Whether the target is a `torch.utils.data.Dataset`, or is said to make one: no source has keys for the data sets
    of other splits."""
    found = find_target("dataset._target_", settings.target)
    return (isinstance(found, type) and issubclass(found, Dataset)) or {*OTHER_SPLITS} <= settings.arguments.keys()


def _parts(settings: DatasetSettings) -> dict[str, Component]:
    """The data sets of the splits, by their keys. That of another split has the first one's arguments, but for those
    that it states; with a `_target_` of its own it has its own alone."""
    arguments = settings.arguments
    given = {name: arguments.get(name) for name in OTHER_SPLITS}
    others = {f"dataset.{name}": node for name, node in given.items() if isinstance(node, Mapping)}
    own = {
        name: value
        for name, value in arguments.items()
        if f"dataset.{name}" not in others
        and (name not in OF_TORCH or (value is not None and _takes(settings.target, name)))
    }
    first = {"_target_": settings.target, **own}
    nodes = {key: dict(node) if "_target_" in node else {**first, **node} for key, node in others.items()}
    return {key: Component.model_validate(node) for key, node in ({"dataset": first} | nodes).items()}


def _takes(target: str, name: str) -> bool:
    return name in (parameters_of(find_target("dataset._target_", target)) or ())


def _torch_source(settings: DatasetSettings) -> Source:
    parts = {OF_KEY[key]: build(key, part) for key, part in _parts(settings).items()}
    values = OF_TORCH | settings.arguments
    try:
        return torch_source(parts, **{key: values[key] for key in OF_TORCH if key not in OTHER_SPLITS})
    except ConfigError as error:
        raise error.under("dataset") from error


def build_unlabelled(settings: Settings) -> ImageDataset:
    """The data set with its images without labels; the runs of a sweep in one process share it."""
    cache = settings.dataset.arguments.get("cache_dir", str(Path(settings.output_dir) / "cache" / "images"))
    return _read_unlabelled(_described(settings.dataset), cache)


@lru_cache(maxsize=1)
def _read_unlabelled(described: str, cache: str) -> ImageDataset:
    settings, data = DatasetSettings.model_validate_json(described), _read(described)
    if data.more and settings.unlabelled_root is not None:
        problem = "the data set has training images without a label itself"
        raise ConfigError("dataset.unlabelled_root", settings.unlabelled_root, "null", problem)
    on_bad_image = settings.arguments.get("on_bad_image", "stop")
    try:
        if data.more:
            data = with_its_unlabelled(data)
        else:
            how = (on_bad_image, cache, settings.resize, settings.arguments.get("image_size"))
            data = with_unlabelled(data, str(settings.unlabelled_root), *how)
    except ConfigError as error:
        raise error.under("dataset") from error
    log.info("images without labels: %s", f"{int((data.labels < 0).sum()):,}")
    return data


def forget_data() -> None:
    """Read the images anew: a new command may find others."""
    _read.cache_clear()
    _read_unlabelled.cache_clear()


def check_selection(settings: Settings, data: ImageDataset) -> None:
    """Raise ConfigError where weights or the last epoch are to be chosen and there is nothing to choose them by."""
    if "validation" in data.splits:
        return
    more = "dataset.val_fraction above 0 with it"
    if settings.train.select == "best":
        raise ConfigError("train.select", "best", f"{more}: weights are selected on validation images")
    if settings.train.early_stop is not None:
        raise ConfigError("train.early_stop", settings.train.early_stop, f"{more}: training stops by validation images")
