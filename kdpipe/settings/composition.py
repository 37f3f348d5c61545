"""From a command line to typed settings: the only code below the command line that knows Hydra's configs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from kdpipe.settings.components import check_targets
from kdpipe.settings.credentials import put_away, without_password, without_passwords
from kdpipe.settings.errors import ConfigError, one_of, suggestion
from kdpipe.settings.identity import flatten, temperature_of
from kdpipe.settings.overrides import leave_out, left_out, names_as_typed, read_numbers, restore_names
from kdpipe.settings.schema import Settings, validated
from kdpipe.settings.yaml_files import check_foreign

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel it is inside the package, in a checkout next to it.
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
# The groups whose options fill a section of another name.
GROUPS = {"teacher": "model@teacher", "also": "loss@also", "hydra.launcher": "hydra/launcher"}
ADDED = ("command-line", "hydra.searchpath in command-line")  # what Hydra calls folders that a command adds
PIPELINE = "kdpipe.data.augmentation.Pipeline"  # whose steps are options of its own group
SECTIONS = ("teacher", "train", "evaluation", "distillation", "sweep", "tracking")


def read_settings(config: DictConfig, invocation: "Invocation") -> Settings:
    """The typed settings of a composed config.

    Args:
        invocation: how it was composed.

    Raises:
        ConfigError: a value that cannot be used, or a component that may not be built.
        OmegaConfBaseException: a required value that is missing (see `explain`).
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    restore_names(own, invocation.files)
    composed = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    assert isinstance(composed, dict)
    plain = {str(key): value for key, value in composed.items()}
    plain["augmentation"] = _with_steps(plain.get("augmentation"), invocation)
    check_targets(plain)
    raw = OmegaConf.to_container(own, resolve=False)
    assert isinstance(raw, dict)
    read_numbers(plain, {str(key): value for key, value in raw.items()})
    leave_out(plain, invocation.overrides)
    for key in SECTIONS:
        if not isinstance(plain.get(key, {}), dict):
            hint = "model@teacher=… chooses the teacher" if key == "teacher" else f"{key}.<key>=… sets a value in it"
            raise ConfigError(key, plain[key], problem=f"this is a section; {hint}")
    tracking = plain.get("tracking", {})
    if isinstance(tracking.get("uri"), str):
        plain["tracking"] = tracking | {"uri": put_away(tracking["uri"])}
    return validated(Settings, plain)


def _with_steps(augmentation: Any, invocation: "Invocation") -> Any:
    """An augmentation with the options that the steps of a pipeline name, crop_flip or {random_erasing: {p: 0.1}}."""
    is_pipeline = isinstance(augmentation, dict) and augmentation.get("_target_") == PIPELINE
    if not is_pipeline or not isinstance(augmentation.get("steps"), list):
        return augmentation
    search = f"hydra.searchpath={[f'file://{folder}' for folder in invocation.config_dirs]}"
    steps = []
    for number, step in enumerate(augmentation["steps"]):
        names = step if isinstance(step, dict) else {step: None} if isinstance(step, str) else {}
        name, changes = next(iter(names.items()), (None, None))
        if len(names) != 1 or name == "_target_" or not str(name).replace("-", "_").isidentifier():
            steps.append(step)  # written out, or no augmentation, which the pipeline says
            continue
        key = f"augmentation.steps.{number}"
        if not isinstance(changes, dict | None):
            raise ConfigError(f"{key}.{name}", changes, f"keys with values, such as {{{name}:{{key:value}}}}")
        try:
            option = to_plain(compose("config", [search, f"augmentation={name}"]).augmentation)
        except MissingConfigException as error:
            options = error.options or []
            raise ConfigError(key, name, one_of(options), suggestion(str(name), options)) from None
        assert isinstance(option, dict)
        steps.append(_with_steps(option | (changes or {}), invocation))
    return augmentation | {"steps": steps}


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
            config_dirs=tuple(source.path for source in sources if source.provider in ADDED),
            launcher=str(config.launcher.get("_target_")) if config.launcher else "",
        )

    @property
    def files(self) -> list[Path]:
        """The YAML files of the chosen options, without the bases that these stand on."""
        folders = [*map(Path, self.config_dirs), CONF]
        options = [f"{group.partition('@')[0]}/{option}" for group, option in self.choices.items()]
        files = [folder / f"{option}.yaml" for folder in folders for option in ("config", *options)]
        return [file for file in files if file.is_file()]


