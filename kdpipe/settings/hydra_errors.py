"""Any error as one line that names the key, the value and what would be accepted."""

import difflib
import errno
import re
import sys
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdpipe.settings.config import CONF
from kdpipe.settings.identity import flatten


def one_line(error: BaseException) -> str:
    """What went wrong, for somebody who wants to mend a command and not to read kdpipe."""
    while isinstance(error, InstantiationException) and error.__cause__:
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException) and isinstance(error.__cause__, ValueError):
        error = error.__cause__  # of a resolver, `${identity:}`
    text = str(error).strip()
    first = text.split("\n")[0]
    if isinstance(error, MissingConfigException):
        return _unknown_option(error, first)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: this override cannot be read; key=value is accepted, lists as key=[1,2], "
            f"text with other characters than these in quotes, 'key=\"value\"' ({first})"
        )
    if isinstance(error, ConfigCompositionException | OmegaConfBaseException):
        return _bad_config(text)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"out of memory; lower train.batch_size or the images' size ({first})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"{where}{error.strerror}; what was there before is intact, and with more space, or another output_dir or "
            f"dataset.cache_dir, the same command goes on"
        )
    if "disk is full" in text:  # SQLite, whose errors MLflow hands on
        return (
            "the disk of the MLflow store is full; what was there before is intact, and with more space the same "
            "command goes on"
        )
    if isinstance(error, OSError) and error.filename is not None:
        keys = "output_dir, dataset.root and dataset.cache_dir"
        return f"{error.filename}: {error.strerror}; {keys} say where kdpipe reads and writes"
    if isinstance(error, ValueError):
        return " ".join(text.split())
    return f"{type(error).__name__}: {' '.join(text.split())} (HYDRA_FULL_ERROR=1 shows where)"


def _unknown_option(error: MissingConfigException, first: str) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return first
    options = error.options
    outer, _, inner = group.partition("/")
    if inner and outer != "hydra":  # experiment=benchmark/…, a folder in a group, in which Hydra does not look
        group, option = outer, f"{inner}/{option}"
        options = [f"{inner}/{file.stem}" for file in sorted((CONF / outer / inner).glob("*.yaml"))] or options
    near = _suggestion(option, options)
    return f"{group}={option}: {near}one of {', '.join(options)} is accepted"


def _bad_config(text: str) -> str:
    config = _composed(sys.argv[1:])
    if unknown := re.search(r"Could not override '([^']+)'", text):
        groups = [path.name for path in CONF.iterdir() if path.is_dir()]
        near = _suggestion(unknown[1], [*groups, *flatten(config)])
        return f"{unknown[1]}: there is no such key; {near}python -m kdpipe --cfg job lists all"
    given = [word.partition("=")[0] for word in sys.argv[1:]]
    if missing := [key for key, value in flatten(config).items() if value == "???" and key not in given]:
        return f"{missing[0]}: a value is needed, there is no default; {missing[0]}=… is accepted"
    lines = text.split("\n")
    return " ".join(" ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).split())


def _suggestion(word: str, known: Sequence[str]) -> str:
    """Near misses, the last part of a key counting by itself too (loss.alfa, alpha)."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.7)
    near += [key for key in known if key.rpartition(".")[2] == word.rpartition(".")[2] and key not in near]
    return f"did you mean {' or '.join(near[:3])}? " if near else ""


def _composed(arguments: list[str]) -> dict[str, Any]:
    """The plain config of the command's choice of groups, whatever else is wrong with the command."""
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    choices = [word for word in arguments if re.split("[=@]", word)[0] in groups and "=" in word and "," not in word]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_container(compose("config", choices), resolve=False)
    except Exception:  # only a help for the message of another error
        return {}
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
