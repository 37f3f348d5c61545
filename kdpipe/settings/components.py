"""What a config may have run: configs are shared and downloaded, and a `_target_` is code.

`guard_hydra` puts the checks where Hydra reads files, composes configs and looks up targets, so that they cover one
run, a sweep with each of its cells, the processes of its launchers, and what Hydra itself builds before a run
(`hydra.callbacks`, `hydra.launcher`, `hydra.sweeper`). Hydra's own target policy stays in force after them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import hydra as hydra_itself
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.instantiate import _instantiate2
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# An environment variable and no config key: a config could set the key for itself.
ALLOW = "KDPIPE_ALLOW_TARGETS"

# Whole packages would be too much: torch.hub.load runs code from the network, timm.models.load_checkpoint can unpickle.
OWN = ("kdpipe.data", "kdpipe.losses", "kdpipe.models", "kdpipe.training.schedules")
FUNCTIONS = (*OWN, "torchvision.models", "timm.create_model")
TIMM = ("timm.layers", "timm.loss", "timm.models", "timm.optim")
CLASSES = ("torch.nn", "torch.optim", "torchvision.ops", "torchvision.transforms", *TIMM)
HYDRA_CLASSES = ("hydra_plugins", "hydra._internal.core_plugins", "hydra.experimental.callbacks")

# Settings that run commands, or decide which are run, without any `_target_`.
COMMANDS = ("hydra.job.env_set", "hydra.launcher.setup", "hydra.launcher.additional_parameters")
LOGGING = ("hydra.job_logging", "hydra.hydra_logging")
LOG_CLASSES = ("logging.FileHandler", "logging.NullHandler", "logging.StreamHandler")
# A log file elsewhere could be somebody's .profile, written in a format of the config's choice.
LOG_FILES = ("${hydra.runtime.output_dir}/${hydra.job.name}.log",)
# Another key of a handler would be set as an attribute, or handed to its class.
LOG_KEYS = ("class", "level", "formatter", "filters", "filename", "stream", "mode", "delay", "encoding")
LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")

# Ours have 1 kB and 50 values; aliases of YAML (*name) can make billions out of that.
MAX_YAML_BYTES = 1_000_000
MAX_YAML_VALUES = 10_000


def guard_hydra() -> None:
    """From now on, in this process, Hydra takes only what is accepted here."""
    hydra_itself.ConfigLoaderImpl = CheckedLoader  # type: ignore[misc]
    _instantiate2._resolve_target = _resolve_checked
    if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ:  # PyTorch takes only one of the two
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # for the libraries that load weights themselves


class CheckedFiles(ConfigRepository):
    """Hydra's, with each file checked before it is read."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is not None and source.scheme() == "file":
            file = Path(source.path) / source._normalize_file_name(config_path)
            _check_yaml_once(file, file.stat().st_mtime_ns)  # each cell of a sweep reads the same files
        found = super().load_config(config_path)
        if found is not None and source is not None and source.scheme() == "file":
            check_searchpath(OmegaConf.to_container(found.config, resolve=False))
        return found


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's, for a run, a sweep and each of its cells; what it composes is checked before anything is made of it."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = CheckedFiles(config_search_path)

    def load_configuration(self, *arguments: Any, **options: Any) -> DictConfig:
        config = super().load_configuration(*arguments, **options)
        check_config(config)
        return config


_resolve_unchecked = _instantiate2._resolve_target


def _resolve_checked(target: Any, full_key: str) -> Any:
    """What Hydra calls right before it calls a target: interpolations are resolved by then."""
    if isinstance(target, str):
        target = find_target(f"{full_key}._target_" if full_key else "_target_", target)
    return _resolve_unchecked(target, full_key)


def check_config(config: DictConfig) -> None:
    """Raise ValueError for a `_target_`, or a setting that runs commands, that is not accepted; imports nothing."""
    plain = OmegaConf.to_container(config, resolve=False)
    for key, value in _values(plain):
        if key.rpartition(".")[2] == "_target_" and value != "???" and "${" not in str(value):
            check_name(key, value)
    for key in COMMANDS:
        if _select(plain, key) and not _is_allowed(key):
            raise ValueError(f"{key}: a config may not choose commands; {ALLOW}={key} allows it, if you trust this one")
    for key in LOGGING:
        if not _is_allowed(key):
            _check_logging(key, _select(plain, key))
    launcher = _select(plain, "hydra.launcher")
    if isinstance(launcher, Mapping) and "submitit" in str(launcher.get("_target_")):
        # They become lines of a shell script: after a line break comes a command.
        for key, value in _values(OmegaConf.to_container(config.hydra.launcher, resolve=True), "hydra.launcher"):
            if "\n" in f"{key}{value}":
                raise ValueError(f"{key}={value}: text of one line is accepted")


def check_searchpath(content: Any) -> None:
    """Raise ValueError for a file that has Hydra look for configs in a package, which imports it."""
    for key, value in _values(content):
        kind, separator, place = str(value).partition("://")
        if "searchpath" in key.split(".") and (separator or "${" in kind) and kind != "file" and not _is_allowed(place):
            raise ValueError(f"{key}={value}: folders are accepted, file://FOLDER")


