"""The gain over the student alone: a row for each cell, the best cell by validation accuracy, and the verdict on it by
test accuracy; or by another metric."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, get_args

from kdpipe.compare.cell_metrics import Timings, timed_on
from kdpipe.compare.cells import Cell, Controls, Key
from kdpipe.compare.disagreement import Disagreement
from kdpipe.compare.published import Published, published_for, published_notes, teacher_note
from kdpipe.compare.statistics import CANNOT_TELL, Interval, interval, share_interval, verdict
from kdpipe.runs.names import DUPLICATES
from kdpipe.settings.addresses import run_and_file
from kdpipe.settings.identity import UNLABELLED, other_split
from kdpipe.settings.metric_names import METRICS, Metric
from kdpipe.tracking import RunRecord

if TYPE_CHECKING:
    import pandas as pd

GetRun = Callable[[str], RunRecord | None]
# Settings that two students have to share to be compared at all.
DATA = ("dataset.", "kdpipe.data")
BUDGET = ("train.epochs", "train.batch_size")
TEACHER = ("teacher.", "kdpipe.teacher_")
# Except these, which belong to the method; students that draw their images in another way have their own student alone.
OF_THE_METHOD = {UNLABELLED, "teacher.temperature", "teacher.stages", "dataset.sampler"}


@dataclass(frozen=True)
class ComparisonRow:
    """A cell, the means of its metric over seeds, and its gains over the student alone, paired by seed; all
    fractions."""

    cell: Cell
    control: Cell | None
    validation: Interval | None
    test: Interval | None
    validation_gain: Interval | None
    gain: Interval | None
    adjusted_gain: Interval | None = None  # for all arms of its control at once; None for a single arm
    metric: Metric = "accuracy"

    @cached_property
    def published(self) -> Published | None:
        """The published result for the cell, if there is one."""
        return published_for(self.cell)


@dataclass(frozen=True)
class Comparison:
    """Rows that can be compared, and the verdict."""

    rows: list[ComparisonRow]
    best: ComparisonRow | None  # the distilled student that is best on the validation images
    confirmed: ComparisonRow | None  # the best cell on the seeds that were trained after the choice, if any
    verdict: str  # starts with one of the four verdicts of `statistics`
    notes: list[str] = field(default_factory=list)  # what the verdict rests on
    teacher_accuracy: float | None = None  # see the function of this name
    published: bool = False  # whether to show published results
    disagreement: Disagreement | None = None  # of the decisive student and the student alone, if predictions are known

    @property
    def metric(self) -> Metric:
        return next((row.metric for row in self.rows), "accuracy")

    @property
    def decisive(self) -> ComparisonRow | None:
        """The distilled student that the verdict is about: the best one, on the confirmation seeds if there are any."""
        return self.confirmed or self.best

    @cached_property
    def timings(self) -> Timings:
        """The times of the networks on the decisive student's hardware: those on others are not comparable."""
        return self._timings_on(timed_on([self.decisive.cell] if self.decisive else [row.cell for row in self.rows]))

    def timings_for(self, cell: Cell) -> Timings:
        """The times on that hardware, or if the cell's network was not timed there, on its own."""
        known = self.timings.of(cell.first, f"model/latency_ms{self.timings.threads}")
        return self.timings if known is not None else self._timings_on(timed_on([cell]))

    def _timings_on(self, where: str) -> Timings:
        rows = [row for row in (*self.rows, self.confirmed) if row]
        cells = {id(cell): cell for row in rows for cell in (row.cell, row.control) if cell}
        return Timings(cells.values(), where)

    @property
    def frame(self) -> "pd.DataFrame":
        """A row for each cell, with the columns of `--format csv`; `seeds` is a list."""
        from kdpipe.compare.frames import to_frame

        return to_frame([self])


