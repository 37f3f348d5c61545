"""A run is named by what it is: a hash of all the settings that its result depends on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

# The version whose results today's equal. Raise it when the same command gives other numbers, and only then: every
# finished run is trained anew, and every cached answer of a teacher computed anew.
RESULTS = "0.4.0"

# Where things are stored, what they run on, and what is only measured: not part of a run's identity.
PLACES = (
    "output_dir",
    "tracking",
    "dataset.root",
    "dataset.cache_dir",
    "teacher.file",  # its content counts, teacher.digest
    "train.device",
    "train.threads",
    "train.resume",
    "train.checkpoint_minutes",
    "train.show_views",
    "train.compile",
    "optimizer.fused",
    "train.profile",  # of runs of 0.4.0
    "train.keep_epochs",
    "evaluation",
    "distillation.cache_max_gb",
    "sweep",
    "search",
    "chain",  # each link is a run of its own
)
# Where some data sets are, which is no place for others that have such a key.
PLACES_OF = {
    "kdpipe.data.csv_table.csv_table": ("dataset.file",),
    "kdpipe.data.huggingface.huggingface": ("dataset.path",),
}
# What decides which images of a data set are test images, and which are validation images as well.
TEST_SPLIT: tuple[str, ...] = ("dataset.test_fraction", "dataset.split_seed")
SPLIT = ("dataset.val_fraction", *TEST_SPLIT)
LABELS_ALONE = "kdpipe.losses.CrossEntropy"  # the loss of the student alone
LOSSES = "kdpipe.losses."
# Modules that were moved since their first runs: moving code trains nothing anew.
FORMER_NAMES = {"kdpipe.training.schedules.": "kdpipe.schedulers."}

OF_LABELS = ("loss.class_weights", "loss.label_smoothing")  # whatever the method
UNLABELLED = "dataset.unlabelled_root"  # more images for what a teacher says; the student alone has none
# How each network resized images before it could be set.
FIRST_RESIZING = {"resize": "squeeze", "interpolation": "bilinear", "crop_pct": 1}
# Settings that were added later, as MLflow has them (params are text), with the value that means what was done before.
LATER = {
    **dict.fromkeys(("train.clip_norm", "train.mixup", "train.cutmix", UNLABELLED), "None"),
    **dict.fromkeys(("model.stages", "teacher.stages"), "None"),
    "loss.standardize": "False",
    **{f"{network}.{key}": str(value) for network in ("model", "teacher") for key, value in FIRST_RESIZING.items()},
    "dataset.resize": "squeeze",
    "train.metric": "accuracy",
    **dict.fromkeys(("loss.class_weights", "dataset.sampler"), "None"),
    **dict.fromkeys(("train.ema", "train.early_stop", "optimizer.layer_decay"), "None"),
    **{"train.accumulate": "1", "loss.label_smoothing": "0", "optimizer.decay_norm_and_bias": "True"},
}
# The same for what some components had from the start, and others have now.
LATER_OF = {f"kdpipe.schedulers.{name}": {"scheduler.warmup_epochs": "0"} for name in ("constant", "multistep")}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"alpha": 0.5}} as {"loss.alpha": 0.5}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def blends(loss: Mapping[str, Any]) -> bool:
    """Whether a loss's `alpha` weighs the teacher against the labels, so that 0 leaves the labels alone. Where a method
    has a weight of its own, its alpha means something else; of losses that are not ours nothing is known."""
    return str(loss.get("_target_")).startswith(LOSSES) and "alpha" in loss and "weight" not in loss


def canonical_target(target: str) -> str:
    """One name for a component: kdpipe.losses.kd.KD is kdpipe.losses.KD."""
    for now, before in FORMER_NAMES.items():
        target = target.replace(now, before)
    return LOSSES + target.rpartition(".")[2] if target.startswith(LOSSES) else target


def effective(settings: Mapping[str, Any], needs_teacher: bool) -> dict[str, Any]:
    """The flat settings without those that have no effect: what a pair of the benchmark sets for losses, which counts
    where a loss has taken it; and where there is no teacher, its settings and what softens its answers."""
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
    """The temperature that divides the teacher's logits: the loss's, or the second one's where the first has no effect;
    None where nothing divides them, or they are standardised first."""
    for group in ("loss", "also"):
        is_softened = not flat.get(f"{group}.standardize") and flat.get(f"{group}.alpha") != 0
        if is_softened and f"{group}.temperature" in flat:
            return flat[f"{group}.temperature"]
    return None


def is_place(key: str) -> bool:
    """Whether a setting is one of `PLACES`, or in one."""
    return key.startswith(tuple(f"{place}." for place in PLACES)) or key in PLACES


def what_matters(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that a result depends on, also from MLflow's params; a loss whose alpha 0 leaves the labels
    alone is cross-entropy then, and a second one is none."""
    matters = {
        key: canonical_target(str(value)) if key.endswith("._target_") else value
        for key, value in flat.items()
        if not is_place(key) and key not in PLACES_OF.get(str(flat.get("dataset._target_")), ())
    }
    for key, absent in (LATER | LATER_OF.get(str(matters.get("scheduler._target_")), {})).items():
        if str(matters.get(key)) == absent:
            matters.pop(key, None)
    if unlabelled := matters.get(UNLABELLED):
        matters[UNLABELLED] = str(unlabelled).rstrip("/").rpartition("/")[2]  # as a data set's name
    if matters.get("distillation.outputs") != "views":  # else it only says where the same answers come from
        matters = _without(matters, "distillation.")
    if _is_off(matters, "loss"):
        of_labels = {key: value for key, value in matters.items() if key in OF_LABELS}
        matters = _without(matters, "loss.") | of_labels | {"loss._target_": LABELS_ALONE}
    if _is_off(matters, "also"):
        matters = _without(matters, "also.")
    matters.pop("also.ce_weight", None)  # the cross-entropy is the first one's
    return matters


def other_split(theirs: Mapping[str, Any], ours: Mapping[str, Any], keys: Sequence[str] = SPLIT) -> str:
    """How the split of a teacher's run differs from a student's, from their flat settings, and what that means for the
    student; "" where it does not."""
    for key in keys:
        its, own = str(theirs.get(key)), str(ours.get(key))
        if its != own:
            some = "validation" if key not in TEST_SPLIT else "validation and test"
            return f"{key}={its} instead of {own}: on some of the {some} images"
    return ""


def _is_off(flat: Mapping[str, Any], group: str) -> bool:
    own = {key.removeprefix(f"{group}."): value for key, value in flat.items() if key.startswith(f"{group}.")}
    return blends(own) and str(own["alpha"]) == "0"


def _without(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if not key.startswith(prefix)}


def identity(flat: Mapping[str, Any]) -> str:
    """12 hex digits: the same for the same flat settings, however they were written (1 or 1.0, in any order)."""
    text = json.dumps([RESULTS, what_matters(canonical(flat))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def canonical(value: Any) -> Any:
    """One way to write a value: 1.0 as 1, in lists and mappings too."""
    if isinstance(value, Mapping):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
