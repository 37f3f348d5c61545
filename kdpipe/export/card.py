"""The model card: what a model is, how good, how it was made and how it is used, made from its run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from kdpipe import __version__
from kdpipe.assembly import plain
from kdpipe.assembly.finished_runs import FinishedRun
from kdpipe.data import ImageDataset
from kdpipe.export.check import Row, as_markdown, legend
from kdpipe.export.deployed import INT8, ONNX, PROGRAM, WEIGHTS, temperature_of
from kdpipe.export.formats import without_places
from kdpipe.runs.names import UNLABELLED_IMAGES
from kdpipe.settings.config import is_ensemble

# What runs measure, in the order of the card; shares are told in per cent.
METRICS = {
    "test/accuracy": "test accuracy",
    "test/top5_accuracy": "test accuracy, best five",
    "test/loss": "test loss (cross-entropy)",
    "test/brier": "Brier score",
    "test/ece": "expected calibration error",
    "model/temperature": "temperature, fitted on validation images: probabilities are softmax(logits / temperature)",
    "test/ece_scaled": "expected calibration error with it",
    "test/loss_scaled": "test loss with it",
    "teacher/accuracy": "the teacher's test accuracy",
    "teacher/agreement": "test images with the teacher's answer",
    "selected/epoch": "epoch whose weights these are, chosen by validation accuracy",
    "model/params": "parameters",
    "model/flops": "operations for an image (FLOPs of convolutions and matrix products)",
    "model/size_mb": "size of the weights in MB of 2²⁰ bytes",
    "model/activation_mb": "activations for an image in MB",
}
# As onnxruntime's documentation of its quantisation has it.
INT8_LIMIT = (
    f" {INT8} was checked and timed on the machine that exported it: on CPUs without instructions for 8-bit products "
    "(VNNI on x86) it is slower, and its sums may overflow and cost accuracy."
)
FILES = {
    ONNX: "ONNX, float",
    INT8: "ONNX, 8-bit integers",
    PROGRAM: "torch.export (load such files only from whom you trust)",
    WEIGHTS: "weights alone; config.yaml says of which network",
}


@dataclass(frozen=True)
class Taught:
    """By whom a student was taught: the network's name, and its accuracy on the checked images where it is known."""

    name: str
    accuracy: float | None


def card(
    run: FinishedRun,
    data: ImageDataset,
    teacher: Taught | None,
    rows: Sequence[Row],
    files: Sequence[str],
    license: str | None,
    checked: int,
    cores: int,
    by_class: Mapping[str, float],
) -> str:
    """README.md, as Markdown with the front matter of Hugging Face's hub.

    Args:
        files: those in the folder.
        license: of the weights, None where nobody has said.
        checked: test images that `rows` are about.
        cores: threads that "all" means there.
        by_class: the accuracy on the test images of each class.
    """
    channels, height, width = run.image_shape
    parts = [
        f"---\n{front_matter(run, data, files, license)}---",
        f"# {run.name} on {data.name}",
        what(run, data, teacher),
        "## Files\n\n" + "\n".join(f"- `{name}`: {FILES[name]}" for name in files if name in FILES),
        "Input: `images`, uint8 [batch, "
        f"{channels}, {height}, {width}], raw pixels from 0 to 255 ({'RGB' if channels == 3 else 'grey'}), any batch "
        f"size; resizing and normalising are inside. Output: `logits`, float32 [batch, {data.num_classes}].",
        "## Use\n\n" + use(run, files),
        "## Data\n\n" + about_data(run, data),
        "## Training\n\n" + method(run, teacher),
        "## Numbers\n\n" + numbers(measured(run)),
        *([spread(by_class)] if by_class else []),
        f"{as_markdown(rows)}\n\n({legend(rows, checked, cores)})",
        "## Limits\n\n"
        f"The accuracy is that on the test images of {data.name}, and says nothing of other images. It is of a single "
        "run with a single seed. "
        + ("The test images were looked at after each epoch. " if run.config.train.get("test_each_epoch") else "")
        + "Every image gets one of the classes, also one that shows none of them."
        + (INT8_LIMIT if INT8 in files else ""),
        f"## Licence of the weights\n\n{license or 'not stated'}\n\n{origin(run)}",
        "## Provenance\n\n" + provenance(run),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(run: FinishedRun, data: ImageDataset, files: Sequence[str], license: str | None) -> str:
    tags = ["image-classification", "kdpipe"]
    if run.record.tags.get("kdpipe.teacher_run"):
        tags.append("knowledge-distillation")
    if ONNX in files or INT8 in files:
        tags.append("onnx")
    said: dict[str, object] = {"license": "unknown"}
    if license:  # the hub knows licences by identifiers such as apache-2.0
        known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license.lower()) and " " not in license
        said = {"license": license.lower()} if known else {"license": "other", "license_name": license}
    said |= {"pipeline_tag": "image-classification", "tags": tags, "metrics": ["accuracy"]}
    if "test/accuracy" in run.metrics:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data.name, "type": data.name, "split": "test"},
            "metrics": [{"type": "accuracy", "value": run.metrics["test/accuracy"]}],
        }
        said["model-index"] = [{"name": f"{run.name} on {data.name}", "results": [result]}]
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def what(run: FinishedRun, data: ImageDataset, teacher: Taught | None) -> str:
    says = f"A {run.name} that tells which of {data.num_classes} classes an image of {data.name} shows"
    if not teacher:
        return f"{says}."
    return f"{says}, distilled from a{'n' if teacher.name[0] in 'aeiou' else ''} {teacher.name}."


