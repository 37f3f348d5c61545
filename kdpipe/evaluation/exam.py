"""The final exam: what a trained network makes of the test images, beside its teacher."""

import csv
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.data import ImageDataset
from kdpipe.evaluation.evaluate import logits_of
from kdpipe.evaluation.metrics import (
    beside_teacher,
    confusion,
    divergence,
    negative_log_likelihood,
    quality,
    reliability,
    scaling_temperature,
)
from kdpipe.runs.names import CLASSES, CONFUSION, DIFFERING, PREDICTIONS, RELIABILITY
from kdpipe.system.files import write_atomically
from kdpipe.system.hardware import Hardware
from kdpipe.training.teacher import Teacher
from kdpipe.training.teacher_answers import Question, known_outputs

log = logging.getLogger("kdpipe")

SHOWN = 16  # images on which two networks differ most
FILES = (PREDICTIONS, CLASSES, CONFUSION, RELIABILITY, DIFFERING)


@dataclass(frozen=True)
class Exam:
    """What is answered to n test images.

    Attributes:
        positions: of the images in the data set, int64 [n].
        labels: int64 [n].
        student: the trained network's logits, float32 [n, classes].
        teacher: its teacher's, where there is one.
        temperature: at which the student's probabilities fit validation images best, where there are any.
    """

    positions: Tensor
    labels: Tensor
    student: Tensor
    teacher: Tensor | None = None
    temperature: float | None = None

    def metrics(self) -> dict[str, float]:
        """`test/accuracy` and what else `quality` finds; `test/ece_scaled` and `test/loss_scaled`, the same after
        temperature scaling by `model/temperature`; `teacher/accuracy` and so on, what is found of the teacher, and
        what of both beside each other."""
        found = {f"test/{name}": value for name, value in quality(self.student, self.labels).items()}
        if self.temperature is not None:
            scaled = reliability(self.student, self.labels, self.temperature)
            found["model/temperature"] = self.temperature
            found["test/ece_scaled"] = scaled.error
            found["test/loss_scaled"] = negative_log_likelihood(self.student, self.labels, self.temperature)
        if self.teacher is not None:
            of_teacher = quality(self.teacher, self.labels) | beside_teacher(self.student, self.teacher, self.labels)
            found |= {f"teacher/{name}": value for name, value in of_teacher.items()}
        return found


def take_exam(
    learner: nn.Module,
    data: ImageDataset,
    images: ImageDataset,
    hardware: Hardware,
    teacher: Teacher | None,
    teacher_name: str,
    folder: Path,
) -> Exam:
    """Ask the trained network about the test images, and the validation images where there are any.

    Args:
        data: what the learner takes: the images, or what its frozen backbone made of them.
        images: the data set as it is stored.
        teacher: asked about its test images, too, once: the answers are kept in `folder`.

    Raises:
        ValueError: answers that are no finite numbers.
    """
    positions = data.splits["test"].cpu()
    student = finite("the trained network", logits_of(learner, data, "test", hardware))
    temperature = None
    if "validation" in data.splits:
        validation = logits_of(learner, data, "validation", hardware)
        temperature = scaling_temperature(validation, images.labels[images.splits["validation"]])
        if temperature is None:
            log.info("temperature scaling: no temperature fits the validation images better than all others")
    teachers = None
    if teacher and hardware.rank == 0:
        in_order = positions.sort().values
        question = Question("logits", teacher_name, teacher.classifier, teacher.classifier, images, in_order)
        (known,) = known_outputs(question, folder, math.inf, hardware)
        teachers = finite(f"the teacher {teacher_name}", known[positions].clone())
    return Exam(positions, images.labels[positions], student, teachers, temperature)


def finite(who: str, logits: Tensor) -> Tensor:
    """The logits [n, classes].

    Raises:
        ValueError: some are NaN or infinite.
    """
    bad = int((~logits.isfinite()).any(dim=1).sum())
    if bad:
        raise ValueError(f"{who} answers {bad} of {len(logits)} test images with logits that are no finite numbers")
    return logits


