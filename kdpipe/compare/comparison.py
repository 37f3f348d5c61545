"""The gain over the student alone: a row for each cell, the best cell by validation accuracy, and the verdict on it by
test accuracy."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

from kdpipe.compare.cells import Cell, Controls
from kdpipe.compare.disagreement import Disagreement
from kdpipe.compare.published import Published, published_for, published_notes, teacher_note
from kdpipe.compare.statistics import CANNOT_TELL, Interval, interval, verdict
from kdpipe.settings.addresses import run_and_file
from kdpipe.settings.identity import UNLABELLED
from kdpipe.tracking import RunRecord

if TYPE_CHECKING:
    import pandas as pd

GetRun = Callable[[str], RunRecord | None]
VALIDATION, TEST = "selected/accuracy", "test/accuracy"
# Settings that two students have to share to be compared at all.
DATA = ("dataset.", "kdpipe.data")
BUDGET = ("train.epochs", "train.batch_size")
TEACHER = ("teacher.", "kdpipe.teacher_")
# Except these, which belong to the method.
OF_THE_METHOD = {UNLABELLED, "teacher.temperature", "teacher.stages"}


@dataclass(frozen=True)
class ComparisonRow:
    """A cell with its mean accuracies over seeds and its gains over the student alone, paired by seed, all fractions,
    and the published result if one was looked up and found."""

    cell: Cell
    control: Cell | None
    validation: Interval | None
    test: Interval | None
    validation_gain: Interval | None
    gain: Interval | None
    published: Published | None = None


@dataclass(frozen=True)
class Comparison:
    """Rows that can be compared, and the verdict.

    Attributes:
        best: the distilled student with the best validation accuracy, None without distilled students.
        confirmed: the best cell on the seeds that were trained after the choice, if any.
        verdict: starts with one of the four verdicts of `statistics`.
        notes: what the verdict rests on.
        teacher_accuracy: of the decisive student's teacher on the test images, a fraction; the mean if each seed has
            its own teacher, None if unknown.
        published: whether published results were looked up.
        disagreement: where the decisive student and the student alone disagree, if predictions were read and found.
    """

    rows: list[ComparisonRow]
    best: ComparisonRow | None
    confirmed: ComparisonRow | None
    verdict: str
    notes: list[str] = field(default_factory=list)
    teacher_accuracy: float | None = None
    published: bool = False
    disagreement: Disagreement | None = None

    @property
    def decisive(self) -> ComparisonRow | None:
        """The distilled student that the verdict is about: the best one, on the confirmation seeds if there are any."""
        return self.confirmed or self.best

    @property
    def frame(self) -> "pd.DataFrame":
        """A row for each cell, with the columns of `--format csv`; `seeds` is a list."""
        from kdpipe.compare.frames import to_frame

        return to_frame([self])


def compare_cells(
    cells: Sequence[Cell], get_run: GetRun, controls: Sequence[Cell] = (), confirm: Iterable[int] = ()
) -> Comparison:
    """Compare cells.

    Args:
        get_run: finds a run by its id, to look up teachers.
        controls: more cells that may hold the student alone.
        confirm: seeds that are kept out of the choice of the best cell, and that the verdict rests on.
    """
    students_alone = Controls([*cells, *controls])
    later = set(confirm)
    rows = [make_row(cell.only(set(cell.runs) - later), students_alone) for cell in cells if set(cell.runs) - later]
    distilled = [row for row in rows if row.cell.stage == "distill"]
    if not distilled:
        return Comparison(rows, None, None, f"{CANNOT_TELL}: there is no distilled student")
    best = choose_best(distilled)
    whole = next(cell for cell in cells if cell.settings == best.cell.settings)
    confirmed = make_row(whole.only(sorted(later)), students_alone) if later & set(whole.runs) else None
    decisive = confirmed or best
    if decisive.control is None:
        text = f"{CANNOT_TELL}: the same student alone has not been trained (experiment=student, or loss=cross_entropy)"
    else:
        text = verdict(decisive.gain)
    accuracy = teacher_accuracy(decisive.cell, get_run)
    return Comparison(rows, best, confirmed, text, verdict_notes(best, confirmed, distilled, get_run), accuracy)


def with_published(comparison: Comparison, get_run: GetRun) -> Comparison:
    """Add published results to the rows; the verdict stays."""

    def add(row: ComparisonRow) -> ComparisonRow:
        return replace(row, published=published_for(row.cell))

    rows = [add(row) for row in comparison.rows]
    best = next((new for new, row in zip(rows, comparison.rows, strict=True) if row is comparison.best), None)
    confirmed = add(comparison.confirmed) if comparison.confirmed else None
    known = [row for row in (*rows, confirmed) if row and row.published]
    notes = [*comparison.notes, *published_notes([row.published for row in known if row.published])]
    taught = {row.cell.teacher_run: row.cell for row in known if row.cell.stage == "distill"}
    for cell in taught.values():
        notes.append(teacher_note(cell.first.params["teacher.name"], teacher_accuracy(cell, get_run)))
    return replace(comparison, rows=rows, best=best, confirmed=confirmed, notes=notes, published=True)


def make_row(cell: Cell, students_alone: Controls) -> ComparisonRow:
    """Compare a cell with the student alone on the seeds that both have."""
    control = students_alone.of(cell) if cell.has_gain else None
    return ComparisonRow(
        cell,
        control,
        interval(list(cell.values(VALIDATION).values())),
        interval(list(cell.values(TEST).values())),
        paired_gain(cell, control, VALIDATION),
        paired_gain(cell, control, TEST),
    )


def paired_gain(cell: Cell, control: Cell | None, metric: str) -> Interval | None:
    """The gain over the control, seed by seed."""
    if control is None:
        return None
    mine, alone = cell.values(metric), control.values(metric)
    return interval([mine[seed] - alone[seed] for seed in mine if seed in alone])


def shared_seeds(distilled: Sequence[ComparisonRow]) -> tuple[int, ...]:
    """The seeds that most cells have, on which cells are ranked; the smaller set on a tie."""
    counted = Counter(tuple(row.cell.runs) for row in distilled)
    return max(counted, key=lambda seeds: (counted[seeds], -len(seeds)))


def choosable(distilled: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The rows that have all shared seeds."""
    seeds = set(shared_seeds(distilled))
    return [row for row in distilled if seeds <= row.cell.runs.keys()]