def use(run: FinishedRun, files: Sequence[str]) -> str:
    trust = " --trust" if files and all(name == PROGRAM for name in files if name in FILES) else ""
    parts = [f"    python -m kdpipe.predict . photo.jpg{trust}"]
    if ONNX in files or INT8 in files:
        channels, height, width = run.image_shape
        mode, axes = ("RGB", "transpose(2, 0, 1)[None]") if channels == 3 else ("L", "[None, None]")
        axes = axes if axes.startswith("[") else f".{axes}"
        divided = " / float(said['temperature'])" if temperature_of(run) != 1 else ""
        parts += [
            "or, with onnxruntime alone, for photos of 8 bits a channel:",
            f"""```python
import json, numpy, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession("{ONNX if ONNX in files else INT8}")
said = session.get_modelmeta().custom_metadata_map
photo = Image.open("photo.jpg").convert("{mode}").resize(({width}, {height}), Image.Resampling.BILINEAR)
logits = session.run(None, {{"images": numpy.asarray(photo){axes}}})[0][0]{divided}
probabilities = numpy.exp(logits - logits.max()) / numpy.exp(logits - logits.max()).sum()
print(json.loads(said["class_names"])[probabilities.argmax()], probabilities.max())
```""",
        ]
    return "\n\n".join(parts)


def about_data(run: FinishedRun, data: ImageDataset) -> str:
    sizes = ", ".join(f"{len(positions):,} {name}" for name, positions in data.splits.items())
    lines = [f"{data.name}: {sizes} images of {run.image_shape[2]}×{run.image_shape[1]} pixels (fingerprint"]
    lines[0] += f" {data.fingerprint})."
    tags = run.record.tags
    if "kdpipe.unlabelled" in tags:
        count = f"{int(tags[UNLABELLED_IMAGES]):,} " if UNLABELLED_IMAGES in tags else ""  # older runs do not tell
        folder = without_places(run.config.dataset.unlabelled_root)
        lines.append(
            f"Beside them {count}images without a label ({folder}, fingerprint {tags['kdpipe.unlabelled']}): of these "
            "it learned the other network's answers alone."
        )
    lines.append(f"{data.num_classes} classes: {', '.join(data.class_names)}.")
    return "\n\n".join(lines)


def method(run: FinishedRun, teacher: Taught | None) -> str:
    config, settings = run.config, settings_of(run)
    if config.train.epochs == 0:
        return "Nothing was trained in this run."
    methods = [
        settings[part]["_target_"].rpartition(".")[2]
        for part in ("loss", "also")
        if part in settings and settings[part].get("alpha") != 0
    ]
    lines = []
    if teacher:
        known = "" if teacher.accuracy is None else f", {100 * teacher.accuracy:.2f} % on the checked images"
        lines.append(f"Teacher: {teacher.name} ({without_places(weights_of_teacher(run))}){known}.")
    elif methods == ["Mutual"]:
        lines.append(f"Taught by a second student ({config.teacher.name}), and it by this one.")
    else:
        lines.append("Trained on the labels alone.")
    if methods not in ([], ["CrossEntropy"]):
        lines.append(f"Method: {' + '.join(methods)}.")
    if config.model.get("freeze") == "backbone":
        lines.append("Only its head was trained; the backbone stayed as it was (freeze: backbone).")
    if earlier := re.search(r"/epoch_(\d+)$", run.address):
        lines.append(f"The weights are those after epoch {earlier[1]} of {run.config.train.epochs}.")
    lines.append(f"```yaml\n{yaml.safe_dump(without_places(settings), sort_keys=False, allow_unicode=True)}```")
    return "\n\n".join(lines)


