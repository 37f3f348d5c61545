"""Published accuracies, for `python -m kdpipe.compare --published`; published.csv gives their sources."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kdpipe.compare.cells import Cell
from kdpipe.compare.statistics import Interval, share_interval, shifted
from kdpipe.settings.composition import compose_settings
from kdpipe.settings.identity import effective, what_matters

TABLE = Path(__file__).with_name("published.csv")
LAST, BEST = "last epoch", "best test epoch"
DATA = {"dataset.name": "cifar100", "dataset._target_": "kdpipe.data.downloaded.cifar100"}
# Differences that leave the result as it is (dataset.split_seed: unless another setting differs, too), or that another
# note covers (teacher.weights).
NOT_COMPARED = ("stage", "teacher.weights", "train.test_each_epoch", "dataset.split_seed")
NONE_PUBLISHED = (
    "published: no row has a published accuracy; there are some on CIFAR-100 and its own test images, for KD, CRD and "
    "DKD with the pairs of experiment=benchmark/…, and for their networks alone"
)


@dataclass(frozen=True)
class Published:
    """A published result for a cell."""

    accuracy: float  # on the test images, a fraction
    epoch: str  # of that accuracy: LAST or BEST
    source: str  # the paper and its table
    difference: Interval | None  # the cell's test accuracy minus the published one, fractions
    deviations: tuple[tuple[str, str, str], ...]  # settings that differ: key, value, the benchmark's value


def published_for(cell: Cell) -> Published | None:
    """The published result for a cell's networks and method on CIFAR-100, or None."""
    settings = cell.settings
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
    mine = share_interval(list(cell.values("test/accuracy").values()))
    difference = shifted(mine, accuracy) if mine else None
    return Published(accuracy, line["epoch"], line["source"], difference, tuple(_deviations(cell, line["overrides"])))


@cache
def read_table() -> dict[tuple[str, str, str], dict[str, str]]:
    """The lines of published.csv by network, teacher ("" for a network alone) and loss."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {(line["network"], line["teacher"], line["loss"]): line for line in csv.DictReader(lines)}


def _deviations(cell: Cell, overrides: str) -> Iterator[tuple[str, str, str]]:
    """The settings that differ from those of the overrides; of another optimizer, loss and so on, only its name."""
    mine, theirs = cell.settings, _settings_with(overrides, cell.stage == "distill")
    for key, value in sorted(mine.items()):
        group, other = key.split(".")[0], theirs.get(key, "none")
        target = f"{group}._target_"
        if group == "kdpipe" or key in NOT_COMPARED or value == other:
            continue
        if key == target:
            yield group, value.rpartition(".")[2], other.rpartition(".")[2]
        elif mine.get(target) == theirs.get(target):
            yield key, value, other


@cache
def _settings_with(overrides: str, needs_teacher: bool) -> dict[str, str]:
    flat = effective(compose_settings(overrides.split()).plain, needs_teacher)
    return {key: str(value) for key, value in what_matters(flat).items()}


def teacher_note(name: str, accuracy: float | None) -> str:
    """A teacher's accuracy next to the published one: students depend on it."""
    line = read_table()[name, "", "CrossEntropy"]
    here = "unknown here" if accuracy is None else f"{100 * accuracy:.2f} % here"
    return f"teacher {name}: {here}, {line['accuracy']} % in {line['source']}"


def published_notes(found: Sequence[Published]) -> list[str]:
    """What a reader has to know about published accuracies: their sources, and which settings differ here."""
    if not found:
        return [NONE_PUBLISHED]
    notes = []
    best = "of the epoch that was best on the test images, which flatters: not comparable with the last epoch's here"
    for epoch, remark in ((LAST, "of the last epoch"), (BEST, best)):
        if sources := sorted({result.source for result in found if result.epoch == epoch}):
            notes.append(f"published in {' and '.join(sources)}: accuracy {remark}")
    if any(result.difference and result.difference.low is not None for result in found):
        notes.append("the interval of a difference to a published accuracy covers the seeds here, not the paper's")
    different = [result for result in found if result.deviations]
    if not different:
        return [*notes, "all rows with a published accuracy were trained with the benchmark's settings"]
    values: dict[tuple[str, str], set[str]] = {}
    for result in different:
        for key, value, theirs in result.deviations:
            values.setdefault((key, theirs), set()).add(value)
    what = ", ".join(f"{key}={' or '.join(sorted(mine))} instead of {theirs}" for (key, theirs), mine in values.items())
    number = f"{len(different)} of {len(found)} rows with a published accuracy were trained with"
    return [*notes, f"{number} other settings than the benchmark's: {what}"]
