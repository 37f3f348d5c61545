"""The data set, split."""

import logging
from functools import lru_cache
from pathlib import Path

from kdpipe.assembly.building import build
from kdpipe.data import ImageDataset, Source, split
from kdpipe.data.unlabelled import with_unlabelled
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import DatasetSettings, Settings, validated

log = logging.getLogger("kdpipe")


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
    source = build("dataset", settings)
    if not isinstance(source, Source):
        raise ConfigError("dataset._target_", settings.target, "a function that returns a kdpipe.data.Source")
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
    _, channels, height, width = data.images.shape
    classes = ", ".join(data.class_names[:10]) + (", …" if data.num_classes > 10 else "")
    log.info("%d classes (%s); images of %d×%d×%d: %s", data.num_classes, classes, width, height, channels, sizes)
    for duplicates in data.duplicates:
        log.warning("data set %s: %s", settings.name, duplicates)
    return data


def build_unlabelled(settings: Settings) -> ImageDataset:
    """The data set with its images without labels; the runs of a sweep in one process share it."""
    cache = settings.dataset.arguments.get("cache_dir", str(Path(settings.output_dir) / "cache" / "images"))
    return _read_unlabelled(_described(settings.dataset), cache)


@lru_cache(maxsize=1)
def _read_unlabelled(described: str, cache: str) -> ImageDataset:
    settings, data = DatasetSettings.model_validate_json(described), _read(described)
    on_bad_image = settings.arguments.get("on_bad_image", "stop")
    try:
        data = with_unlabelled(data, str(settings.unlabelled_root), on_bad_image, cache)
    except ConfigError as error:
        raise error.under("dataset") from error
    log.info("images without labels: %s", f"{int((data.labels < 0).sum()):,}")
    return data


def forget_data() -> None:
    """Read the images anew: a new command may find others."""
    _read.cache_clear()
    _read_unlabelled.cache_clear()


def check_selection(settings: Settings, data: ImageDataset) -> None:
    """Raise ConfigError where weights are to be selected and there is nothing to select them on."""
    if settings.train.select == "best" and "validation" not in data.splits:
        expected = "dataset.val_fraction above 0 with it: weights are selected on validation images"
        raise ConfigError("train.select", "best", expected)
