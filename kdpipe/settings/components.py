"""Which components a config may name: configs are shared and downloaded, and a `_target_` is code.

Hydra has a target policy of its own for what it builds itself (callbacks, launchers, log handlers). What kdpipe builds
is narrower: networks, losses, data sets, optimizers and schedules from the places below, and what the user allows.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, get_type_hints

from kdpipe.settings.errors import ConfigError, flat

# An environment variable and no config key: a config could set the key for itself.
ALLOW = "KDPIPE_ALLOW_TARGETS"

# Whole packages would be too much: torch.hub.load runs code from the network, timm.models.load_checkpoint can unpickle.
OWN = ("kdpipe.data", "kdpipe.losses", "kdpipe.models", "kdpipe.training.schedules")
NO_TIMM = "timm is not installed; pip install 'kdpipe[timm]'"
MISSING = "???"  # Hydra's mark of a value that has to be given
FUNCTIONS = (*OWN, "torchvision.models", "timm.create_model")
TIMM = ("timm.layers", "timm.loss", "timm.models", "timm.optim")
CLASSES = ("torch.nn", "torch.optim", "torchvision.ops", "torchvision.transforms", *TIMM)
ACCEPTED = (*FUNCTIONS, *CLASSES)
RENAMED = {"kdpipe.schedulers.": "kdpipe.training.schedules."}  # where configs of earlier versions find them


def check_targets(values: object, key: str = "") -> None:
    """Raise ConfigError for any `_target_` in plain values that may not be built. Nothing is imported."""
    for name, value in leaves(values, key):
        if name.rpartition(".")[2] == "_target_" and value != MISSING:
            check_target_name(name, value)


def check_target_name(key: str, target: object) -> None:
    """Raise ConfigError for a target whose name alone rules it out."""
    if isinstance(target, str):
        is_private = any(part.startswith("_") for part in target.split("."))
        if is_allowed(target) or (_is_inside(_current(target), ACCEPTED) and not is_private):
            return
    raise _refusal(key, target)


def find_target(key: str, target: str) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        ConfigError: it does not exist, or is not accepted. A name that a module merely imports
            (torch.nn.modules.module.os.system) counts by where it was defined.
    """
    check_target_name(key, target)
    module_name, _, name = _current(target).rpartition(".")
    try:
        found = getattr(import_module(module_name), name)
    except Exception as error:  # a module raises whatever it likes
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise ConfigError(key, target, problem=NO_TIMM) from error
        raise ConfigError(key, target, "a class or function", f"not found ({flat(error)})") from error
    if target in _allowed_names():
        return found
    defined_in = str(getattr(found, "__module__", None))
    packages = [name.partition(".")[0] for name in _allowed_names()]
    if isinstance(found, type):
        is_accepted = _is_inside(defined_in, ACCEPTED)
    else:
        is_accepted = callable(found) and (_is_inside(defined_in, FUNCTIONS) or target in FUNCTIONS)
    if not (is_accepted or (is_allowed(target) and _is_inside(defined_in, packages))):
        raise _refusal(key, target)
    return found


def accepted_arguments(component: object) -> dict[str, Any] | None:
    """The names of the arguments that a component takes, with their types (`Any` where there is none); None where it
    takes anything. No arguments where it is no component, or cannot be found."""
    target = component.get("_target_") if isinstance(component, Mapping) else None
    try:
        return parameters_of(find_target("_target_", target)) if isinstance(target, str) else {}
    except ConfigError:
        return {}


def parameters_of(function: Callable[..., Any]) -> dict[str, Any] | None:
    """The names of a function's or a class's parameters with their types; None where it takes anything."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    try:
        typed = vars(function).get("__init__", function) if isinstance(function, type) else function
        hints = get_type_hints(typed, include_extras=True)
    except (NameError, TypeError):  # a type that is imported for type checkers alone
        hints = {}
    return {name: hints.get(name, Any) for name in parameters}


def loss_class(target: str, key: str = "loss") -> Any:
    """The class of a loss.

    Raises:
        ConfigError: it is none of ours, such as one of torch.nn, whose `forward` takes other arguments.
    """
    found = find_target(f"{key}._target_", target)
    if not hasattr(found, "uses_teacher"):
        raise ConfigError(
            f"{key}._target_", target, "a loss of kdpipe.losses, or a class derived from kdpipe.losses.Loss"
        )
    return found


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All that is no mapping and no list, with its dotted key."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from leaves(value, f"{key}.{position}" if key else str(position))
    else:
        yield key, node


def _is_inside(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _allowed_names() -> list[str]:
    return [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]


def is_allowed(name: str) -> bool:
    return _is_inside(name, _allowed_names())


def _current(target: str) -> str:
    """The name that a component has today."""
    for before, now in RENAMED.items():
        target = target.replace(before, now)
    return target


def _refusal(key: str, target: object) -> ConfigError:
    allow = f"{ALLOW}={target} allows this one, if you trust what it does"
    return ConfigError(key, target, f"a target in {', '.join(ACCEPTED)}; {allow}")
