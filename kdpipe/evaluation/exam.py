"""The final exam: a trained network on the test images, compared with its teacher."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.data import ImageDataset
from kdpipe.data.duplicates import Duplicates
from kdpipe.evaluation.inference import logits_of
from kdpipe.evaluation.metrics import (
    classification_metrics,
    confusion,
    divergence,
    negative_log_likelihood,
    reliability,
    scaling_temperature,
    teacher_agreement,
)
from kdpipe.runs.names import CLASSES, CONFUSION, DIFFERING, PREDICTIONS, RELIABILITY
from kdpipe.system.files import write_atomically
from kdpipe.system.hardware import Hardware
from kdpipe.system.optional import no_windows, optional
from kdpipe.system.padding import each_photo

log = logging.getLogger("kdpipe")

SHOWN = 16  # images on which student and teacher differ most
FILES = (PREDICTIONS, CLASSES, CONFUSION, RELIABILITY, DIFFERING)


@dataclass(frozen=True)
class Exam:
    """What two networks predict for n test images."""

    positions: Tensor  # of the images in the data set, int64 [n]
    labels: Tensor  # int64 [n]
    student: Tensor  # the trained network's logits, float32 [n, classes]
    teacher: Tensor | None = None  # its teacher's, if it has one
    temperature: float | None = None  # at which the student's probabilities fit the validation images best, if any does

    def metrics(self) -> dict[str, float]:
        """The student's `classification_metrics` as `test/accuracy`, …; `test/ece_scaled` and `test/loss_scaled`, after
        temperature scaling by `model/temperature`; the teacher's as `teacher/accuracy`, …, and their agreement."""
        found = {f"test/{name}": value for name, value in classification_metrics(self.student, self.labels).items()}
        if self.temperature is not None:
            scaled = reliability(self.student, self.labels, self.temperature)
            found["model/temperature"] = self.temperature
            found["test/ece_scaled"] = scaled.error
            found["test/loss_scaled"] = negative_log_likelihood(self.student, self.labels, self.temperature)
        if self.teacher is not None:
            of_teacher = classification_metrics(self.teacher, self.labels)
            of_teacher |= teacher_agreement(self.student, self.teacher, self.labels)
            found |= {f"teacher/{name}": value for name, value in of_teacher.items()}
        return found


def examine(learner: nn.Module, data: ImageDataset, hardware: Hardware, teacher_logits: Tensor | None = None) -> Exam:
    """Run the trained network on the test images, and on the validation images if there are any.

    Args:
        data: what the learner takes: the images, or what its frozen backbone made of them.
        teacher_logits: the teacher's for the test images, float32 [n, classes].

    Raises ValueError for logits that are NaN or infinite.
    """
    positions, labels = data.splits["test"].cpu(), data.labels.cpu()
    student = require_finite("the trained network", logits_of(learner, data, "test", hardware))
    temperature = None
    if "validation" in data.splits:
        validation = logits_of(learner, data, "validation", hardware)
        with optional("temperature scaling"):
            temperature = scaling_temperature(validation, labels[data.splits["validation"].cpu()])
        if temperature is None:
            log.info("temperature scaling: no temperature fits the validation images better than all others")
    return Exam(positions, labels[positions], student, teacher_logits, temperature)


def require_finite(network: str, logits: Tensor) -> Tensor:
    """The logits [n, classes]. Raises ValueError if some are NaN or infinite."""
    if bad := int((~logits.isfinite()).any(dim=1).sum()):
        raise ValueError(f"{network} has logits that are NaN or infinite for {bad} of {len(logits)} test images")
    return logits