def choose_best(distilled: Sequence[ComparisonRow]) -> ComparisonRow:
    """The row with the best validation accuracy (test accuracy without a validation split) on the shared seeds."""
    seeds = shared_seeds(distilled)

    def accuracy(row: ComparisonRow) -> float:
        cell = row.cell.only(seeds)
        return fmean((cell.values(VALIDATION) or cell.values(TEST)).values())

    return max(choosable(distilled), key=accuracy)


def verdict_notes(
    best: ComparisonRow, confirmed: ComparisonRow | None, distilled: Sequence[ComparisonRow], get_run: GetRun
) -> list[str]:
    """What a reader has to know before believing the verdict."""
    notes = []
    number = len(choosable(distilled))
    if len(distilled) > 1:
        where = "validation images" if best.validation else "test images, for lack of a validation split"
        notes.append(f"the best of {number} cells was chosen on {where}")
        if confirmed:
            seeds = ", ".join(map(str, confirmed.cell.runs))
            notes.append(f"the verdict rests on seeds that the choice did not see: {seeds}")
        else:
            remedy = "sweep.confirm_seeds=5 trains new ones" if best.cell.link == 1 else "train the chain on new ones"
            notes.append(f"the choice saw the verdict's own seeds, which flatters it; {remedy}")
    if number < len(distilled):
        seeds = ", ".join(map(str, shared_seeds(distilled)))
        notes.append(f"cells without all of the seeds {seeds} were left out of the choice: {len(distilled) - number}")
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
    if leak := teacher_leak(best.cell, get_run):
        notes.append(leak)
    seed, run = best_run(decisive.cell)
    measured = "validation" if VALIDATION in run.metrics else "test"
    notes.append(f"the student's run with the best {measured} accuracy is {run.id} (seed {seed})")
    return notes


def best_run(cell: Cell) -> tuple[int, RunRecord]:
    """The seed and the run with the best validation accuracy (test accuracy without a validation split)."""
    return max(cell.runs.items(), key=lambda item: item[1].metrics.get(VALIDATION, item[1].metrics[TEST]))


