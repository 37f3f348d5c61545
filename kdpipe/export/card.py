"""The model card: what a model is, how good it is, how it was trained and how to use it. Its text is in card.md.j2."""

import re
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
import yaml

from kdpipe import __version__
from kdpipe.assembly.finished_runs import FinishedRun
from kdpipe.export.formats import DESCRIPTIONS, INT8, ONNX
from kdpipe.export.measurements import Measurement, table_of
from kdpipe.export.sources import Sources, fitted_temperature, public_settings
from kdpipe.export.writers import strip_folders
from kdpipe.runs.names import UNLABELLED_IMAGES
from kdpipe.settings.identity import canonical
from kdpipe.settings.metric_names import LAST_EPOCH
from kdpipe.settings.schema import NetworkSettings
from kdpipe.system.tables import markdown_table

TEMPLATE = Path(__file__).with_name("card.md.j2")
# A run's metrics, in the order of the card; fractions are shown in per cent.
METRICS = {
    "test/accuracy": "test accuracy",
    "test/balanced_accuracy": "test accuracy, mean over classes",
    "test/macro_f1": "F1 score on the test images, mean over classes",
    "test/top5_accuracy": "test accuracy, top 5",
    "test/loss": "test loss (cross-entropy)",
    "test/brier": "Brier score",
    "test/ece": "expected calibration error",
    "model/temperature": "temperature, fitted on validation images: probabilities are softmax(logits / temperature)",
    "test/ece_scaled": "expected calibration error at this temperature",
    "test/loss_scaled": "test loss at this temperature",
    "teacher/accuracy": "test accuracy of the teacher",
    "teacher/agreement": "test images with the teacher's prediction",
    "selected/epoch": "epoch that was best on the validation images, whose weights these are",
    LAST_EPOCH: "epoch that the training stopped after",
    "model/params": "parameters",
    "model/flops": "FLOPs per image (convolutions and matrix products)",
    "model/size_mb": "size of the weights in MB (2²⁰ bytes)",
    "model/activation_mb": "activations per image in MB",
}
TRAIN_KEYS = {"epochs", "batch_size", "precision", "mixup", "cutmix", "clip_norm", "select", "metric"}
TRAIN_KEYS |= {"accumulate", "ema", "early_stop"}
WITHOUT_EFFECT = {"select": "last", "accumulate": 1}


def model_card(
    sources: Sources, files: Collection[str], measurements: Sequence[Measurement], legend: str, license: str | None
) -> str:
    """README.md: Markdown with the front matter of the Hugging Face hub. `license`: of the weights; None if unknown."""
    run, settings = sources.run, sources.run.settings
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        class_accuracy=_class_accuracies(sources.class_accuracy),
        crops=run.resize == "crop",
        data=sources.data,
        files={name: DESCRIPTIONS[name] for name in files if name in DESCRIPTIONS},
        front_matter=_front_matter(sources, files, license),
        initial_weights=_initial_weights(settings.model.weights),
        legend=legend,
        license=license,
        measurements=markdown_table(*table_of(measurements)),
        methods=[loss.target.rpartition(".")[2] for loss in settings.losses if not loss.is_off],
        metrics=_metrics_table(run),
        onnx=next((name for name in (ONNX, INT8) if name in files), None),
        record=run.record,
        run=run,
        settings=settings,
        teacher=_teacher_facts(sources, measurements),
        temperature=fitted_temperature(run),
        training=yaml.safe_dump(strip_folders(_training_settings(run)), sort_keys=False, allow_unicode=True),
        unlabelled=_unlabelled_facts(run),
        version=__version__,
    )