def settings_of(run: FinishedRun) -> dict[str, Any]:
    """How it learned: the parts of its config that had an effect on it."""
    config = run.config
    settings = {"loss": plain(config.loss)}
    if "also" in config and config.also.get("alpha") != 0:
        settings["also"] = {key: value for key, value in plain(config.also).items() if key != "ce_weight"}  # not used
    settings |= {part: plain(config[part]) for part in ("optimizer", "scheduler")}
    if "augmentation" in config and not str(config.augmentation.get("_target_")).endswith(".no_augmentation"):
        settings["augmentation"] = plain(config.augmentation)
    is_taught = run.record.tags.get("kdpipe.stage") == "distill"
    if is_taught and is_ensemble(config.teacher):  # with its members' shares
        settings["teacher"] = plain(config.teacher)
    if is_taught and "distillation" in config and config.distillation.get("outputs") == "views":
        settings["distillation"] = {key: config.distillation[key] for key in ("outputs", "views")}
    train = {key: config.train.get(key) for key in ("epochs", "batch_size", "precision")}
    train |= {key: config.train[key] for key in ("mixup", "cutmix", "clip_norm") if config.train.get(key) is not None}
    if config.train.get("select") == "best":  # by validation
        train["select"] = "best"
    settings["train"] = train
    return settings


def weights_of_teacher(run: FinishedRun) -> str:
    """Their addresses, or the name of the file."""
    teacher = run.config.teacher
    if is_ensemble(teacher):
        return ", ".join(teacher.members)
    return f"runs:/{run.record.tags['kdpipe.teacher_run']}" if teacher.weights == "auto" else str(teacher.weights)


def measured(run: FinishedRun) -> dict[str, float]:
    """The run's metrics, without the epoch that was taken where it was simply the last one."""
    chosen = run.config.train.get("select") == "best"
    return {key: value for key, value in run.metrics.items() if chosen or key != "selected/epoch"}


def numbers(metrics: Mapping[str, float]) -> str:
    lines = ["| of the run | |", "| --- | ---: |"]
    for key, words in METRICS.items():
        if key in metrics:
            lines.append(f"| {words} | {number(key, metrics[key])} |")
    return "\n".join(lines)


def spread(by_class: Mapping[str, float]) -> str:
    """What an accuracy over all classes may hide."""
    ranked = sorted(by_class, key=lambda name: by_class[name], reverse=True)
    shown = ranked if len(ranked) <= 20 else [*ranked[:5], "…", *ranked[-5:]]
    texts = [name if name == "…" else f"{name} {100 * by_class[name]:.1f} %" for name in shown]
    return f"Test accuracy by class: {', '.join(texts)}."


def number(key: str, value: float) -> str:
    if key.endswith(("accuracy", "agreement")):
        return f"{100 * value:.2f} %"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def origin(run: FinishedRun) -> str:
    """Where the weights started from, which a licence may come with."""
    weights = run.config.model.get("weights")
    did = "are" if run.config.train.epochs == 0 else "started from"
    if weights is None:
        return f"They {did} random numbers."
    those = "weights pretrained on ImageNet" if weights == "imagenet" else f"those of {without_places(str(weights))}"
    return f"They {did} {those}, whose terms hold for them, too."


def provenance(run: FinishedRun) -> str:
    tags = run.record.tags
    commit = tags.get("git.commit")
    dirty = " (with changes that are in no commit)" if tags.get("git.dirty", "").lower() == "true" else ""
    lines = [
        f"- run: {run.record.id} ({run.record.name}), seed {run.record.params['seed']}",
        f"- weights: {run.address}",
    ]
    if commit:
        lines.append(f"- git commit of the training: {commit}{dirty}")
    lines.append(f"- exported by kdpipe {__version__}")
    return "\n".join(lines)