def teacher_accuracy(cell: Cell, get_run: GetRun) -> float | None:
    """The teacher's accuracy on the test images, a fraction; the mean if each seed has its own. Students' runs measure
    it. For those of early versions, which did not, that of an ensemble or of an earlier epoch is unknown."""
    if not cell.teacher_run:  # two students that learn from each other
        return None
    if measured := cell.values("teacher/accuracy"):
        return fmean(measured.values())
    if not uses_final_weights(cell):
        return None
    teachers = [get_run(source) for source in cell.teacher_runs]
    accuracies = [teacher.metrics[TEST] for teacher in teachers if teacher and TEST in teacher.metrics]
    return fmean(accuracies) if accuracies else None


def uses_final_weights(cell: Cell) -> bool:
    """Whether the teacher is a run's final weights, rather than an ensemble or an earlier epoch."""
    params = cell.first.params
    return "teacher.members" not in params and "/epoch_" not in params.get("teacher.weights", "")


def teacher_leak(cell: Cell, get_run: GetRun) -> str:
    """Why a teacher may have trained on images that the student is evaluated on; "" if none has."""
    return next(filter(None, (_leak(source, cell, get_run) for source in cell.teacher_runs)), "")


def _leak(source: str, cell: Cell, get_run: GetRun) -> str:
    settings = cell.first.params
    images = "validation images" if VALIDATION in cell.first.metrics else "test images"
    seen = set()
    while source not in seen:
        seen.add(source)
        run = get_run(source)
        if run is None:
            return f"the teacher's weights come from {source}: it may have been trained on the {images}"
        if run.tags.get("kdpipe.data") != cell.first.tags["kdpipe.data"]:
            return "the teacher was trained on other images than these: it may have seen validation and test images"
        for key in ("dataset.val_fraction", "dataset.test_fraction", "dataset.split_seed"):
            if run.params.get(key) != settings.get(key):
                seen_images = "validation" if key == "dataset.val_fraction" else "validation and test"
                return (
                    f"the teacher was trained with {key}={run.params.get(key)} instead of {settings.get(key)}: "
                    f"on some of the {seen_images} images"
                )
        weights = run.params.get("model.weights", "None")
        if weights in ("None", "imagenet"):
            return ""
        source = run_and_file(weights)[0] if weights.startswith("runs:/") else weights
    return ""


def check_comparable(cells: Sequence[Cell]) -> None:
    """Refuse students of different data, budgets or teachers, between which a gain would mean nothing.

    Raises:
        ValueError: names the setting, its values, and the ways out.
    """
    students = [cell for cell in cells if cell.stage != "teacher"]
    distilled = [cell for cell in students if cell.stage == "distill"]
    for what, group, prefixes in (
        ("data set", students, DATA),
        ("budget", students, BUDGET),
        ("teacher", distilled, TEACHER),
    ):
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
    groups: dict[str, list[Cell]] = {}
    shared = (*DATA, *BUDGET, *TEACHER) if one_teacher else (*DATA, *BUDGET)
    for cell in cells:
        if cell.stage == "distill":
            groups.setdefault(_shared(cell, shared), []).append(cell)
    result, placed = [], set()
    for group in groups.values():
        taught = {source for cell in group for source in cell.teacher_runs}
        teachers = [
            cell for cell in cells if cell.stage == "teacher" and taught & {run.id for run in cell.runs.values()}
        ]
        data_and_budget = _shared(group[0], (*DATA, *BUDGET))
        alone = [
            cell for cell in cells if cell.stage == "student" and _shared(cell, (*DATA, *BUDGET)) == data_and_budget
        ]
        result.append([*teachers, *alone, *group])
        placed |= {cell.key for cell in result[-1]}
    left = [cell for cell in cells if cell.key not in placed]
    return [*result, left] if left else result


def _shared(cell: Cell, prefixes: tuple[str, ...]) -> str:
    keys = sorted(key for key in cell.settings if key.startswith(prefixes) and key not in OF_THE_METHOD)
    return json.dumps([(key, cell.settings[key]) for key in keys])
