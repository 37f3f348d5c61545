"""From a component's settings to the object: its `_target_` is called with its arguments."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from kdpipe.settings.components import find_target, parameters_of
from kdpipe.settings.errors import ConfigError, flat, one_of, suggestion
from kdpipe.settings.schema import Component


def build(key: str, component: Component, *inputs: Any, **more: Any) -> Any:
    """What a component names, built with its arguments and with what the config does not know.

    Args:
        key: where it stands in the config, for messages.
        inputs, more: what is not in the config, such as the parameters of an optimizer.

    Raises:
        ConfigError: a value that it does not take.
    """
    return _call(key, component.target, component.arguments, inputs, more, type(component).model_fields)


def check_arguments(key: str, component: Component, *inputs: Any, **more: Any) -> None:
    """Raise ConfigError where a component does not exist or does not take its arguments by name: it is built later."""
    _find(key, component.target, component.arguments, inputs, more, type(component).model_fields)


def _call(
    key: str,
    target: str,
    arguments: Mapping[str, Any],
    inputs: Sequence[Any] = (),
    more: Mapping[str, Any] = MappingProxyType({}),
    fields: Iterable[str] = (),
) -> Any:
    """What the function that a `_target_` names returns; arguments as for `_find`."""
    function = _find(key, target, arguments, inputs, more, fields)
    built = {name: _nested(f"{key}.{name}", value) for name, value in arguments.items()}
    try:
        return function(*inputs, **built, **more)
    except ConfigError as error:  # which knows its own key alone
        raise error.under(key) from error
    except (TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
        raise ConfigError(f"{key}._target_", target, problem=flat(error)) from error


def _find(
    key: str,
    target: str,
    arguments: Mapping[str, Any],
    inputs: Sequence[Any],
    more: Mapping[str, Any],
    fields: Iterable[str],
) -> Callable[..., Any]:
    """The function that a `_target_` names, if it takes these arguments.

    Args:
        inputs, more: as for `build`.
        fields: keys of the section itself, which may have been meant: image_size by img_size.
    """
    function: Callable[..., Any] = find_target(f"{key}._target_", target)
    known = parameters_of(function)
    if known is None:
        return function
    if unasked := [name for name in more if name not in known]:
        problem = f"it does not take {' and '.join(unasked)}, which kdpipe gives it"
        raise ConfigError(f"{key}._target_", target, problem=problem)
    own = [name for number, name in enumerate(known) if number >= len(inputs) and name not in more]
    for name, value in arguments.items():
        if name not in own:
            near = suggestion(name, own) or suggestion(name, fields)
            none = "" if own or near else f"{target} takes no arguments; "
            in_list = key.rpartition(".")[2].isdigit()  # of which ~ deletes nothing
            instead = near or f"{none}{'leave it out' if in_list else f'~{key}.{name} leaves it out'}"
            raise ConfigError(f"{key}.{name}", value, one_of(own) if own else "", instead)
    for name, parameter in inspect.signature(function).parameters.items():
        is_required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if is_required and name in own and name not in arguments:
            raise ConfigError(f"{key}.{name}", problem=f"a value is required by {target}")
    return function


def _nested(key: str, value: Any) -> Any:
    """An argument, with the components in it built."""
    if isinstance(value, list):
        return [_nested(f"{key}.{number}", item) for number, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if "_target_" not in value:
        return {name: _nested(f"{key}.{name}", item) for name, item in value.items()}
    arguments = {name: item for name, item in value.items() if name not in ("_target_", "_partial_")}
    if value.get("_partial_"):  # whoever calls it gives the rest
        built = {name: _nested(f"{key}.{name}", item) for name, item in arguments.items()}
        return partial(find_target(f"{key}._target_", str(value["_target_"])), **built)
    return _call(key, str(value["_target_"]), arguments)
