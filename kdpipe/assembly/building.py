"""From a component's settings to the object: its `_target_` is called with its arguments."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from kdpipe.settings.components import find_target
from kdpipe.settings.errors import ConfigError, flat, suggestion
from kdpipe.settings.schema import Component


def build(key: str, component: Component, *inputs: Any, **more: Any) -> Any:
    """What a component names, built with its arguments and with what the config does not know.

    Args:
        key: where it stands in the config, for messages.
        inputs, more: what is not in the config, such as the parameters of an optimizer.

    Raises:
        ConfigError: a value that it does not take.
    """
    function = find_target(f"{key}._target_", component.target)
    arguments = {name: _nested(f"{key}.{name}", value) for name, value in component.arguments.items()}
    try:
        return function(*inputs, **arguments, **more)
    except ConfigError as error:  # which knows its own key alone
        raise error.under(key) from error
    except (TypeError, ValueError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in component.arguments:
            known = [f"{key}.{name}" for name in component.plain if name != unknown[1]]
            near = suggestion(f"{key}.{unknown[1]}", known)
            problem = "; ".join(filter(None, [f"{component.target} has no such argument", near]))
            raise ConfigError(f"{key}.{unknown[1]}", component.arguments[unknown[1]], problem=problem) from error
        raise ConfigError(f"{key}._target_", component.target, problem=flat(error)) from error


def _nested(key: str, value: Any) -> Any:
    """An argument, with the components in it built."""
    if isinstance(value, list):
        return [_nested(f"{key}.{number}", item) for number, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    arguments = {name: _nested(f"{key}.{name}", item) for name, item in value.items()}
    if "_target_" not in arguments:
        return arguments
    function = find_target(f"{key}._target_", arguments.pop("_target_"))
    is_partial = arguments.pop("_partial_", False)
    return partial(function, **arguments) if is_partial else function(**arguments)
