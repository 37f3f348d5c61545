"""What a student gained and lost over the same student alone, image by image: two students of equal accuracy may be
right on different images."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass

from kdpipe.compare.statistics import Interval, interval

Answers = dict[tuple[str, str], bool]  # of a test image, by its position and its label: whether the answer is right


@dataclass(frozen=True)
class Exchange:
    """Shares of the test images, means over seeds, fractions; their difference is the gain in accuracy.

    Attributes:
        gained: that the distilled student gets right, and the student alone got wrong.
        lost: the other way round.
    """

    gained: Interval
    lost: Interval


def read_answers(content: bytes) -> Answers:
    """The answers in a run's predictions.csv.

    Raises:
        ValueError: it is no such file.
    """
    try:
        lines = csv.reader(io.StringIO(content.decode(), newline=""))
        header = next(lines, [])
        image, label, answer = (header.index(column) for column in ("image", "label", "answer"))
        return {(line[image], line[label]): line[label] == line[answer] for line in lines}
    except (ValueError, IndexError, csv.Error) as error:
        raise ValueError(f"predictions.csv: columns image, label, answer are expected ({error})") from error


def exchange(pairs: Iterable[tuple[Answers, Answers]]) -> Exchange | None:
    """What was exchanged, from the answers of the distilled student and of the student alone, a pair for each seed.
    Pairs on different images say nothing and are left out; None where no pair is left."""
    gained, lost = [], []
    for distilled, alone in pairs:
        if not distilled or distilled.keys() != alone.keys():
            continue
        gained.append(sum(right and not alone[image] for image, right in distilled.items()) / len(distilled))
        lost.append(sum(alone[image] and not right for image, right in distilled.items()) / len(distilled))
    first, second = interval(gained), interval(lost)
    return Exchange(first, second) if first and second else None