def _front_matter(sources: Sources, files: Collection[str], license: str | None) -> str:
    run, name = sources.run, sources.data.name
    front: dict[str, object] = {"license": "unknown"}
    if license:  # the hub knows licences by identifiers such as apache-2.0
        known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license.lower())
        front = {"license": license.lower()} if known else {"license": "other", "license_name": license}
    distilled = ["knowledge-distillation"] if run.record.tags.get("kdpipe.teacher_run") else []
    tags = ["image-classification", "kdpipe", *distilled, *(["onnx"] if ONNX in files or INT8 in files else [])]
    front |= {"pipeline_tag": "image-classification", "tags": tags, "metrics": ["accuracy"]}
    if "test/accuracy" in run.metrics:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": name, "type": name, "split": "test"},
            "metrics": [{"type": "accuracy", "value": run.metrics["test/accuracy"]}],
        }
        front["model-index"] = [{"name": f"{run.name} on {name}", "results": [result]}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _teacher_facts(sources: Sources, measurements: Sequence[Measurement]) -> dict[str, Any] | None:
    """The name, the weights and, if it could be opened, the accuracy of the teacher; None without one."""
    run = sources.run
    if not run.teacher_weights:
        return None
    accuracy = measurements[0].accuracy if sources.teacher else None
    weights = ", ".join(strip_folders(run.teacher_weights))
    return {"name": run.settings.teacher.name, "weights": weights, "accuracy": accuracy}


def _unlabelled_facts(run: FinishedRun) -> dict[str, str] | None:
    """The number (unknown for older runs), the folder and the fingerprint of the unlabelled images."""
    tags = run.record.tags
    if "kdpipe.unlabelled" not in tags:
        return None
    return {
        "count": f"{int(tags[UNLABELLED_IMAGES]):,} " if UNLABELLED_IMAGES in tags else "",
        "folder": strip_folders(run.settings.dataset.unlabelled_root) or f"of {run.settings.dataset.name}",
        "fingerprint": tags["kdpipe.unlabelled"],
    }


def _training_settings(run: FinishedRun) -> dict[str, Any]:
    """The settings that had an effect on the training."""
    settings, sections = run.settings, public_settings(run)
    is_distilled = run.record.tags.get("kdpipe.stage") == "distill"
    has_effect = {
        "loss": True,
        "also": settings.also is not None and not settings.also.is_off,
        "optimizer": True,
        "scheduler": True,
        "augmentation": not settings.augmentation.target.endswith(".no_augmentation"),
        # For the shares of its members, or how its file was read.
        "teacher": is_distilled and not isinstance(settings.teacher, NetworkSettings),
        "distillation": is_distilled and settings.distillation.outputs == "views",
    }
    shown = {section: sections[section] for section, counts in has_effect.items() if counts}
    if "also" in shown:
        shown["also"].pop("ce_weight", None)  # has no effect in a second loss
    if "distillation" in shown:
        shown["distillation"].pop("cache_max_gb", None)
    train = canonical(settings.train.model_dump(include=TRAIN_KEYS))
    shown["train"] = {key: value for key, value in train.items() if value not in (None, WITHOUT_EFFECT.get(key))}
    return shown


def _initial_weights(weights: str | None) -> str | None:
    """Where training started from, whose licence may apply; None for random weights."""
    if weights is None:
        return None
    return "weights pretrained on ImageNet" if weights == "imagenet" else f"the weights in {strip_folders(weights)}"


def _metrics_table(run: FinishedRun) -> str:
    rows = []
    for key, words in METRICS.items():
        if key not in run.metrics or (key == "selected/epoch" and run.settings.train.select != "best"):
            continue  # without a selection that epoch is simply the last one
        value = run.metrics[key]
        form = ".2%" if key.endswith(("accuracy", "f1", "agreement")) else ",.0f" if value >= 1000 else ".4g"
        rows.append([words, f"{value:{form}}".replace("%", " %")])
    return markdown_table(["of the run", ""], rows)


def _class_accuracies(by_class: Mapping[str, float]) -> str:
    """From best to worst; of more than 20 classes the first and the last five."""
    ranked = sorted(by_class.items(), key=itemgetter(1), reverse=True)
    texts = [f"{name} {100 * accuracy:.1f} %" for name, accuracy in ranked]
    return ", ".join(texts if len(texts) <= 20 else [*texts[:5], "…", *texts[-5:]])