def stated_of_network(invocation: Invocation, section: str, network: Mapping[str, Any]) -> tuple[str | None, set[str]]:
    """What a command says of a network itself, on the command line, in an experiment or in a file of its own; the rest
    are the defaults of the network's option.

    Args:
        section: "model" or "teacher".
        network: its plain settings, as they were composed.

    Returns:
        The option that was chosen, None where it is the default one; and the flat keys that were set.
    """
    group = "model" if section == "model" else "model@teacher"
    option = invocation.choices.get(group)
    words = [override.partition("=")[0].lstrip("+~") for override in invocation.overrides]
    of_option = compose("config", [f"{group}={option}"] if option else [])
    defaults = flatten(OmegaConf.to_container(of_option[section], resolve=True))  # type: ignore[arg-type]
    stated = {word.removeprefix(f"{section}.") for word in words if word.startswith(f"{section}.")}
    stated |= {key for key, value in flatten(network).items() if key not in defaults or defaults[key] != value}
    default_option = compose("config", return_hydra_config=True).hydra.runtime.choices[group]
    return (option if group in words or option != default_option else None), stated


def compose_settings(overrides: Sequence[str], folder: Path | None = None) -> Settings:
    """The settings of a run with these overrides, with the config files of a folder besides our own."""
    words = [names_as_typed(word) for word in overrides]
    if folder:
        for file in added_configs(["--config-dir", str(folder)]):
            check_foreign(file)
        words.append(f"hydra.searchpath=['file://{folder.resolve()}']")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", words, return_hydra_config=True)
        return read_settings(config, Invocation.of(config.hydra))


def hide_passwords(words: Sequence[str]) -> list[str]:
    """A command's words without the password of `tracking.uri`, which is put away: Hydra keeps them with each run,
    launchers pass them on, and we print them."""
    return [_hide_password(word) if word.lstrip("+").startswith("tracking") else word for word in words]


def _hide_password(word: str) -> str:
    try:
        override = OverridesParser.create().parse_override(word)
        value = None if override.is_sweep_override() else override.value()
    except HydraException:  # an error that Hydra is about to make, and we to show
        return word
    if isinstance(value, dict):
        value = value.get("uri")
    if not isinstance(value, str) or put_away(value) == value:
        return without_passwords(word)
    if value in word:
        return word.replace(value, without_password(value))
    return f"{override.key_or_group}={json.dumps(without_password(value), ensure_ascii=False)}"


def register_resolvers() -> None:
    """`${basename:PATH}` is a file's or folder's own name, `${dirname:PATH}` the folder that it is in;
    `${expanded:FOLDER}` has the user's home in place of ~; `${softening:}` is the temperature that softens the
    teacher's answers, 1 where a loss has none. (`${identity:}` is the command line's, which knows the store.)"""
    OmegaConf.register_new_resolver("softening", _softening, replace=True)
    OmegaConf.register_new_resolver("expanded", lambda path: str(Path(str(path)).expanduser()), replace=True)
    OmegaConf.register_new_resolver("dirname", lambda path: str(Path(str(path)).expanduser().parent), replace=True)
    OmegaConf.register_new_resolver("basename", lambda path: Path(str(path)).expanduser().resolve().name, replace=True)


def _softening(*, _root_: DictConfig) -> float:
    # Not read_settings: the settings are being resolved.
    parts = {key: OmegaConf.to_container(_root_[key], resolve=True) for key in ("loss", "also") if key in _root_}
    return temperature_of(flatten(parts)) or 1


def left_out_keys(cells: Sequence[tuple[Sequence[str], Settings]]) -> list[str]:
    """A line for each `++` key that some cells, given by their overrides and settings, were left without.

    Raises:
        ConfigError: no cell has the key, and no option of its group does: it is misspelt.
    """
    without: dict[str, list[Settings]] = {}
    for overrides, settings in cells:
        for key in left_out(overrides, settings):
            without.setdefault(key, []).append(settings)
    lines = []
    for key, lacking in without.items():
        section, _, name = key.partition(".")
        if len(lacking) == len(cells) and not options_with(section, name):
            known = {f"{section}.{other}" for keys in keys_of_options(section).values() for other in keys}
            raise ConfigError(f"++{key}", problem="; ".join(filter(None, ["no such key", suggestion(key, known)])))
        targets = dict.fromkeys(getattr(getattr(settings, section), "target", "null") for settings in lacking)
        lines.append(f"++{key}: left out for {', '.join(targets)}, which has no such key")
    return lines


def options_with(section: str, name: str) -> list[str]:
    """The options that give a section of the config a key, as in loss=dkd."""
    return [option for option, keys in keys_of_options(section).items() if name in keys]


def keys_of_options(section: str) -> dict[str, set[str]]:
    """The keys of each option whose keys stand in a section of the config."""
    group = GROUPS.get(section, section)
    files = sorted((CONF / group.partition("@")[0]).glob("*.yaml")) if section else []
    return {f"{group}={file.stem}": _keys(file) for file in files}


def _keys(file: Path) -> set[str]:
    """The keys of an option, with those of the files that it stands on."""
    content = yaml.safe_load(file.read_text()) or {}
    bases = [base.removesuffix("@_here_") for base in content.get("defaults", []) if str(base).endswith("@_here_")]
    return {*content, *(key for base in bases for key in _keys(file.parent / f"{base}.yaml"))}


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