def write_files(exam: Exam, data: ImageDataset, folder: Path, draws: bool) -> list[Path]:
    """Write predictions.csv (a line for each test image) and classes.csv (a line for each class), and where `draws` the
    pictures; what an earlier run left of them in the folder is gone."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    contents = {
        PREDICTIONS: as_csv(predictions(exam, data.class_names)),
        CLASSES: as_csv(by_class(exam, data.class_names)),
    }
    if draws:
        contents |= draw(exam, data)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def oddities(exam: Exam, class_names: Sequence[str]) -> list[str]:
    """What an accuracy alone does not show: one answer to everything, classes without a test image."""
    found = []
    for who, logits in (("the trained network", exam.student), ("its teacher", exam.teacher)):
        answers = set() if logits is None else set(logits.argmax(dim=1).tolist())
        if len(answers) == 1 and len(class_names) > 1:
            found.append(f"{who} answers {class_names[answers.pop()]} to all {len(exam.labels):,} test images")
    there = set(exam.labels.tolist())
    if missing := [name for label, name in enumerate(class_names) if label not in there]:
        found.append(f"there is no test image of {', '.join(missing)}: what is measured says nothing of them")
    return found


def as_csv(lines: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def predictions(exam: Exam, class_names: Sequence[str]) -> list[list[object]]:
    """For each image its position in the data set, its label, the answer and its probability; the teacher's, too."""
    titles = ["image", "label", "answer", "probability"]
    columns: list[list[object]] = [exam.positions.tolist(), [class_names[label] for label in exam.labels.tolist()]]
    columns += _answers(exam.student, class_names)
    if exam.teacher is not None:
        titles += ["teacher_answer", "teacher_probability"]
        columns += _answers(exam.teacher, class_names)
    return [titles, *(list(line) for line in zip(*columns, strict=True))]


def _answers(logits: Tensor, class_names: Sequence[str]) -> list[list[object]]:
    probabilities, answers = logits.double().softmax(dim=1).max(dim=1)
    return [
        [class_names[answer] for answer in answers.tolist()],
        [f"{probability:.4f}" for probability in probabilities.tolist()],
    ]


def by_class(exam: Exam, class_names: Sequence[str]) -> list[list[object]]:
    """For each class its images, the share of them that is recognised (by the teacher, too), and what the others are
    taken for most often."""
    counts = confusion(exam.student, exam.labels)
    total = counts.sum(axis=1)
    columns: dict[str, list[object]] = {"class": list(class_names), "images": total.tolist()}
    columns["accuracy"] = _shares(counts, total)
    if exam.teacher is not None:
        columns["teacher_accuracy"] = _shares(confusion(exam.teacher, exam.labels), total)
    wrong = counts - np.diag(np.diag(counts))
    columns["mistaken_for"] = [class_names[row.argmax()] if row.any() else "" for row in wrong]
    columns["mistaken"] = wrong.max(axis=1).tolist()
    return [list(columns), *(list(line) for line in zip(*columns.values(), strict=True))]


def _shares(counts: NDArray[np.int64], total: NDArray[np.int64]) -> list[object]:
    """Of each class what is recognised; nothing for one without images."""
    return [
        f"{right / all_of_it:.4f}" if all_of_it else "" for right, all_of_it in zip(np.diag(counts), total, strict=True)
    ]


def draw(exam: Exam, data: ImageDataset) -> dict[str, bytes]:
    """The pictures by file name; the images on which student and teacher differ only where there is a teacher."""
    from kdpipe.evaluation import (
        figures as pictures,  # imports matplotlib, which takes as long as an epoch of a small data set
    )

    shown = {"student" if exam.teacher is not None else "network": reliability(exam.student, exam.labels)}
    if exam.teacher is not None:
        shown["teacher"] = reliability(exam.teacher, exam.labels)
    drawn = {
        CONFUSION: pictures.confusion(confusion(exam.student, exam.labels), data.class_names),
        RELIABILITY: pictures.reliability(shown),
    }
    if exam.teacher is not None:
        drawn[DIFFERING] = pictures.differing(*_most_differing(exam, data))
    return {name: pictures.to_png(figure) for name, figure in drawn.items()}


def _most_differing(exam: Exam, data: ImageDataset) -> tuple[Tensor, list[tuple[str, ...]]]:
    """The 16 images, uint8 [n, C, H, W], on which student and teacher differ most, the most differing first, and for
    each its label and both answers with their probabilities."""
    assert exam.teacher is not None
    order = divergence(exam.student, exam.teacher).argsort(descending=True, stable=True)[:SHOWN]
    names, told = data.class_names, []
    (student, teacher) = (_answers(logits[order], names) for logits in (exam.student, exam.teacher))
    for number, label in enumerate(exam.labels[order].tolist()):
        told.append(
            (names[label], *(str(column[number]) for column in student), *(str(column[number]) for column in teacher))
        )
    return data.images[exam.positions[order]].cpu(), told
