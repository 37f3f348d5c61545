"""A run is named by what it is: a hash of all the settings that its result depends on, and of kdpipe's version."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kdpipe import __version__

# Where things lie and what they run on: no part of a run's identity.
PLACES = (
    "output_dir",
    "tracking",
    "dataset.root",
    "dataset.cache_dir",
    "train.device",
    "train.threads",
    "train.resume",
)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"alpha": 0.5}} as {"loss.alpha": 0.5}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def effective(settings: Mapping[str, Any], needs_teacher: bool) -> dict[str, Any]:
    """The flat settings without those that have no effect: teacher and temperature where there is no teacher."""
    flat = flatten(settings)
    if needs_teacher:
        return flat
    return {key: value for key, value in flat.items() if not key.startswith("teacher.") and key != "loss.temperature"}


def without_places(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that a result depends on."""
    return {
        key: value
        for key, value in flat.items()
        if key not in PLACES and not key.startswith(tuple(f"{place}." for place in PLACES))
    }


def identity(flat: Mapping[str, Any]) -> str:
    """12 hex digits: the same for the same flat settings, however they were written (1 or 1.0, in any order)."""
    canonical = {key: _canonical(value) for key, value in without_places(flat).items()}
    text = json.dumps([__version__, canonical], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value: Any) -> Any:
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
