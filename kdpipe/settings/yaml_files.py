"""YAML files that may be somebody else's: a run's config among its artifacts, or next to exported weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdpipe.settings.components import ALLOW, check_targets, is_allowed, leaves
from kdpipe.settings.errors import MISSING, ConfigError, flat

# Ours have 1 kB and 50 values; aliases of YAML (*name) can make billions out of that.
MAX_YAML_BYTES = 1_000_000
MAX_YAML_VALUES = 10_000

# Of Hydra's own settings, those that a config from elsewhere may have, and among them those that it may not.
HYDRA_SETTINGS = ("hydra.mode", "hydra.sweeper.params", "hydra.launcher")
COMMANDS = ("hydra.launcher._target_", "hydra.launcher.setup", "hydra.launcher.additional_parameters")


def read_yaml(file: Path) -> dict[str, Any]:
    """The plain values in a YAML file, interpolations as text.

    Raises:
        ConfigError: not a config, or one that would become too large in memory.
    """
    try:
        if file.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(str(file), expected=f"a config of up to {MAX_YAML_BYTES / 1e6:g} MB")
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode | None):
            raise ConfigError(str(file), expected="keys with values, key: value")
        if _count(node, {}) > MAX_YAML_VALUES:
            raise ConfigError(str(file), expected=f"up to {MAX_YAML_VALUES:,} values, aliases (*name) written out")
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or flat(error)
        raise ConfigError(f"{file}{place}", problem=f"not readable as YAML ({reason})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), expected=f"text in UTF-8 ({error.reason} at byte {error.start})") from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(file), expected=f"keys and values that OmegaConf knows ({flat(error)})") from error
    except RecursionError as error:
        raise ConfigError(str(file), problem="nested too deeply for a config") from error
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def check_foreign(file: Path) -> None:
    """Raise ConfigError for a config from elsewhere (`--config-dir`) that names components which may not be built, or
    changes what Hydra itself runs and writes: its callbacks, log files, environment, commands of a launcher."""
    content = read_yaml(file)
    try:
        check_targets(content)
        own = content.get("hydra", {})
        in_package = re.search(r"^\s*#\s*@package\s+hydra\b", file.read_text(), re.MULTILINE)
        in_defaults = re.search(r"@_?(global_\.)?hydra\b", str(content.get("defaults")))
        if in_package or in_defaults or not isinstance(own, Mapping):
            _refuse_hydra("hydra", MISSING)
        for key, value in leaves(own, "hydra"):
            if not key.startswith(HYDRA_SETTINGS) or key.startswith(COMMANDS) or "\n" in f"{key}{value}":
                _refuse_hydra(key, value)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.key}", error.value, error.expected, error.problem) from error


def _refuse_hydra(key: str, value: object) -> None:
    if not is_allowed(key):
        allow = f"{ALLOW}={key} allows it, if you trust what it does"
        raise ConfigError(key, value, f"of Hydra's settings only {', '.join(HYDRA_SETTINGS)}; {allow}")


def _count(node: yaml.Node | None, known: dict[int, float]) -> float:
    """The values of a YAML document once all aliases are written out; infinitely many where it holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else [pair])]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))