def refuse_pickled_config(arguments: Sequence[str]) -> None:
    """Raise ValueError for Hydra's --experimental-rerun, however abbreviated: it unpickles a file."""
    for argument in arguments:
        if len(argument) > 2 and "--experimental-rerun".startswith(argument.partition("=")[0]):
            raise ValueError(f"{argument}: a pickled config can run code; the command that made it is accepted")


def check_name(key: str, target: object) -> None:
    """Raise ValueError for a target that its name alone rules out."""
    accepted = HYDRA_CLASSES if key.startswith("hydra.") else (*FUNCTIONS, *CLASSES)
    if isinstance(target, str):
        is_private = any(part.startswith("_") for part in target.removeprefix("hydra._internal").split("."))
        if _is_allowed(target) or (_is_inside(target, accepted) and not is_private):
            return
    raise ValueError(_refusal(key, target, accepted))


def find_target(key: str, target: str) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        ValueError: there is none of that name, or it is not accepted: what is only imported where it is named
            (torch.nn.modules.module.os.system) counts by where it was defined.
    """
    check_name(key, target)
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module_name), name)
    except Exception as error:  # a module raises whatever it likes
        reason = " ".join(str(error).split())
        raise ValueError(f"{key}={target}: a class or function is accepted, this is none ({reason})") from error
    if target in _allowed_names():
        return found
    defined_in = str(getattr(found, "__module__", None))
    packages = [name.partition(".")[0] for name in _allowed_names()]
    if key.startswith("hydra."):
        is_accepted = isinstance(found, type) and _is_inside(defined_in, HYDRA_CLASSES)
    elif isinstance(found, type):
        is_accepted = _is_inside(defined_in, (*FUNCTIONS, *CLASSES))
    else:
        is_accepted = callable(found) and (_is_inside(defined_in, FUNCTIONS) or target in FUNCTIONS)
    if not (is_accepted or (_is_allowed(target) and _is_inside(defined_in, packages))):
        accepted = HYDRA_CLASSES if key.startswith("hydra.") else (*FUNCTIONS, *CLASSES)
        raise ValueError(_refusal(key, target, accepted))
    return found


@cache
def _check_yaml_once(file: Path, changed: int) -> None:
    check_yaml(file)


def check_yaml(file: Path) -> None:
    """Raise ValueError for a file that is no YAML, or that would become too large in memory."""
    if file.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"{file}: a config of up to {MAX_YAML_BYTES / 1e6:g} MB is accepted")
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode | None):
            raise ValueError(f"{file}: keys with values are accepted, key: value")
        if _count(node, {}) > MAX_YAML_VALUES:
            raise ValueError(
                f"{file}: up to {MAX_YAML_VALUES:,} values are accepted; its aliases (*name) make more of it"
            )
        OmegaConf.load(file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{file}{place}: this cannot be read as YAML ({reason})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: text in UTF-8 is accepted ({error.reason} at byte {error.start})") from error
    except OmegaConfBaseException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: keys and values that OmegaConf knows are accepted ({reason})") from error
    except RecursionError as error:
        raise ValueError(f"{file}: this is nested too deeply for a config") from error


def _count(node: yaml.Node | None, known: dict[int, float]) -> float:
    """The values of a YAML document once all aliases are written out; infinitely many where it holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else [pair])]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


def _check_logging(key: str, node: object) -> None:
    """Raise ValueError for logging that calls, opens or reads more than Hydra's own configs do."""
    handlers = node.get("handlers") if isinstance(node, Mapping) else None
    for name, handler in handlers.items() if isinstance(handlers, Mapping) else ():
        for part in handler if isinstance(handler, Mapping) else ():
            if part not in LOG_KEYS:
                accepted_keys = ", ".join(LOG_KEYS)
                raise ValueError(f"{key}.handlers.{name}.{part}: one of {accepted_keys} is accepted")
    for path, value in [(key, node)] if isinstance(node, str) else _values(node, key):
        name = path.rpartition(".")[2]
        if ".." in path:
            raise ValueError(f"{path}={value}: the key . would set attributes; no such key is accepted")
        if name in ("()", "class"):
            accepted: Sequence[str] = LOG_CLASSES
        elif name == "filename":
            accepted = LOG_FILES
        elif isinstance(value, str) and ("${" in value or value.startswith(("ext://", "cfg://"))):
            accepted = LOG_STREAMS
        else:
            continue
        if value not in accepted and not _is_allowed(str(value)):
            raise ValueError(f"{path}={value}: one of {', '.join(accepted)} is accepted; {ALLOW}={key} allows others")


def _values(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All that is no mapping and no list, with its dotted key."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _values(value, f"{key}.{position}" if key else str(position))
    else:
        yield key, node


def _select(node: Any, key: str) -> Any:
    """What stands under a dotted key, or the text (an interpolation) that stands in its way."""
    for part in key.split("."):
        if not isinstance(node, Mapping):
            return node
        node = node.get(part)
    return node


def _is_inside(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _allowed_names() -> list[str]:
    return [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]


def _is_allowed(name: str) -> bool:
    return _is_inside(name, _allowed_names())


def _refusal(key: str, target: object, accepted: Sequence[str]) -> str:
    return (
        f"{key}={target}: a target in {', '.join(accepted)} is accepted; {ALLOW}={target} allows this one, "
        f"if you trust what it does"
    )
