"""Cells: finished runs that differ by their seed alone."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kdpipe.settings.identity import LABELS_ALONE, UNLABELLED, what_matters
from kdpipe.tracking import RunRecord

STAGES = ("teacher", "student", "distill")
LINK = "kdpipe.link"


@dataclass(frozen=True)
class Cell:
    """A configuration without its seed, and its newest finished run of each seed."""

    settings: frozenset[tuple[str, str]]
    runs: dict[int, RunRecord]  # by seed

    @property
    def first(self) -> RunRecord:
        return next(iter(self.runs.values()))

    @property
    def stage(self) -> str:
        return self.first.tags["kdpipe.stage"]

    @property
    def teacher_run(self) -> str:
        """The run or the file that the teacher's weights are from, several runs with commas between them; "" where
        there was none."""
        return self.first.tags.get("kdpipe.teacher_run", "")

    @property
    def teacher_runs(self) -> list[str]:
        """Several of an ensemble; in a chain each seed has its own."""
        return list(dict.fromkeys(source for run in self.runs.values() for source in teacher_runs(run)))

    @property
    def is_alone(self) -> bool:
        """Whether it is a student trained on the labels alone, over which others gain."""
        return self.stage == "student" and dict(self.settings)["loss._target_"] == LABELS_ALONE

    @property
    def has_gain(self) -> bool:
        """Whether it is a student that is held against the one alone: distilled, or trained by another loss."""
        return self.stage != "teacher" and not self.is_alone

    @property
    def loss(self) -> str:
        """The loss and its settings, such as "KD alpha 0.5 temperature 5 + Attention weight 1000"."""
        settings = dict(sorted(self.settings))
        told = []
        for group in ("loss", "also"):
            if target := settings.pop(f"{group}._target_", ""):
                keys = [key for key in settings if key.startswith(f"{group}.")]
                values = [f"{key.removeprefix(f'{group}.')} {settings[key]}" for key in keys]
                told.append(" ".join([target.rpartition(".")[2], *values]))
        return " + ".join(told)

    @property
    def title(self) -> str:
        """A short name: what is trained, and how."""
        name = self.first.params["model.name"]
        return f"{name} {self.loss if self.has_gain else 'alone' if self.is_alone else 'teacher'}"

    @property
    def link(self) -> int:
        """Its place in a chain, from 1."""
        return int(dict(self.settings).get(LINK, 1))

    def values(self, metric: str) -> dict[int, float]:
        """The metric of each seed that has it."""
        return {seed: run.metrics[metric] for seed, run in self.runs.items() if metric in run.metrics}

    def only(self, seeds: Iterable[int]) -> "Cell":
        """The cell with these of its seeds."""
        return Cell(self.settings, {seed: self.runs[seed] for seed in seeds if seed in self.runs})

    def settings_without(self, *groups: str) -> dict[str, str]:
        """The settings that remain without some config groups: what two cells share."""
        return {key: value for key, value in self.settings if key.split(".")[0] not in groups}


def teacher_runs(record: RunRecord) -> list[str]:
    """The runs, or the one file, that a run's teachers are from."""
    source = record.tags.get("kdpipe.teacher_run", "")
    return source.split(",") if "teacher.members" in record.params else [source] if source else []


def make_cells(records: Iterable[RunRecord], chain: Iterable[RunRecord] = ()) -> list[Cell]:
    """The cells of finished runs (newest first), teachers before students before distilled students.

    Args:
        chain: runs that taught each other. Those whose teachers are of one cell are of one cell, too.
    """
    links = {record.id: record for record in chain}
    found: dict[frozenset[tuple[str, str]], dict[int, RunRecord]] = {}
    for record in records:
        found.setdefault(_settings(record, links), {}).setdefault(int(record.params["seed"]), record)
    cells = [Cell(settings, dict(sorted(runs.items()))) for settings, runs in found.items()]
    return sorted(cells, key=_place)


def _settings(record: RunRecord, links: Mapping[str, RunRecord]) -> frozenset[tuple[str, str]]:
    settings = what_matters(record.params)
    del settings["seed"]
    sources = {key: record.tags.get(key, "") for key in ("kdpipe.stage", "kdpipe.data", "kdpipe.teacher_run")}
    if "kdpipe.unlabelled" in record.tags:
        sources["kdpipe.unlabelled"] = record.tags["kdpipe.unlabelled"]
    if sources["kdpipe.teacher_run"]:  # a file may hold other weights than it did
        sources["kdpipe.teacher_weights"] = record.tags.get("kdpipe.inputs", "").rpartition("-")[2]
        if teacher := links.get(sources["kdpipe.teacher_run"]):
            its = _settings(teacher, links)
            number = int(dict(its).get(LINK, 1))
            settings["teacher.weights"] = f"link {number}"
            cell = hashlib.sha256(json.dumps(sorted(its)).encode()).hexdigest()
            sources |= {LINK: str(number + 1), "kdpipe.teacher_weights": "", "kdpipe.teacher_run": cell}
    return frozenset((settings | sources).items())


class Controls:
    """The students alone among some cells, found by what other students share with them."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._found: dict[frozenset[tuple[str, str]], Cell] = {}
        for cell in cells:
            if cell.is_alone:
                self._found.setdefault(self._shared(cell), cell)

    def of(self, cell: Cell) -> Cell | None:
        """The same student alone: same settings and images, but for the loss and the teacher."""
        return self._found.get(self._shared(cell))

    @staticmethod
    def _shared(cell: Cell) -> frozenset[tuple[str, str]]:
        shared = cell.settings_without("loss", "also", "teacher", "stage", "kdpipe", "distillation")
        shared = {key: value for key, value in shared.items() if key not in (UNLABELLED, "model.stages")}
        return frozenset({**shared, "kdpipe.data": cell.first.tags["kdpipe.data"]}.items())


def differences(cells: Sequence[Cell]) -> list[str]:
    """For each cell the settings, beyond those in the table's own columns, in which cells of its stage differ."""
    own_column = ("model", "loss", "also", "stage", "kdpipe")
    shown = [cell.settings_without(*own_column) for cell in cells]
    values: dict[tuple[str, str], set[str | None]] = {}
    for stage in {cell.stage for cell in cells}:
        settings = [mine for cell, mine in zip(cells, shown, strict=True) if cell.stage == stage]
        for key in {key for mine in settings for key in mine}:
            values[stage, key] = {mine.get(key) for mine in settings}
    return [
        " ".join(
            f"{key}={value}"
            for key, value in sorted(mine.items())
            if len(values[cell.stage, key]) > 1 and key not in ("dataset.name", "train.epochs", "teacher.name")
        )
        for cell, mine in zip(cells, shown, strict=True)
    ]


def _place(cell: Cell) -> tuple[object, ...]:
    settings = dict(cell.settings)
    numbers = [float(settings.get(key, 0)) for key in ("loss.alpha", "loss.temperature")]
    return (STAGES.index(cell.stage), settings["model.name"], settings["loss._target_"], *numbers, cell.loss)
