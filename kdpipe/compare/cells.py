"""Cells: finished runs that differ only in their seed."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kdpipe.settings.identity import LABELS_ALONE, OF_LABELS, UNLABELLED, what_matters
from kdpipe.tracking import RunRecord

Key = frozenset[tuple[str, str]]
STAGES = ("teacher", "student", "distill")
LINK = "kdpipe.link"


@dataclass(frozen=True)
class Cell:
    """A configuration without its seed, and the newest finished run of each seed."""

    settings: dict[str, str]
    runs: dict[int, RunRecord]  # by seed

    @cached_property
    def key(self) -> Key:
        """The settings, to look the cell up by."""
        return frozenset(self.settings.items())

    @property
    def first(self) -> RunRecord:
        return next(iter(self.runs.values()))

    @property
    def run_ids(self) -> set[str]:
        return {run.id for run in self.runs.values()}

    @property
    def stage(self) -> str:
        return self.first.tags["kdpipe.stage"]

    @property
    def teacher_run(self) -> str:
        """The run or file that the teacher's weights come from, comma-separated for several; "" without a teacher."""
        return self.first.tags.get("kdpipe.teacher_run", "")

    @property
    def teacher_runs(self) -> list[str]:
        """The teachers of all seeds: several for an ensemble, one per seed in a chain."""
        return list(dict.fromkeys(source for run in self.runs.values() for source in teacher_runs(run)))

    @property
    def is_alone(self) -> bool:
        """Whether this is a student trained on the labels alone, the baseline of every gain."""
        return self.stage == "student" and self.settings["loss._target_"] == LABELS_ALONE

    @property
    def has_gain(self) -> bool:
        """Whether this is a student to compare with the baseline: distilled, or trained with another loss."""
        return self.stage != "teacher" and not self.is_alone

    @property
    def loss(self) -> str:
        """The loss and its settings, such as "KD alpha 0.5 temperature 5 + Attention weight 1000"."""
        losses = []
        for group in ("loss.", "also."):
            values = {key.removeprefix(group): value for key, value in self.settings.items() if key.startswith(group)}
            if target := values.pop("_target_", ""):
                losses.append(" ".join([target.rpartition(".")[2], *map(" ".join, sorted(values.items()))]))
        return " + ".join(losses)

    @property
    def title(self) -> str:
        """A short name: the network, and how it is trained."""
        name = self.first.params["model.name"]
        return f"{name} {self.loss if self.has_gain else 'alone' if self.is_alone else 'teacher'}"

    @property
    def link(self) -> int:
        """The position in a chain, from 1."""
        return int(self.settings.get(LINK, 1))

    def values(self, metric: str) -> dict[int, float]:
        """The metric by seed, for the seeds that have it."""
        return {seed: run.metrics[metric] for seed, run in self.runs.items() if metric in run.metrics}

    def only(self, seeds: Iterable[int]) -> "Cell":
        """The cell restricted to these seeds."""
        return Cell(self.settings, {seed: self.runs[seed] for seed in seeds if seed in self.runs})

    def settings_without(self, *left_out: str) -> dict[str, str]:
        """The settings without these keys and config groups."""
        return {key: value for key, value in self.settings.items() if not {key, key.split(".")[0]} & {*left_out}}


def teacher_runs(record: RunRecord) -> list[str]:
    """The runs, or the one file, that the weights of a run's teachers come from."""
    source = record.tags.get("kdpipe.teacher_run", "")
    return source.split(",") if "teacher.members" in record.params else [source] if source else []


def make_cells(records: Iterable[RunRecord], chain: Iterable[RunRecord] = ()) -> list[Cell]:
    """The cells of finished runs (newest first): teachers, then students, then distilled students.

    Args:
        chain: runs that taught each other. Runs whose teachers share a cell share a cell, too.
    """
    links = {record.id: record for record in chain}
    found: dict[Key, Cell] = {}
    for record in records:
        cell = Cell(_settings(record, links), {})
        found.setdefault(cell.key, cell).runs.setdefault(int(record.params["seed"]), record)
    return sorted((cell.only(sorted(cell.runs)) for cell in found.values()), key=_place)


def _settings(record: RunRecord, links: Mapping[str, RunRecord]) -> dict[str, str]:
    settings = what_matters(record.params)
    del settings["seed"]
    sources = {key: record.tags.get(key, "") for key in ("kdpipe.stage", "kdpipe.data", "kdpipe.teacher_run")}
    if "kdpipe.unlabelled" in record.tags:
        sources["kdpipe.unlabelled"] = record.tags["kdpipe.unlabelled"]
    if sources["kdpipe.teacher_run"]:  # the weights, too: a file may have been overwritten
        sources["kdpipe.teacher_weights"] = record.tags.get("kdpipe.inputs", "").rpartition("-")[2]
        if teacher := links.get(sources["kdpipe.teacher_run"]):
            its = _settings(teacher, links)
            number = int(its.get(LINK, 1))
            settings["teacher.weights"] = f"link {number}"
            cell = hashlib.sha256(json.dumps(sorted(its.items())).encode()).hexdigest()
            sources |= {LINK: str(number + 1), "kdpipe.teacher_weights": "", "kdpipe.teacher_run": cell}
    return settings | sources


class Controls:
    """The students alone among some cells, looked up by what other students share with them."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._found: dict[Key, Cell] = {}
        for cell in cells:
            if cell.is_alone:
                self._found.setdefault(self._shared(cell), cell)

    def of(self, cell: Cell) -> Cell | None:
        """The same student alone: same images, class weights, label smoothing and settings except for the loss and the
        teacher."""
        return self._found.get(self._shared(cell))

    @staticmethod
    def _shared(cell: Cell) -> Key:
        of_the_method = ("loss", "also", "teacher", "stage", "kdpipe", "distillation", UNLABELLED, "model.stages")
        shared = cell.settings_without(*of_the_method)
        shared |= {key: value for key, value in cell.settings.items() if key in OF_LABELS}
        return frozenset({**shared, "kdpipe.data": cell.first.tags["kdpipe.data"]}.items())


def differences(cells: Sequence[Cell]) -> list[str]:
    """For each cell the settings in which cells of its stage differ, except those with a column of their own."""
    own_column = ("model", "loss", "also", "stage", "kdpipe", "dataset.name", "train.epochs", "teacher.name")
    shown = [(cell.stage, cell.settings_without(*own_column).items()) for cell in cells]
    same = {
        stage: set.intersection(*(set(mine) for other, mine in shown if other == stage))
        for stage in {cell.stage for cell in cells}
    }
    return [" ".join(f"{key}={value}" for key, value in sorted(mine - same[stage])) for stage, mine in shown]


def _place(cell: Cell) -> tuple[object, ...]:
    settings = cell.settings
    numbers = [float(settings.get(key, 0)) for key in ("loss.alpha", "loss.temperature")]
    return (STAGES.index(cell.stage), settings["model.name"], settings["loss._target_"], *numbers, cell.loss)