def compare_cells(
    cells: Sequence[Cell],
    get_run: GetRun,
    controls: Sequence[Cell] = (),
    confirm: Iterable[int] = (),
    metric: Metric | None = None,
) -> Comparison:
    """Compare cells.

    Args:
        get_run: finds a teacher's run by its id.
        controls: more cells that may hold the student alone.
        confirm: seeds that are kept out of the choice of the best cell, and that the verdict rests on.
        metric: what chooses and judges (default: the `train.metric` of all students, accuracy where they differ).
    """
    metric = metric or metric_of(cells)
    students_alone = Controls([*cells, *controls])
    later = set(confirm)
    shown = [cell.only(set(cell.runs) - later) for cell in cells if set(cell.runs) - later]
    arms = Counter(control.key for cell in shown if cell.has_gain and (control := students_alone.of(cell)))
    rows = [make_row(cell, students_alone, metric, arms) for cell in shown]
    distilled = [row for row in rows if row.cell.stage == "distill"]
    of_metric = "" if metric == "accuracy" else f"val %, test % and gains are of the {METRICS[metric]}"
    if not distilled:
        text = f"{CANNOT_TELL}: there is no distilled student"
        return Comparison(rows, None, None, text, list(filter(None, [of_metric])))
    best = _choose_best(distilled)
    whole = next(cell for cell in cells if cell.settings == best.cell.settings)
    confirmed = make_row(whole.only(sorted(later)), students_alone, metric) if later & set(whole.runs) else None
    decisive = confirmed or best
    if decisive.control is None:
        text = f"{CANNOT_TELL}: the same student alone has not been trained (experiment=student, or loss=cross_entropy)"
    else:
        text = verdict(decisive.gain, METRICS[metric])
    notes = list(filter(None, [of_metric, *_notes(best, confirmed, distilled, get_run)]))
    if (several := max(arms.values(), default=0)) > 1:
        notes.append(f"the adjusted intervals hold jointly for all {several} students compared with the same one alone")
    return Comparison(rows, best, confirmed, text, notes, teacher_accuracy(decisive.cell, get_run, metric))


def metric_of(cells: Iterable[Cell]) -> Metric:
    """The metric that all students were to be chosen by; accuracy where they differ."""
    found = {cell.settings.get("train.metric", "accuracy") for cell in cells if cell.stage != "teacher"}
    return next((metric for metric in get_args(Metric) if found == {metric}), "accuracy")


