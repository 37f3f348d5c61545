"""What was gained over the student alone: one row a cell, the best cell chosen on validation images, the verdict on it
given on test images."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from kdpipe.compare.answers import Exchange
from kdpipe.compare.cells import Cell, Controls
from kdpipe.compare.published import Published, notes_on, published_for, teacher_note
from kdpipe.compare.statistics import CANNOT_TELL, Interval, interval, verdict
from kdpipe.runs.names import run_and_file
from kdpipe.settings.identity import UNLABELLED
from kdpipe.tracking import RunRecord

GetRun = Callable[[str], RunRecord | None]
VALIDATION, TEST = "selected/accuracy", "test/accuracy"
# What has to be the same for two students to be compared at all.
DATA = ("dataset.", "kdpipe.data")
BUDGET = ("train.epochs", "train.batch_size")
TEACHER = ("teacher.", "kdpipe.teacher_")
# Among these, what makes no other data and no other teacher: it is the method's.
NO_OTHER = {UNLABELLED, "teacher.temperature", "teacher.stages"}


@dataclass(frozen=True)
class Row:
    """A cell with its means over seeds, fractions, and its gains over the student alone, paired by seed; what a paper
    reports for it, where that was asked for and there is such a paper."""

    cell: Cell
    control: Cell | None
    validation: Interval | None
    test: Interval | None
    validation_gain: Interval | None
    gain: Interval | None
    published: Published | None = None


@dataclass(frozen=True)
class Comparison:
    """Rows that can be compared, and what they say.

    Attributes:
        best: the distilled student that the verdict is about, None where there is none.
        confirmed: the best cell on seeds that the choice did not see, where it was trained on such.
        verdict: begins with one of the four words of `statistics`.
        notes: what the verdict rests on.
        teacher_accuracy: of the best cell's teacher on the test images, a fraction, where it is known; the mean over
            its teachers where each seed has its own.
        published: whether published accuracies were looked for.
        exchange: what the decisive student gained and lost over the student alone image by image, where that was asked
            for and the runs have kept their answers.
    """

    rows: list[Row]
    best: Row | None
    confirmed: Row | None
    verdict: str
    notes: list[str] = field(default_factory=list)
    teacher_accuracy: float | None = None
    published: bool = False
    exchange: Exchange | None = None

    @property
    def decisive(self) -> Row | None:
        """The distilled student that the verdict rests on: the best one, on new seeds where it was trained on such."""
        return self.confirmed or self.best


def compare(
    cells: Sequence[Cell], get_run: GetRun, controls: Sequence[Cell] = (), confirm: Iterable[int] = ()
) -> Comparison:
    """Compare cells.

    Args:
        get_run: finds a run by its id, for what is known of teachers.
        controls: where else to look for the student alone.
        confirm: seeds that the choice of the best cell must not see, and the verdict is to rest on.
    """
    students_alone = Controls([*cells, *controls])
    later = set(confirm)
    rows = [row_of(cell.only(set(cell.runs) - later), students_alone) for cell in cells if set(cell.runs) - later]
    distilled = [row for row in rows if row.cell.stage == "distill"]
    if not distilled:
        return Comparison(rows, None, None, f"{CANNOT_TELL}: there is no distilled student")
    best = choose(distilled)
    whole = next(cell for cell in cells if cell.settings == best.cell.settings)
    confirmed = row_of(whole.only(sorted(later)), students_alone) if later & set(whole.runs) else None
    decisive = confirmed or best
    if decisive.control is None:
        said = f"{CANNOT_TELL}: the same student alone has not been trained (experiment=student, or loss=cross_entropy)"
    else:
        said = verdict(decisive.gain)
    accuracy = accuracy_of_teacher(decisive.cell, get_run)
    return Comparison(rows, best, confirmed, said, notes(best, confirmed, distilled, get_run), accuracy)


def with_published(comparison: Comparison, get_run: GetRun) -> Comparison:
    """The comparison, with what papers report beside its rows; the verdict is the same."""

    def beside(row: Row) -> Row:
        return replace(row, published=published_for(row.cell))

    rows = [beside(row) for row in comparison.rows]
    best = next((new for new, row in zip(rows, comparison.rows, strict=True) if row is comparison.best), None)
    confirmed = beside(comparison.confirmed) if comparison.confirmed else None
    known = [row for row in (*rows, confirmed) if row and row.published]
    said = [*comparison.notes, *notes_on(row.published for row in known if row.published)]
    taught = {row.cell.teacher_run: row.cell for row in known if row.cell.stage == "distill"}
    for cell in taught.values():
        said.append(teacher_note(cell.first.params["teacher.name"], accuracy_of_teacher(cell, get_run)))
    return replace(comparison, rows=rows, best=best, confirmed=confirmed, notes=said, published=True)


def row_of(cell: Cell, students_alone: Controls) -> Row:
    """A cell held against the student alone on the seeds that both have."""
    control = students_alone.of(cell) if cell.has_gain else None
    return Row(
        cell,
        control,
        interval(list(cell.values(VALIDATION).values())),
        interval(list(cell.values(TEST).values())),
        paired(cell, control, VALIDATION),
        paired(cell, control, TEST),
    )


def paired(cell: Cell, control: Cell | None, metric: str) -> Interval | None:
    """The gain over the control, seed by seed."""
    if control is None:
        return None
    mine, alone = cell.values(metric), control.values(metric)
    return interval([mine[seed] - alone[seed] for seed in mine if seed in alone])


def shared_seeds(distilled: Sequence[Row]) -> tuple[int, ...]:
    """The seeds that most cells have, the fewer of two that equally many have: cells are ranked on these."""
    counted = Counter(tuple(row.cell.runs) for row in distilled)
    return max(counted, key=lambda seeds: (counted[seeds], -len(seeds)))


def candidates_of(distilled: Sequence[Row]) -> list[Row]:
    """The rows that have all of the shared seeds."""
    seeds = set(shared_seeds(distilled))
    return [row for row in distilled if seeds <= row.cell.runs.keys()]


def choose(distilled: Sequence[Row]) -> Row:
    """The candidate with the best validation accuracy (test accuracy where there is none) on the shared seeds."""
    seeds = shared_seeds(distilled)

    def accuracy(row: Row) -> float:
        cell = row.cell.only(seeds)
        return fmean((cell.values(VALIDATION) or cell.values(TEST)).values())

    return max(candidates_of(distilled), key=accuracy)


def notes(best: Row, confirmed: Row | None, distilled: Sequence[Row], get_run: GetRun) -> list[str]:
    """What a reader has to know to believe the verdict, or not to."""
    said = []
    candidates = candidates_of(distilled)
    if len(distilled) > 1:
        where = "validation images" if best.validation else "test images, for there was no validation split"
        said.append(f"the best of {len(candidates)} cells was chosen on {where}")
        if confirmed:
            seeds = ", ".join(map(str, confirmed.cell.runs))
            said.append(f"the verdict rests on seeds that the choice did not see: {seeds}")
        else:
            remedy = (
                "sweep.confirm_seeds=5 trains new ones" if best.cell.link == 1 else "the chain on new seeds would not"
            )
            said.append(f"the choice saw the verdict's own seeds, which flatters it; {remedy}")
    if len(candidates) < len(distilled):
        seeds = ", ".join(map(str, shared_seeds(distilled)))
        said.append(f"cells without all of the seeds {seeds} were no candidates: {len(distilled) - len(candidates)}")
    decisive = confirmed or best
    if decisive.control:
        unpaired = sorted(decisive.cell.runs.keys() - decisive.control.runs.keys())
        if unpaired:
            said.append(f"no student alone to be paired with for seeds {', '.join(map(str, unpaired))}")
    varied = "" if len({row.cell.teacher_run for row in distilled}) == 1 else " (the rows have several)"
    covered = f"the student's seeds (first weights, order of images), not the teacher{varied} and not"
    if not decisive.cell.teacher_run:
        covered = "the seeds of both students (first weights, order of images), not"
    elif len(decisive.cell.teacher_runs) > 1 and "teacher.members" not in decisive.cell.first.params:
        covered = "the seeds of the whole chain (first weights, order of images), not"
    said.append(f"the interval covers {covered} the sample of test images")
    if doubt := seen_by_teacher(best.cell, get_run):
        said.append(doubt)
    seed, run = best_run(decisive.cell)
    measured = "validation" if VALIDATION in run.metrics else "test"
    said.append(f"the student's run with the best {measured} accuracy is {run.id} (seed {seed})")
    return said


def best_run(cell: Cell) -> tuple[int, RunRecord]:
    """The run that one would use, of the best accuracy on validation images (or on test images), and its seed."""
    return max(cell.runs.items(), key=lambda item: item[1].metrics.get(VALIDATION, item[1].metrics[TEST]))


def accuracy_of_teacher(cell: Cell, get_run: GetRun) -> float | None:
    """On the test images, a fraction, the mean where each seed has its own. The students' runs have measured it; where
    they are of an earlier version, that of an ensemble, and that after an earlier epoch, is not known."""
    if not cell.teacher_run:  # two students have none
        return None
    if measured := cell.values("teacher/accuracy"):
        return fmean(measured.values())
    if not taught_by_last_weights(cell):
        return None
    teachers = [get_run(source) for source in cell.teacher_runs]
    accuracies = [teacher.metrics[TEST] for teacher in teachers if teacher and TEST in teacher.metrics]
    return fmean(accuracies) if accuracies else None


def taught_by_last_weights(cell: Cell) -> bool:
    """Whether the teacher is what one run came to, and not an ensemble or what a run was after an earlier epoch."""
    params = cell.first.params
    return "teacher.members" not in params and "/epoch_" not in params.get("teacher.weights", "")


def seen_by_teacher(cell: Cell, get_run: GetRun) -> str:
    """Why a teacher may know images that the student is measured on; "" if none does."""
    return next(filter(None, (_seen_by(source, cell, get_run) for source in cell.teacher_runs)), "")


def _seen_by(source: str, cell: Cell, get_run: GetRun) -> str:
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
    """Raise ValueError where students differ in data, budget or teacher: then a gain would be no answer."""
    students = [cell for cell in cells if cell.stage != "teacher"]
    distilled = [cell for cell in students if cell.stage == "distill"]
    for what, group, prefixes in (
        ("data set", students, DATA),
        ("budget", students, BUDGET),
        ("teacher", distilled, TEACHER),
    ):
        keys = {key for cell in group for key, _ in cell.settings if key.startswith(prefixes)}
        for key in sorted(keys - NO_OTHER, key=_own_last):
            values = sorted({dict(cell.settings).get(key, "none") for cell in group})
            if len(values) > 1:
                raise ValueError(
                    f"these runs differ in their {what}, {key} is {', '.join(values)}: --where {key}=… takes one of "
                    "them, --sweep the runs of a sweep, --mixed all, each kind by itself"
                )


def families(cells: Sequence[Cell], one_teacher: bool) -> list[list[Cell]]:
    """Cells that can be compared with each other: of one data set and budget, and of one teacher where `one_teacher`.
    A student alone is in each family of its data and budget; a teacher where it taught, or by itself."""
    groups: dict[str, list[Cell]] = {}
    alike = (*DATA, *BUDGET, *TEACHER) if one_teacher else (*DATA, *BUDGET)
    for cell in cells:
        if cell.stage == "distill":
            groups.setdefault(_alike(cell, alike), []).append(cell)
    result, placed = [], set()
    for group in groups.values():
        taught = {source for cell in group for source in cell.teacher_runs}
        teachers = [
            cell for cell in cells if cell.stage == "teacher" and taught & {run.id for run in cell.runs.values()}
        ]
        shared = _alike(group[0], (*DATA, *BUDGET))
        alone = [cell for cell in cells if cell.stage == "student" and _alike(cell, (*DATA, *BUDGET)) == shared]
        result.append([*teachers, *alone, *group])
        placed |= set(map(id, result[-1]))
    left = [cell for cell in cells if id(cell) not in placed]
    return [*result, left] if left else result


def _alike(cell: Cell, prefixes: tuple[str, ...]) -> str:
    alike = [(key, value) for key, value in cell.settings if key.startswith(prefixes) and key not in NO_OTHER]
    return json.dumps(sorted(alike))


def _own_last(key: str) -> tuple[bool, str]:
    return key.startswith("kdpipe."), key