def write_exam(exam: Exam, data: ImageDataset, folder: Path, with_figures: bool) -> list[Path]:
    """Write predictions.csv (a line per test image), classes.csv (a line per class) and the figures; files that an
    earlier run left in the folder are removed."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    tables = {PREDICTIONS: prediction_frame(exam, data.class_names), CLASSES: class_frame(exam, data.class_names)}
    contents = {name: table.to_csv(index=False, lineterminator="\n").encode() for name, table in tables.items()}
    if with_figures:
        contents |= _draw(exam, data)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def caveats(exam: Exam, class_names: Sequence[str], duplicates: Sequence[Duplicates] = ()) -> list[str]:
    """What an accuracy hides: the same prediction for all images, classes without test images, images that are also in
    another split."""
    found = []
    for network, logits in (("the trained network", exam.student), ("its teacher", exam.teacher)):
        predicted = set() if logits is None else set(logits.argmax(dim=1).tolist())
        if len(predicted) == 1 and len(class_names) > 1:
            found.append(f"{network} predicts {class_names[predicted.pop()]} for all {len(exam.labels):,} test images")
    present = set(exam.labels.tolist())
    if missing := [name for label, name in enumerate(class_names) if label not in present]:
        found.append(f"no test images of {', '.join(missing)}: the metrics say nothing about them")
    return [*found, *(f"{one}: {_without(one, exam)}" for one in duplicates)]


def _without(duplicates: Duplicates, exam: Exam) -> str:
    """The accuracy on the test images that are in no other split, in words."""
    if duplicates.split != "test":
        return "accuracies on them are too good to choose by"
    new = ~torch.isin(exam.positions, duplicates.positions)
    if not new.any():
        return "the metrics say nothing about new images"
    accuracy = classification_metrics(exam.student[new], exam.labels[new])["accuracy"]
    return f"the accuracy on the others is {100 * accuracy:.2f} %"


def prediction_frame(exam: Exam, class_names: Sequence[str]) -> pd.DataFrame:
    """For each image its position in the data set, its label, and each prediction (`answer`) with its probability."""
    columns = {"image": exam.positions.tolist(), "label": [class_names[label] for label in exam.labels.tolist()]}
    columns["answer"], columns["probability"] = _predictions(exam.student, class_names)
    if exam.teacher is not None:
        columns["teacher_answer"], columns["teacher_probability"] = _predictions(exam.teacher, class_names)
    return pd.DataFrame(columns)


def _predictions(logits: Tensor, class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Predicted classes and their probabilities, by name and with four digits."""
    probabilities, predicted = logits.double().softmax(dim=1).max(dim=1)
    return [class_names[label] for label in predicted.tolist()], [f"{share:.4f}" for share in probabilities.tolist()]


def class_frame(exam: Exam, class_names: Sequence[str]) -> pd.DataFrame:
    """For each class its number of images, the accuracy on them (the teacher's, too), and what they are mistaken for
    most often."""
    counts = confusion(exam.student, exam.labels)
    total = counts.sum(axis=1)
    columns: dict[str, list[object]] = {"class": list(class_names), "images": total.tolist()}
    columns["accuracy"] = _shares(counts, total)
    if exam.teacher is not None:
        columns["teacher_accuracy"] = _shares(confusion(exam.teacher, exam.labels), total)
    wrong = counts - np.diag(np.diag(counts))
    columns["mistaken_for"] = [class_names[row.argmax()] if row.any() else "" for row in wrong]
    columns["mistaken"] = wrong.max(axis=1).tolist()
    return pd.DataFrame(columns)


def _shares(counts: NDArray[np.int64], total: NDArray[np.int64]) -> list[object]:
    """The accuracy on each class; "" for one without images."""
    return [f"{right / images:.4f}" if images else "" for right, images in zip(np.diag(counts), total, strict=True)]


def _draw(exam: Exam, data: ImageDataset) -> dict[str, bytes]:
    """The figures, PNG by file name, without those that cannot be drawn; the images on which student and teacher differ
    only if there is a teacher."""
    drawn: dict[str, bytes] = {}
    with optional("figures"):
        with no_windows():  # Matplotlib takes as long to import as an epoch of a small data set
            from kdpipe.evaluation import figures
        networks = {"network": reliability(exam.student, exam.labels)}
        if exam.teacher is not None:
            networks = {"student": networks["network"], "teacher": reliability(exam.teacher, exam.labels)}
        with optional(CONFUSION):
            figure = figures.draw_confusion(confusion(exam.student, exam.labels), data.class_names)
            drawn[CONFUSION] = figures.as_png(figure)
        with optional(RELIABILITY):
            drawn[RELIABILITY] = figures.as_png(figures.draw_reliability(networks))
        if exam.teacher is not None:
            with optional(DIFFERING):
                figure = figures.draw_differing(*_most_differing(exam, exam.teacher, data))
                drawn[DIFFERING] = figures.as_png(figure)
    return drawn


def _most_differing(exam: Exam, teacher: Tensor, data: ImageDataset) -> tuple[list[Tensor], list[tuple[str, ...]]]:
    """The images, uint8 [C, H, W], on which both differ most, each with its label, predictions and probabilities."""
    order = divergence(exam.student, teacher).argsort(descending=True, stable=True)[:SHOWN]
    columns = [[data.class_names[label] for label in exam.labels[order].tolist()]]
    for logits in (exam.student, teacher):
        columns += _predictions(logits[order], data.class_names)
    images = data.images[exam.positions[order]].cpu()
    return each_photo(images) if data.keeps_shapes else list(images), list(zip(*columns, strict=True))