def by_gain(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The rows without a gain, then the others from the largest gain to the smallest."""
    return sorted(rows, key=lambda row: -row.gain.mean if row.gain else -math.inf)


def with_published(comparison: Comparison, get_run: GetRun) -> Comparison:
    """Add published results; the verdict stays."""
    known = [row for row in (*comparison.rows, comparison.confirmed) if row and row.published]
    notes = [*comparison.notes, *published_notes([row.published for row in known if row.published])]
    taught = {row.cell.teacher_run: row.cell for row in known if row.cell.stage == "distill"}
    for cell in taught.values():
        notes.append(teacher_note(cell.first.params["teacher.name"], teacher_accuracy(cell, get_run)))
    return replace(comparison, notes=notes, published=True)


def make_row(
    cell: Cell, students_alone: Controls, metric: Metric = "accuracy", arms: Mapping[Key, int] | None = None
) -> ComparisonRow:
    """Compare a cell with the student alone on the seeds that both have.

    Args:
        arms: how many cells are compared with each student alone, by its key.
    """
    control = students_alone.of(cell) if cell.has_gain else None

    def gain(name: str, comparisons: int = 1) -> Interval | None:
        if control is None:
            return None
        mine, alone = cell.values(name), control.values(name)
        return interval([mine[seed] - alone[seed] for seed in mine if seed in alone], comparisons)

    on_validation, on_test = f"selected/{metric}", f"test/{metric}"
    validation, test = (share_interval(list(cell.values(name).values())) for name in (on_validation, on_test))
    number = (arms or {}).get(control.key, 1) if control else 1
    adjusted = gain(on_test, number) if number > 1 else None
    return ComparisonRow(cell, control, validation, test, gain(on_validation), gain(on_test), adjusted, metric)


def _choosable(distilled: Sequence[ComparisonRow]) -> tuple[tuple[int, ...], list[ComparisonRow]]:
    """The seeds that most cells have (the smaller set on a tie), and the rows that have them all."""
    counted = Counter(tuple(row.cell.runs) for row in distilled)
    seeds = max(counted, key=lambda seeds: (counted[seeds], -len(seeds)))
    return seeds, [row for row in distilled if set(seeds) <= row.cell.runs.keys()]


def _choose_best(distilled: Sequence[ComparisonRow]) -> ComparisonRow:
    """The row with the best metric on validation images (on test images without a validation split), on the shared
    seeds."""
    seeds, rows = _choosable(distilled)

    def reached(row: ComparisonRow) -> float:
        cell = row.cell.only(seeds)
        return fmean((cell.values(f"selected/{row.metric}") or cell.values(f"test/{row.metric}")).values())

    return max(rows, key=reached)


def _notes(
    best: ComparisonRow, confirmed: ComparisonRow | None, distilled: Sequence[ComparisonRow], get_run: GetRun
) -> list[str]:
    """What a reader has to know before believing the verdict."""
    notes = []
    shared, rows = _choosable(distilled)
    if len(distilled) > 1:
        where = "validation images" if best.validation else "test images, for lack of a validation split"
        notes.append(f"the best of {len(rows)} cells was chosen on {where}")
        if confirmed:
            seeds = ", ".join(map(str, confirmed.cell.runs))
            notes.append(f"the verdict rests on seeds that the choice did not see: {seeds}")
        else:
            remedy = "sweep.confirm_seeds=5 trains new ones" if best.cell.link == 1 else "train the chain on new ones"
            notes.append(f"the choice saw the verdict's own seeds, which flatters it; {remedy}")
    if left_out := len(distilled) - len(rows):
        seeds = ", ".join(map(str, shared))
        notes.append(f"cells without all of the seeds {seeds} were left out of the choice: {left_out}")
    decisive = confirmed or best
    if decisive.control and (unpaired := sorted(decisive.cell.runs.keys() - decisive.control.runs.keys())):
        notes.append(f"seeds without a student alone to pair with: {', '.join(map(str, unpaired))}")
    varied = "" if len({row.cell.teacher_run for row in distilled}) == 1 else " (the rows have different ones)"
    covered = f"the student's seeds (first weights, order of images), not the teacher{varied} and not"
    if not decisive.cell.teacher_run:
        covered = "the seeds of both students (first weights, order of images), not"
    elif len(decisive.cell.teacher_runs) > 1 and "teacher.members" not in decisive.cell.first.params:
        covered = "the seeds of the whole chain (first weights, order of images), not"
    notes.append(f"the interval covers {covered} the sample of test images")
    if duplicates := decisive.cell.first.tags.get(DUPLICATES):
        notes.append(duplicates)
    leaks = (_leak(source, best.cell, get_run) for source in best.cell.teacher_runs)
    notes += list(filter(None, leaks))[:1]
    seed, run = best_run(decisive)
    measured = "validation" if f"selected/{decisive.metric}" in run.metrics else "test"
    notes.append(f"the student's run with the best {measured} {METRICS[decisive.metric]} is {run.id} (seed {seed})")
    return notes


def best_run(row: ComparisonRow) -> tuple[int, RunRecord]:
    """The seed and the run with the best metric on validation images (on test images without a validation split)."""

    def reached(item: tuple[int, RunRecord]) -> float:
        metrics = item[1].metrics
        return metrics.get(f"selected/{row.metric}", metrics[f"test/{row.metric}"])

    return max(row.cell.runs.items(), key=reached)


def teacher_accuracy(cell: Cell, get_run: GetRun, metric: Metric = "accuracy") -> float | None:
    """The teacher's accuracy on the test images, or another metric, a fraction; the mean if each seed has its own.
    Students' runs measure it; in those of early versions, which did not, that of an ensemble or of an earlier epoch is
    unknown."""
    if not cell.teacher_run:  # two students that learn from each other
        return None
    if measured := cell.values(f"teacher/{metric}"):
        return fmean(measured.values())
    if not uses_final_weights(cell):
        return None
    teachers = [get_run(source) for source in cell.teacher_runs]
    name = f"test/{metric}"
    accuracies = [teacher.metrics[name] for teacher in teachers if teacher and name in teacher.metrics]
    return fmean(accuracies) if accuracies else None


def uses_final_weights(cell: Cell) -> bool:
    """Whether the teacher is a run's final weights, rather than an ensemble or an earlier epoch."""
    params = cell.first.params
    return "teacher.members" not in params and "/epoch_" not in params.get("teacher.weights", "")


def _leak(source: str, cell: Cell, get_run: GetRun) -> str:
    """Why a teacher may have trained on images that the student is evaluated on; "" if it has not."""
    images = "validation images" if "selected/accuracy" in cell.first.metrics else "test images"
    seen = set()
    while source not in seen:
        seen.add(source)
        run = get_run(source)
        if run is None:
            what, where = "weights", source
            if cell.settings.get("teacher.digest") == source:
                what, where = "answers", Path(cell.first.params.get("teacher.file", source)).name
            return f"the teacher's {what} come from {where}: it may have been trained on the {images}"
        if run.tags.get("kdpipe.data") != cell.first.tags["kdpipe.data"]:
            return "the teacher was trained on other images than these: it may have seen validation and test images"
        if other := other_split(run.params, cell.first.params):
            return f"the teacher was trained with {other}"
        weights = run.params.get("model.weights", "None")
        if weights in ("None", "imagenet"):
            return ""
        source = run_and_file(weights)[0] if weights.startswith("runs:/") else weights
    return ""


def check_comparable(cells: Sequence[Cell]) -> None:
    """Raise ValueError for students of different data, budgets or teachers, between which a gain would mean nothing."""
    students = [cell for cell in cells if cell.stage != "teacher"]
    distilled = [cell for cell in students if cell.stage == "distill"]
    groups = {"data set": (students, DATA), "budget": (students, BUDGET), "teacher": (distilled, TEACHER)}
    for what, (group, prefixes) in groups.items():
        keys = {key for cell in group for key in cell.settings if key.startswith(prefixes)}
        for key in sorted(keys - OF_THE_METHOD, key=lambda key: (key.startswith("kdpipe."), key)):
            values = sorted({cell.settings.get(key, "none") for cell in group})
            if len(values) > 1:
                raise ValueError(
                    f"these runs differ in their {what}, {key} is {', '.join(values)}: --where {key}=… selects one of "
                    "them, --sweep the runs of a sweep, --mixed compares each kind by itself"
                )


def families(cells: Sequence[Cell], one_teacher: bool) -> list[list[Cell]]:
    """Group cells that can be compared: same data and budget, and same teacher if `one_teacher`. A student alone joins
    every family of its data and budget, a teacher those of its students; what is left over is the last family."""
    same_data = (*DATA, *BUDGET)
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        if cell.stage == "distill":
            groups.setdefault(_shared(cell, (*same_data, *TEACHER) if one_teacher else same_data), []).append(cell)
    result = []
    for group in groups.values():
        taught = {source for cell in group for source in cell.teacher_runs}
        data = _shared(group[0], same_data)
        teachers = [cell for cell in cells if cell.stage == "teacher" and cell.run_ids & taught]
        alone = [cell for cell in cells if cell.stage == "student" and _shared(cell, same_data) == data]
        result.append([*teachers, *alone, *group])
    placed = {cell.key for family in result for cell in family}
    left = [cell for cell in cells if cell.key not in placed]
    return [*result, left] if left else result


def _shared(cell: Cell, prefixes: tuple[str, ...]) -> Key:
    shared = cell.settings.keys() - OF_THE_METHOD
    return frozenset((key, cell.settings[key]) for key in shared if key.startswith(prefixes))
