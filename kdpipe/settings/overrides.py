"""What was typed, where Hydra makes something else of it: names that look like numbers, numbers from the environment,
and `++` keys of a component that has no such key."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from kdpipe.settings.addresses import names_weights
from kdpipe.settings.components import accepted_arguments
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.identity import flatten
from kdpipe.settings.schema import (
    TEACHERS,
    Component,
    DatasetSettings,
    LossSettings,
    NetworkSettings,
    Section,
    Settings,
)
from kdpipe.settings.values import takes_text

COMPONENTS: dict[str, type[Section]] = {
    **dict.fromkeys(("model", "teacher"), NetworkSettings),
    "dataset": DatasetSettings,
    "loss": LossSettings,
    **dict.fromkeys(("also", "optimizer", "scheduler", "augmentation"), Component),
}


def _types(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a section, with those of the sections in it, and their types."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key, field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _types(field.annotation, f"{key}.")


TYPES = {
    **dict(_types(Settings)),
    **{f"teacher.{key}": kind for part in (NetworkSettings, *TEACHERS.values()) for key, kind in _types(part)},
}
# Keys whose values are names, paths or lists of them. A component's own arguments have no types here.
TEXT_KEYS = {
    *(key for key, kind in TYPES.items() if takes_text(kind)),
    *(f"{network}.{key}" for network in ("model", "teacher") for key in ("architecture", "stages")),
    *("dataset.root", "dataset.cache_dir", "dataset.file", "dataset.path", "dataset.subset", "dataset.revision"),
    *(f"dataset.{key}" for key in ("image_column", "label_column", "split_column", "class_names")),
}
# A word that is one value, or one item of a list; text in quotes first, in which there are no values to find.
_WORD = re.compile(
    r"""(?P<quoted>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|(?<![^,\[])(?P<space>\s*)(?P<word>[^\s,\[\](){}'"=]+)(?=\s*(?:[,\]]|$))"""
)


def names_as_typed(override: str) -> str:
    """An override with quotes around names that Hydra would read as numbers: dataset.root=2024_05_01 would be 20240501,
    output_dir=1e3 would be 1000.0. Others stay as they are."""
    key, equals, value = override.partition("=")
    if key.lstrip("+") not in TEXT_KEYS or value.startswith(("range(", "interval(", "choice(")):
        return override
    parser = OverridesParser.create()

    def in_quotes(match: re.Match[str]) -> str:
        if match["quoted"]:
            return match[0]
        try:
            is_text = isinstance(parser.parse_rule(match["word"], "primitive"), str | None)
        except HydraException:
            is_text = True
        return match[0] if is_text else f"{match['space']}'{match['word']}'"

    return f"{key}{equals}{_WORD.sub(in_quotes, value)}"


def restore_names(config: DictConfig, files: Sequence[Path]) -> None:
    """Put the text of YAML files back where a name was read as a number.

    Args:
        config: before its interpolations are resolved; it is changed.
        files: those that it was composed from.

    Raises:
        ConfigError: the text is not known: other values depend on it already, or it stands in several files.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    flat = flatten({str(key): value for key, value in raw.items()})
    for key in TEXT_KEYS & flat.keys():
        value = flat[key]
        if not isinstance(value, int | float):  # true and false are numbers, too
            continue
        texts = {text for file in files for text in _texts_in(file, key.split("."), value)}
        if key == "output_dir" or len(texts) != 1:  # which names the run's folder before there are settings
            raise ConfigError(key, value, f"text; in YAML a name that looks like a number has quotes, {key}: '…'")
        OmegaConf.update(config, key, texts.pop())


def _texts_in(file: Path, path: Sequence[str], value: object) -> Iterator[str]:
    """The text of a value under a key in a file, which may be that of the key's section."""
    for names in (path, path[1:]):
        node: Any = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        for name in names:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            node = next((inner for key, inner in pairs if key.value == name), None)
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            parsed = OmegaConf.to_container(OmegaConf.create(f"value: {node.value}"), resolve=False)
            if parsed == {"value": value}:
                yield node.value


def read_numbers(plain: dict[str, Any], raw: Mapping[str, Any], prefix: str = "") -> None:
    """Read what the environment holds (`${oc.env:SEED}`, which is text) as a value, where the key takes no text.

    Args:
        plain: a config, which is changed.
        raw: the same with its interpolations.
    """
    arguments = accepted_arguments(plain) or {}
    for name, value in plain.items():
        key, before = f"{prefix}{name}", raw.get(name)
        if isinstance(value, dict) and isinstance(before, Mapping):
            read_numbers(value, before, f"{key}.")
        elif isinstance(value, str) and str(before).startswith("${oc.env:") and str(before).endswith("}"):
            takes_values = key in TYPES or not takes_text(arguments.get(name, Any))
            if key not in TEXT_KEYS and name != "_target_" and takes_values:
                plain[name] = _decoded(str(before), value)


def _decoded(interpolation: str, text: str) -> object:
    try:
        value = OmegaConf.create({"value": f"${{oc.decode:{interpolation}}}"}).value
    except OmegaConfBaseException:  # text that is no value, such as one with a comma
        return text
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def leave_out(plain: dict[str, Any], overrides: Sequence[str]) -> None:
    """Leave out the `++` keys that a component does not have: a sweep over losses may set what some of them have."""
    for key in _forced(overrides):
        section, _, inner = key.partition(".")
        values, name = plain.get(section), inner.partition(".")[0]
        if not isinstance(values, dict) or names_weights(values.get("weights")):  # the network is the run's
            continue
        if section == "also" and "_target_" not in values:  # there is no second method
            del plain["also"]
        elif not _has_argument(section, values, name):
            values.pop(name, None)


def _has_argument(section: str, values: Mapping[str, Any], name: str) -> bool:
    """Whether the component in a section of the config takes a value."""
    if name in ("_target_", "_partial_"):
        return True
    is_special = values.get("_target_") in TEACHERS  # its keys are those of its settings alone
    model = TEACHERS[values["_target_"]] if is_special else COMPONENTS[section]
    if name in model.model_fields:
        return True
    accepted = accepted_arguments(values)
    return not is_special and (accepted is None or name in accepted)


def _forced(overrides: Sequence[str]) -> list[str]:
    """The keys of components that are set with ++."""
    keys = [override.partition("=")[0][2:] for override in overrides if override.startswith("++")]
    return [key for key in keys if key.partition(".")[0] in COMPONENTS and "." in key]


def left_out(overrides: Sequence[str], settings: Settings) -> list[str]:
    """The `++` keys that the settings do not have, as `leave_out` left them."""
    plain = settings.plain
    missing = []
    for key in _forced(overrides):
        section, _, inner = key.partition(".")
        if inner.partition(".")[0] not in (plain.get(section) or {}):
            missing.append(key)
    return missing
