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
    "train.checkpoint_minutes",
    "train.compile",
    "optimizer.fused",
    "train.profile",
    "distillation.cache_max_gb",
    "sweep",
    "chain",  # a link is what its own settings say
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
    flat = {key: canonical(value) for key, value in flatten(settings).items() if key != "teacher.freeze"}
    if needs_teacher:
        return flat
    without = ("teacher.", "distillation.", "loss.temperature")
    return {key: value for key, value in flat.items() if not key.startswith(without)}


def what_matters(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that a result depends on; any loss at alpha 0 is cross-entropy."""
    matters = {
        key: value
        for key, value in flat.items()
        if key not in PLACES and not key.startswith(tuple(f"{place}." for place in PLACES))
    }
    if str(matters.get("train.clip_norm")) == "None":  # as in versions that did not have it; MLflow's params are text
        matters.pop("train.clip_norm", None)
    if matters.get("distillation.outputs") != "views":  # else only where the same answers come from
        matters = {key: value for key, value in matters.items() if not key.startswith("distillation.")}
    if str(matters.get("loss.alpha")) == "0":
        matters = {key: value for key, value in matters.items() if not key.startswith("loss.")}
        matters["loss._target_"] = "kdpipe.losses.CrossEntropy"
    return matters


def identity(flat: Mapping[str, Any]) -> str:
    """12 hex digits: the same for the same flat settings, however they were written (1 or 1.0, in any order)."""
    text = json.dumps([__version__, what_matters(canonical(flat))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def canonical(value: Any) -> Any:
    """One way to write a value: 1.0 as 1, in lists and mappings too."""
    if isinstance(value, Mapping):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
