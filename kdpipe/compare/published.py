"""What papers report, for `python -m kdpipe.compare --published`; where it is from stands in published.csv."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kdpipe.compare.cells import Cell
from kdpipe.compare.statistics import Interval, interval
from kdpipe.settings.composition import compose_settings
from kdpipe.settings.identity import effective, what_matters

TABLE = Path(__file__).with_name("published.csv")
LAST, BEST = "last epoch", "best test epoch"
DATA = {"dataset.name": "cifar100", "dataset._target_": "kdpipe.data.downloaded.cifar100"}
# Where they differ, the result is the same (dataset.split_seed: or another setting differs, too), or is spoken of
# elsewhere (teacher.weights).
NOT_COMPARED = ("stage", "teacher.weights", "train.test_each_epoch", "dataset.split_seed")
NONE_PUBLISHED = (
    "published: no row has a published accuracy; known are, on CIFAR-100 with its own test images, KD, CRD and DKD "
    "of the pairs of experiment=benchmark/…, and their networks alone"
)


@dataclass(frozen=True)
class Published:
    """What a paper reports for a cell.

    Attributes:
        accuracy: on the test images, a fraction.
        epoch: whose accuracy that is, `LAST` or `BEST`.
        source: the paper and its table.
        difference: the cell's test accuracy minus the published one, fractions; None where the cell has none.
        otherwise: settings of the cell that are not the benchmark's: key, value, the benchmark's value.
    """

    accuracy: float
    epoch: str
    source: str
    difference: Interval | None
    otherwise: tuple[tuple[str, str, str], ...]


def published_for(cell: Cell) -> Published | None:
    """What is published for a cell's networks and method on CIFAR-100; None where nothing is."""
    settings = dict(cell.settings)
    if "also._target_" in settings or settings.get("loss.standardize") == "True":  # another method
        return None
    if any(settings.get(key, value) != value for key, value in DATA.items()):
        return None
    package, _, loss = settings["loss._target_"].rpartition(".")
    teacher = settings.get("teacher.name", "") if cell.stage == "distill" else ""
    line = read_table().get((settings["model.name"], teacher, loss))
    if line is None or not f"{package}.".startswith("kdpipe.losses."):
        return None
    accuracy = float(line["accuracy"]) / 100
    difference = interval([value - accuracy for value in cell.values("test/accuracy").values()])
    return Published(accuracy, line["epoch"], line["source"], difference, trained_otherwise(cell, line["overrides"]))


@cache
def read_table() -> dict[tuple[str, str, str], dict[str, str]]:
    """The lines of published.csv by network, teacher ("" for a network alone) and loss."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {(line["network"], line["teacher"], line["loss"]): line for line in csv.DictReader(lines)}


def trained_otherwise(cell: Cell, overrides: str) -> tuple[tuple[str, str, str], ...]:
    """The settings of a cell that are other than with these overrides: key, value, value with them. Of a part that is
    another one altogether, such as the optimizer, the name alone."""
    mine, theirs = dict(cell.settings), _settings_with(overrides, cell.stage == "distill")
    found: list[tuple[str, str, str]] = []
    for key, value in sorted(mine.items()):
        group, target = key.split(".")[0], f"{key.split('.')[0]}._target_"
        other = theirs.get(key, "none")
        if group == "kdpipe" or key in NOT_COMPARED or value == other:
            continue
        if key == target:
            found.append((group, value.rpartition(".")[2], other.rpartition(".")[2]))
        elif mine.get(target) == theirs.get(target):
            found.append((key, value, other))
    return tuple(found)


@cache
def _settings_with(overrides: str, needs_teacher: bool) -> dict[str, str]:
    flat = effective(compose_settings(overrides.split()).plain, needs_teacher)
    return {key: str(value) for key, value in what_matters(flat).items()}


def teacher_note(name: str, accuracy: float | None) -> str:
    """How good a teacher is beside the paper's; a student learns from what its teacher knows."""
    line = read_table()[name, "", "CrossEntropy"]
    here = "unknown here" if accuracy is None else f"{100 * accuracy:.2f} % here"
    return f"teacher {name}: {here}, {line['accuracy']} % in {line['source']}"


def notes_on(published: Iterable[Published]) -> list[str]:
    """What a reader has to know of published accuracies: where they are from, and what was done otherwise here."""
    all_of_them = list(published)
    if not all_of_them:
        return [NONE_PUBLISHED]
    said = []
    best = "of the epoch that was best on the test images, more than the last one has: not comparable with those here"
    for epoch, remark in ((LAST, "of the last epoch"), (BEST, best)):
        if sources := sorted({one.source for one in all_of_them if one.epoch == epoch}):
            said.append(f"published in {' and '.join(sources)}: accuracy {remark}")
    if any(one.difference and one.difference.low is not None for one in all_of_them):
        said.append("the interval of a difference to a published accuracy covers the seeds here, not the paper's")
    different = [one for one in all_of_them if one.otherwise]
    if not different:
        return [*said, "all rows that have a published accuracy were trained with the benchmark's settings"]
    values: dict[tuple[str, str], set[str]] = {}
    for one in different:
        for key, value, theirs in one.otherwise:
            values.setdefault((key, theirs), set()).add(value)
    what = ", ".join(f"{key}={' or '.join(sorted(mine))} instead of {theirs}" for (key, theirs), mine in values.items())
    number = f"{len(different)} of {len(all_of_them)} rows that have a published accuracy were trained with"
    return [*said, f"{number} other settings than the benchmark's: {what}"]
