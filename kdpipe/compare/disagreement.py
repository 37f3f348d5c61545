"""Where a distilled student and the same student alone disagree, image by image: two students of equal accuracy may be
right on different images."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from kdpipe.compare.statistics import Interval, interval_with_images, share_interval

Correct = dict[tuple[str, str], bool]  # whether the prediction is right, by the test image's position and label


@dataclass(frozen=True)
class Disagreement:
    """Fractions of the test images, means over seeds; `gained` minus `lost` is the gain in accuracy."""

    gained: Interval  # right only with distillation
    lost: Interval  # right only without
    gain: Interval | None  # with an interval for seeds and test images; None for one seed, or different images
    images: int


def read_predictions(content: bytes) -> Correct:
    """Read a run's predictions.csv; ValueError if the columns image, label and answer cannot be read."""
    try:
        lines = csv.reader(io.StringIO(content.decode(), newline=""))
        header = next(lines, [])
        image, label, answer = (header.index(column) for column in ("image", "label", "answer"))
        return {(line[image], line[label]): line[label] == line[answer] for line in lines}
    except (ValueError, IndexError, csv.Error) as error:
        raise ValueError(f"predictions.csv: expected columns image, label, answer ({error})") from error


def find_disagreement(pairs: Iterable[tuple[Correct, Correct]]) -> Disagreement | None:
    """Compare the distilled student with the student alone, one pair per seed. Pairs on different images are left out;
    None if no pair remains."""
    pairs = [(distilled, alone) for distilled, alone in pairs if distilled and distilled.keys() == alone.keys()]
    gains = [fmean(right > alone[image] for image, right in distilled.items()) for distilled, alone in pairs]
    losses = [fmean(right < alone[image] for image, right in distilled.items()) for distilled, alone in pairs]
    gained, lost = share_interval(gains), share_interval(losses)
    if gained is None or lost is None:
        return None
    images = sorted(pairs[0][1])
    if any(alone.keys() != pairs[0][1].keys() for _, alone in pairs):
        return Disagreement(gained, lost, None, len(images))
    differences = [[int(distilled[image]) - int(alone[image]) for image in images] for distilled, alone in pairs]
    return Disagreement(gained, lost, interval_with_images(np.array(differences, dtype=np.int8)), len(images))
