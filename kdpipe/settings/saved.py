"""The settings of a finished run, from the config that it kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.settings.components import check_targets
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Component, NetworkSettings, Section, Settings, validated
from kdpipe.settings.yaml_files import read_yaml

NETWORK = ("_target_", "name", "image_size", "mean", "std")


def read_run_settings(file: Path) -> Settings:
    """The settings of the run that kept this config.

    Raises:
        ConfigError: not the config of a run, or one that names what may not be built: it may be somebody else's.
    """
    return validated(Settings, _known(_read(file), Settings), str(file))


def read_network_settings(file: Path, section: str = "model") -> NetworkSettings:
    """The settings of the network that the run trained; with "teacher" those of its second student."""
    return validated(NetworkSettings, _read(file)[section], f"{file}: {section}")


def _read(file: Path) -> dict[str, Any]:
    content = read_yaml(file)
    network = content.get("model")
    if not isinstance(network, Mapping) or not set(NETWORK) <= network.keys() or "${" in str(content):
        raise ConfigError(str(file), expected=f"the config of a run, with its model's {', '.join(NETWORK)}")
    check_targets(content)
    return content


def _known(values: Mapping[str, Any], model: type[Section]) -> dict[str, Any]:
    """Without the keys of other versions."""
    known: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in values:
            value, inner = values[name], field.annotation
            if isinstance(inner, type) and issubclass(inner, Section) and not issubclass(inner, Component):
                value = _known(value, inner)
            known[name] = value
    return known
