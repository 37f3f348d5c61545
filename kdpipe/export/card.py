"""The model card: what a model is, how good it is, how it was trained and how to use it. Its text is in card.md.j2."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from kdpipe import __version__
from kdpipe.assembly.finished_runs import FinishedRun
from kdpipe.export.formats import INT8, ONNX, PROGRAM
from kdpipe.export.measurements import Measurement, table_of
from kdpipe.export.sources import Sources, fitted_temperature, run_settings
from kdpipe.export.writers import strip_folders
from kdpipe.runs.names import UNLABELLED_IMAGES
from kdpipe.settings.addresses import WEIGHTS
from kdpipe.system.tables import markdown_table

TEMPLATE = Path(__file__).with_name("card.md.j2")
# A run's metrics, in the order of the card; fractions are shown in per cent.
METRICS = {
    "test/accuracy": "test accuracy",
    "test/top5_accuracy": "test accuracy, top 5",
    "test/loss": "test loss (cross-entropy)",
    "test/brier": "Brier score",
    "test/ece": "expected calibration error",
    "model/temperature": "temperature, fitted on validation images: probabilities are softmax(logits / temperature)",
    "test/ece_scaled": "expected calibration error at this temperature",
    "test/loss_scaled": "test loss at this temperature",
    "teacher/accuracy": "test accuracy of the teacher",
    "teacher/agreement": "test images with the teacher's prediction",
    "selected/epoch": "epoch with the best validation accuracy, whose weights these are",
    "model/params": "parameters",
    "model/flops": "FLOPs per image (convolutions and matrix products)",
    "model/size_mb": "size of the weights in MB (2²⁰ bytes)",
    "model/activation_mb": "activations per image in MB",
}
DESCRIPTIONS = {
    ONNX: "ONNX, float",
    INT8: "ONNX, 8-bit integers",
    PROGRAM: "torch.export (load such files only from sources that you trust)",
    WEIGHTS: "weights alone; config.yaml describes their network",
}


def model_card(
    sources: Sources, files: Collection[str], measurements: Sequence[Measurement], legend: str, license: str | None
) -> str:
    """README.md: Markdown with the front matter of the Hugging Face hub.

    Args:
        files: those in the folder.
        legend: of the measurements.
        license: of the weights; None if unknown.
    """
    run, config = sources.run, run_settings(sources.run)
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        class_accuracy=class_accuracies(sources.class_accuracy),
        data=sources.data,
        files={name: DESCRIPTIONS[name] for name in files if name in DESCRIPTIONS},
        front_matter=front_matter(sources, files, license),
        initial_weights=initial_weights(config["model"].get("weights")),
        legend=legend,
        license=license,
        measurements=markdown_table(*table_of(measurements)),
        methods=methods(config),
        metrics=metrics_table(run, config),
        model=config["model"],
        onnx=next((name for name in (ONNX, INT8) if name in files), None),
        record=run.record,
        run=run,
        second_student=config["teacher"]["name"],
        settings=yaml.safe_dump(strip_folders(training_settings(run, config)), sort_keys=False, allow_unicode=True),
        teacher=teacher_facts(sources, config, measurements),
        temperature=fitted_temperature(run),
        train=config["train"],
        unlabelled=unlabelled_facts(run, config),
        version=__version__,
    )


def front_matter(sources: Sources, files: Collection[str], license: str | None) -> str:
    run, data = sources.run, sources.data
    tags = ["image-classification", "kdpipe"]
    if run.record.tags.get("kdpipe.teacher_run"):
        tags.append("knowledge-distillation")
    if ONNX in files or INT8 in files:
        tags.append("onnx")
    front: dict[str, object] = {"license": "unknown"}
    if license:  # the hub knows licences by identifiers such as apache-2.0
        known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license.lower())
        front = {"license": license.lower()} if known else {"license": "other", "license_name": license}
    front |= {"pipeline_tag": "image-classification", "tags": tags, "metrics": ["accuracy"]}
    if "test/accuracy" in run.metrics:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data.name, "type": data.name, "split": "test"},
            "metrics": [{"type": "accuracy", "value": run.metrics["test/accuracy"]}],
        }
        front["model-index"] = [{"name": f"{run.name} on {data.name}", "results": [result]}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def teacher_facts(
    sources: Sources, config: Mapping[str, Any], measurements: Sequence[Measurement]
) -> dict[str, Any] | None:
    """The name, the weights and, if it could be opened, the accuracy of the teacher; None without one."""
    tags, teacher = sources.run.record.tags, config["teacher"]
    if not tags.get("kdpipe.teacher_run"):
        return None
    weights = f"runs:/{tags['kdpipe.teacher_run']}" if teacher["weights"] == "auto" else str(teacher["weights"])
    if teacher.get("members"):
        weights = ", ".join(teacher["members"])
    accuracy = measurements[0].accuracy if sources.teacher else None
    return {"name": teacher["name"], "weights": strip_folders(weights), "accuracy": accuracy}


def unlabelled_facts(run: FinishedRun, config: Mapping[str, Any]) -> dict[str, str] | None:
    """The number (unknown for older runs), the folder and the fingerprint of the unlabelled images."""
    tags = run.record.tags
    if "kdpipe.unlabelled" not in tags:
        return None
    return {
        "count": f"{int(tags[UNLABELLED_IMAGES]):,} " if UNLABELLED_IMAGES in tags else "",
        "folder": strip_folders(config["dataset"]["unlabelled_root"]),
        "fingerprint": tags["kdpipe.unlabelled"],
    }


def methods(config: Mapping[str, Any]) -> list[str]:
    """The class names of the losses that had an effect."""
    losses = [config.get(part) for part in ("loss", "also")]
    return [loss["_target_"].rpartition(".")[2] for loss in losses if loss and loss.get("alpha") != 0]


def training_settings(run: FinishedRun, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that had an effect on the training."""
    settings = {"loss": config["loss"]}
    if (also := config.get("also")) and also.get("alpha") != 0:
        settings["also"] = {key: value for key, value in also.items() if key != "ce_weight"}  # has no effect there
    settings |= {part: config[part] for part in ("optimizer", "scheduler")}
    if (augmentation := config.get("augmentation")) and not augmentation["_target_"].endswith(".no_augmentation"):
        settings["augmentation"] = augmentation
    is_distilled = run.record.tags.get("kdpipe.stage") == "distill"
    if is_distilled and config["teacher"].get("members"):  # for the shares of its members
        settings["teacher"] = config["teacher"]
    if is_distilled and (distillation := config.get("distillation")) and distillation["outputs"] == "views":
        settings["distillation"] = {key: distillation[key] for key in ("outputs", "views")}
    train = {key: config["train"].get(key) for key in ("epochs", "batch_size", "precision")}
    train |= {key: value for key in ("mixup", "cutmix", "clip_norm") if (value := config["train"].get(key)) is not None}
    if config["train"].get("select") == "best":
        train["select"] = "best"
    return {**settings, "train": train}


def initial_weights(weights: str | None) -> str | None:
    """Where training started from, whose licence may apply; None for random weights."""
    if weights is None:
        return None
    return "weights pretrained on ImageNet" if weights == "imagenet" else f"the weights in {strip_folders(weights)}"


def metrics_table(run: FinishedRun, config: Mapping[str, Any]) -> str:
    metrics = dict(run.metrics)
    if config["train"].get("select") != "best":
        metrics.pop("selected/epoch", None)  # simply the last one
    rows = [[words, metric_text(key, metrics[key])] for key, words in METRICS.items() if key in metrics]
    return markdown_table(["of the run", ""], rows)


def metric_text(key: str, value: float) -> str:
    if key.endswith(("accuracy", "agreement")):
        return f"{100 * value:.2f} %"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def class_accuracies(by_class: Mapping[str, float]) -> str:
    """From best to worst; of more than 20 classes the first and the last five."""
    ranked = sorted(by_class, key=lambda name: by_class[name], reverse=True)
    texts = [f"{name} {100 * by_class[name]:.1f} %" for name in ranked]
    return ", ".join(texts if len(texts) <= 20 else [*texts[:5], "…", *texts[-5:]])
