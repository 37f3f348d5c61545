"""Whether a teacher has anything to teach, checked before a student spends hours on it."""

import logging
import math
from pathlib import Path

import torch
from scipy.stats import binomtest
from torch import Tensor

from kdpipe.data import ImageDataset
from kdpipe.data.dataset import subsample
from kdpipe.settings.errors import ConfigError
from kdpipe.system.hardware import Hardware
from kdpipe.system.once import warn_once
from kdpipe.training.precomputed import OutputRequest, logits_of_teacher, precomputed_outputs
from kdpipe.training.teacher import FrozenTeacher, Teacher

log = logging.getLogger("kdpipe")

SAMPLE = 1000  # images: enough for an accuracy within three points, and any teacher sees them in seconds
CHANCE = 0.05  # the probability that a guessing teacher passes for a better one
# A share of log(classes), the entropy of a teacher that knows nothing. At 5 %, about 98 % of an answer is on one of ten
# classes (99 % on one of two): less than label smoothing of 0.1 leaves to the others, so the labels say as much.
ONE_HOT = 0.05
TOLERANCE = 0.01  # of a teacher's accuracy: what other hardware may round differently


def check_teacher(
    name: str, teacher: Teacher, temperature: float | None, data: ImageDataset, folder: Path, hardware: Hardware
) -> None:
    """Log how accurate a teacher is and how soft its answers are; warn where distilling from it is mostly a no-op.

    Args:
        temperature: T of the loss; None where it has none, so that the softness does not matter.
        folder: keeps the answers, for up to 1,000 validation (else training) images and 1,000 training images.

    Raises:
        ConfigError: logits that are NaN or infinite, from which nothing can be learned.
    """
    split = "validation" if "validation" in data.splits and teacher.covers(data.splits["validation"]) else "train"
    labelled = data.splits[split][data.labels[data.splits[split]] >= 0]
    judged, taught = subsample(labelled, SAMPLE), subsample(data.splits["train"], SAMPLE)
    positions = torch.cat([judged, taught]).unique()
    answers = logits_of_teacher(teacher, name, data, positions, folder, hardware, logging.DEBUG)
    if bad := int((~answers[positions].isfinite()).any(dim=1).sum()):
        problem = f"its logits are NaN or infinite for {bad:,} of {len(positions):,} images"
        raise ConfigError("model@teacher", name, "a teacher whose weights and preprocessing go together", problem)

    labels, predicted = data.labels[judged], answers[judged].argmax(dim=1)
    correct, by_chance = int((predicted == labels).sum()), correct_by_chance(predicted, labels, data.num_classes)
    found = f"{100 * correct / len(judged):.1f} % of {len(judged):,} {split.replace('train', 'training')} images"
    is_one_hot = False
    if temperature is not None:
        entropy, highest = mean_entropy(answers[taught], temperature), math.log(data.num_classes)
        found += f", mean entropy {entropy:.2f} nats of {highest:.2f} at T {temperature:g}"
        is_one_hot = entropy < ONE_HOT * highest
    log.info("teacher %s: %s", name, found)
    if no_better_than_chance(correct, by_chance, len(judged)):
        warn_once(
            "teacher %s is no better than chance (%s; the same answers in any order: %.1f %%): distilling from it is "
            "mostly a no-op; %s",
            name,
            found,
            100 * by_chance / len(judged),
            teacher.remedy,
        )
    if is_one_hot:
        warn_once(
            "teacher %s answers near one-hot (%s), like the labels: distilling from it is mostly a no-op; "
            "a higher loss.temperature softens its answers",
            name,
            found,
        )


def check_recorded(name: str, teacher: FrozenTeacher, data: ImageDataset, folder: Path, hardware: Hardware) -> None:
    """Hold a teacher against what is known of it from its own run.

    Args:
        folder: keeps its answers for these images, of which the test images' are needed at the end anyway.

    Raises:
        ConfigError: it is less accurate here than in its own run, on the same images.
    """
    for recorded in teacher.recorded:
        positions = data.splits[recorded.split].sort().values
        request = OutputRequest("logits", name, recorded.classifier, recorded.classifier, data, positions)
        is_known = (folder / request.key(hardware)).exists()  # else it may take minutes
        level = logging.DEBUG if is_known else logging.INFO
        (answers,) = precomputed_outputs(request, folder, math.inf, hardware, level)
        right = answers[positions].argmax(dim=1) == data.labels[positions]
        accuracy = float(right.double().mean())
        if accuracy < recorded.accuracy - TOLERANCE:
            raise ConfigError(
                recorded.key,
                recorded.address,
                problem=f"{100 * accuracy:.1f} % of the {len(positions):,} {recorded.split} images are right here, "
                f"{100 * recorded.accuracy:.1f} % were in its own run: this is not the network that was trained there",
            )


def mean_entropy(logits: Tensor, temperature: float) -> float:
    """The mean entropy of softmax(logits / T), in nats, for logits [N, classes]."""
    # In float64, where logits of any size stay finite when a small T divides them.
    return float(torch.special.entr((logits.double() / temperature).softmax(dim=1)).sum(dim=1).mean())


def correct_by_chance(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """How many of these answers, int64 [n], would be right in a random order, on average. Always the most common class
    gains nothing by an order; where most images are of one class, to tell the others from it does, at the same
    accuracy."""
    counts = (each.bincount(minlength=classes).double() for each in (predicted, labels))
    return float(torch.dot(*counts)) / len(labels)


def no_better_than_chance(correct: int, by_chance: float, total: int) -> bool:
    """Whether the answers would be right as often in any order, as far as so many images can tell."""
    share = by_chance / total
    if share**total > CHANCE:  # not even a perfect teacher would stand out
        return False
    return bool(binomtest(correct, total, share, alternative="greater").pvalue > CHANCE)
