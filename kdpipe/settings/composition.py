"""From a command line to typed settings: the only code below the command line that knows Hydra's configs."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdpipe.settings.components import check_targets
from kdpipe.settings.credentials import put_away, without_password, without_passwords
from kdpipe.settings.errors import ConfigError, first_line, flat, one_line, one_of, suggestion
from kdpipe.settings.identity import flatten, temperature_of
from kdpipe.settings.schema import Settings, validated

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel it is inside the package, in a checkout next to it.
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
SECTIONS = ("teacher", "train", "evaluation", "distillation", "sweep", "tracking")


def read_settings(config: DictConfig) -> Settings:
    """The typed settings of a composed config.

    Raises:
        ConfigError: a value that cannot be used, or a component that may not be built.
        OmegaConfBaseException: a required value that is missing (see `explain`).
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    composed = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    assert isinstance(composed, dict)
    plain = {str(key): value for key, value in composed.items()}
    check_targets(plain)
    for key in SECTIONS:
        if not isinstance(plain.get(key, {}), dict):
            hint = "model@teacher=… chooses the teacher" if key == "teacher" else f"{key}.<key>=… sets a value in it"
            raise ConfigError(key, plain[key], problem=f"this is a section; {hint}")
    tracking = plain.get("tracking", {})
    if isinstance(tracking.get("uri"), str):
        plain["tracking"] = tracking | {"uri": put_away(tracking["uri"])}
    return validated(Settings, plain)


def to_plain(value: object) -> object:
    """A value of a composed config as Python's own lists, dictionaries and values."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


@dataclass(frozen=True)
class Invocation:
    """How Hydra composed a run's settings.

    Attributes:
        overrides: those of the command, or of a cell of a sweep.
        choices: the options of the groups, by group.
        config_dirs: folders that the command added.
        launcher: the target of the launcher of a sweep.
    """

    overrides: Sequence[str]
    choices: Mapping[str, str | None]
    config_dirs: Sequence[str]
    launcher: str

    @classmethod
    def of(cls, config: DictConfig | HydraConf) -> Self:
        """From Hydra's own part of a config."""
        sources = config.runtime.config_sources
        return cls(
            overrides=tuple(config.overrides.task),
            choices={str(group): option for group, option in config.runtime.choices.items()},
            config_dirs=tuple(source.path for source in sources if source.provider == "command-line"),
            launcher=str(config.launcher.get("_target_")) if config.launcher else "",
        )


def compose_settings(overrides: Sequence[str]) -> Settings:
    """The settings of a run with these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return read_settings(compose("config", list(overrides)))


def hide_passwords(words: Sequence[str]) -> list[str]:
    """A command's words without the password of `tracking.uri`, which is put away: Hydra keeps them with each run,
    launchers pass them on, and we print them."""
    return [_hide_password(word) if word.lstrip("+").startswith("tracking") else word for word in words]


def _hide_password(word: str) -> str:
    try:
        override = OverridesParser.create().parse_override(word)
        value = None if override.is_sweep_override() else override.value()
    except (OverrideParseException, HydraException):  # an error that Hydra is about to make, and we to show
        return word
    if isinstance(value, dict):
        value = value.get("uri")
    if not isinstance(value, str) or put_away(value) == value:
        return without_passwords(word)
    if value in word:
        return word.replace(value, without_password(value))
    return f"{override.key_or_group}={json.dumps(without_password(value), ensure_ascii=False)}"


def register_resolvers() -> None:
    """`${identity:}` is a run's identity, which names its folder; `${basename:FOLDER}` is a folder's own name;
    `${softening:}` is the temperature that softens the teacher's answers, 1 where a loss has none."""
    OmegaConf.register_new_resolver("softening", _softening, replace=True)
    OmegaConf.register_new_resolver("identity", lambda *, _root_: read_settings(_root_).identity, replace=True)
    OmegaConf.register_new_resolver("basename", lambda path: Path(str(path)).expanduser().resolve().name, replace=True)


def _softening(*, _root_: DictConfig) -> float:
    # Not read_settings: the settings are being resolved.
    parts = {key: OmegaConf.to_container(_root_[key], resolve=True) for key in ("loss", "also") if key in _root_}
    return temperature_of(flatten(parts)) or 1


def explain(error: BaseException) -> str:
    """`one_line` for errors of Hydra's and OmegaConf's as well, which are about the command line."""
    cause: BaseException | None = error
    while isinstance(error, ConfigCompositionException | OmegaConfBaseException) and cause:
        cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ConfigError):  # of a resolver, `${identity:}`
            return str(cause)
    first = first_line(error, None)
    if isinstance(error, MissingConfigException):
        return _unknown_option(error, first)
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        shown = without_password(value.strip("'\""))  # all of it: this password may have spaces
        reason = f" ({first})" if shown in value else ""  # which has parts of the value
        return (
            f"{key}{equals}{value if shown in value else shown}: cannot be parsed; expected key=value, lists as "
            f"key=[1,2], text with special characters in quotes, 'key=\"value\"'{reason}"
        )
    if isinstance(error, ConfigCompositionException | OmegaConfBaseException):
        return _bad_config(str(error).strip())
    return one_line(error)


def _unknown_option(error: MissingConfigException, first: str) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return first
    options: Sequence[str] = error.options
    outer, _, inner = group.partition("/")
    if inner and outer != "hydra":  # experiment=benchmark/…, a folder in a group, in which Hydra does not look
        group, option = outer, f"{inner}/{option}"
        options = [f"{inner}/{file.stem}" for file in sorted((CONF / outer / inner).glob("*.yaml"))] or options
    return str(ConfigError(group, option, one_of(options), suggestion(option, options)))


def _bad_config(text: str) -> str:
    known = _composed(sys.argv[1:])
    if unknown := re.search(r"Could not override '([^']+)'", text):
        near = suggestion(unknown[1], [*_groups(), *flatten(known)])
        return f"{unknown[1]}: no such key; {f'{near} ' if near else ''}python -m kdpipe --cfg job lists all"
    given = [word.partition("=")[0] for word in sys.argv[1:]]
    if missing := [key for key, value in flatten(known).items() if value == "???" and key not in given]:
        return f"{missing[0]}: a value is required, there is no default; expected {missing[0]}=…"
    lines = text.split("\n")
    return flat(" ".join(lines[:2] if lines[0].endswith(":") else lines[:1]))


def _groups() -> list[str]:
    return [path.name for path in CONF.iterdir() if path.is_dir()]


def _composed(arguments: list[str]) -> dict[str, Any]:
    """The plain config of the command's choice of groups, whatever else is wrong with the command."""
    groups = _groups()
    choices = [word for word in arguments if re.split("[=@]", word)[0] in groups and "=" in word and "," not in word]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_container(compose("config", choices), resolve=False)
    except Exception:  # only a help for the message of another error
        return {}
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def added_configs(arguments: Sequence[str]) -> list[Path]:
    """The files in the folders that a command adds (`--config-dir`): they may be somebody else's."""
    folders = []
    for number, word in enumerate(arguments):
        flag, equals, folder = word.partition("=")
        if flag == "-cd" or (flag.startswith("--config-d") and "--config-dir".startswith(flag)):  # argparse abbreviates
            folders += [folder] if equals else list(arguments[number + 1 : number + 2])
        elif word.startswith("-cd"):
            folders.append(word.removeprefix("-cd"))
    return sorted(file for folder in folders for file in Path(folder).rglob("*.yaml"))
