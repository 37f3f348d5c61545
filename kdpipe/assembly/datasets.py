"""The data set that the config names."""

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from kdpipe.data import ImageDataset, split
from kdpipe.data.unlabelled import with_unlabelled
from kdpipe.settings import config as settings

log = logging.getLogger("kdpipe")


def build_data(dataset: DictConfig) -> ImageDataset:
    """The data set that the config names, split; the runs of a sweep in one process share it."""
    return _read_data(json.dumps(plain(dataset)))


@lru_cache(maxsize=1)
def _read_data(described: str) -> ImageDataset:
    dataset = json.loads(described)
    log.info("data set %s", dataset["name"])
    arguments = {key: value for key, value in dataset.items() if key not in (*settings.SPLITTING, settings.UNLABELLED)}
    if "root" in arguments:
        if arguments["root"] in (None, ""):
            raise ValueError(f"dataset.root={arguments['root'] or ''}: a folder is accepted")
        arguments["root"] = str(Path(str(arguments["root"])).expanduser())
    data = split(instantiate(arguments), **{key: dataset[key] for key in settings.SPLITTING})
    sizes = ", ".join(f"{len(positions):,} {name}" for name, positions in data.splits.items())
    _, channels, height, width = data.images.shape
    classes = ", ".join(data.class_names[:10]) + (", …" if data.num_classes > 10 else "")
    log.info("%d classes (%s); images of %d×%d×%d: %s", data.num_classes, classes, width, height, channels, sizes)
    return data


def build_unlabelled(config: DictConfig) -> ImageDataset:
    """The data set with the images that have no label; the runs of a sweep in one process share it."""
    cache = Path(config.output_dir) / "cache" / "images"
    return _read_unlabelled(json.dumps(plain(config.dataset)), config.dataset.get("cache_dir", str(cache)))


@lru_cache(maxsize=1)
def _read_unlabelled(described: str, cache: str) -> ImageDataset:
    dataset, data = json.loads(described), _read_data(described)
    data = with_unlabelled(data, str(dataset[settings.UNLABELLED]), dataset.get("on_bad_image", "stop"), cache)
    log.info("images without a label: %s", f"{int((data.labels < 0).sum()):,}")
    return data


def forget_data() -> None:
    """Read the images anew: a new command may find others."""
    _read_data.cache_clear()
    _read_unlabelled.cache_clear()


def check_selection(train: DictConfig, data: ImageDataset) -> None:
    """Raise ValueError where weights are to be chosen and there is nothing to choose them on."""
    if train.select == "best" and "validation" not in data.splits:
        raise ValueError("train.select=best: chosen on validation images, so dataset.val_fraction above 0 is accepted")


def plain(part: DictConfig) -> dict[str, Any]:
    """A part of the config as plain values."""
    return {str(key): value for key, value in OmegaConf.to_container(part, resolve=True).items()}  # type: ignore[union-attr]
