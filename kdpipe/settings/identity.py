"""A run is named by what it is: a hash of all the settings that its result depends on, and of kdpipe's version."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kdpipe import __version__

# Where things lie, what they run on and what is measured beside: no part of a run's identity.
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
    "train.keep_epochs",
    "evaluation",
    "distillation.cache_max_gb",
    "sweep",
    "chain",  # a link is what its own settings say
)
LABELS_ALONE = "kdpipe.losses.CrossEntropy"  # the loss of the student alone

UNLABELLED = "dataset.unlabelled_root"  # more images for what a teacher says; the student alone has none
# Settings that came later, as MLflow tells them (params are text), with the value that means what was done before.
LATER = {
    **dict.fromkeys(("train.clip_norm", "train.mixup", "train.cutmix", UNLABELLED), "None"),
    **dict.fromkeys(("model.stages", "teacher.stages"), "None"),
    "loss.standardize": "False",
}


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
    """The flat settings without those that have no effect: what a pair of the benchmark has for losses, which counts
    where a loss has taken it; and where there is no teacher its own, and what softens its answers."""
    flat = {
        key: canonical(value)
        for key, value in flatten(settings).items()
        if key != "teacher.freeze" and not key.startswith("benchmark.")
    }
    if flat.get("teacher.temperature") == canonical(temperature_of(flat) or 1):
        flat.pop("teacher.temperature", None)  # of an ensemble, which takes the loss's
    if needs_teacher:
        return flat
    idle = (
        *("teacher.", "distillation.", UNLABELLED, "model.stages"),
        *("loss.temperature", "loss.standardize", "also."),
    )
    return {key: value for key, value in flat.items() if not key.startswith(idle)}


def temperature_of(flat: Mapping[str, Any]) -> Any:
    """What divides the teacher's logits, those of the loss, or of the second one where the first has no effect; None
    where nothing does, or they are standardised first."""
    for group in ("loss", "also"):
        is_softened = not flat.get(f"{group}.standardize") and flat.get(f"{group}.alpha") != 0
        if is_softened and f"{group}.temperature" in flat:
            return flat[f"{group}.temperature"]
    return None


def what_matters(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that a result depends on; any loss at alpha 0 is cross-entropy, any second one is none."""
    matters = {
        key: value
        for key, value in flat.items()
        if key not in PLACES and not key.startswith(tuple(f"{place}." for place in PLACES))
    }
    for key, absent in LATER.items():
        if str(matters.get(key)) == absent:
            matters.pop(key, None)
    if unlabelled := matters.get(UNLABELLED):
        matters[UNLABELLED] = str(unlabelled).rstrip("/").rpartition("/")[2]  # as a data set's name
    if matters.get("distillation.outputs") != "views":  # else only where the same answers come from
        matters = without(matters, "distillation.")
    if str(matters.get("loss.alpha")) == "0":
        matters = without(matters, "loss.") | {"loss._target_": LABELS_ALONE}
    if str(matters.get("also.alpha")) == "0":
        matters = without(matters, "also.")
    matters.pop("also.ce_weight", None)  # the cross-entropy is the first one's
    return matters


def without(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if not key.startswith(prefix)}


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
