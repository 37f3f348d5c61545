"""What was gained over the student alone: one row a cell, the best cell chosen on validation images, the verdict on it
given on test images."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kdpipe.compare.cells import Cell, control_of
from kdpipe.compare.statistics import CANNOT_TELL, Interval, interval, verdict
from kdpipe.tracking import RunRecord

GetRun = Callable[[str], RunRecord | None]
VALIDATION, TEST = "selected/accuracy", "test/accuracy"
# What has to be the same for two students to be compared at all.
DATA = ("dataset.", "kdpipe.data")
BUDGET = ("train.epochs", "train.batch_size")
TEACHER = ("teacher.", "kdpipe.teacher_run")


@dataclass(frozen=True)
class Row:
    """A cell with its means over seeds, fractions, and its gains over the student alone, paired by seed."""

    cell: Cell
    control: Cell | None
    validation: Interval | None
    test: Interval | None
    validation_gain: Interval | None
    gain: Interval | None


@dataclass(frozen=True)
class Comparison:
    """Rows that can be compared, and what they say.

    Attributes:
        best: the distilled student that the verdict is about, None where there is none.
        confirmed: the best cell on seeds that the choice did not see, where it was trained on such.
        verdict: begins with one of the four words of `statistics`.
        notes: what the verdict rests on.
        teacher_accuracy: of the best cell's teacher on the test images, a fraction, where it is known.
    """

    rows: list[Row]
    best: Row | None
    confirmed: Row | None
    verdict: str
    notes: list[str] = field(default_factory=list)
    teacher_accuracy: float | None = None


def compare(
    cells: Sequence[Cell], get_run: GetRun, controls: Sequence[Cell] = (), confirm: Iterable[int] = ()
) -> Comparison:
    """Compare cells.

    Args:
        get_run: finds a run by its id, for what is known of teachers.
        controls: where else to look for the student alone.
        confirm: seeds that the choice of the best cell must not see, and the verdict is to rest on.
    """
    everything = [*cells, *controls]
    later = set(confirm)
    rows = [row_of(cell.only(set(cell.runs) - later), everything) for cell in cells if set(cell.runs) - later]
    distilled = [row for row in rows if row.cell.stage == "distill"]
    if not distilled:
        return Comparison(rows, None, None, f"{CANNOT_TELL}: there is no distilled student")
    best = choose(distilled)
    whole = next(cell for cell in cells if cell.settings == best.cell.settings)
    confirmed = row_of(whole.only(sorted(later)), everything) if later & set(whole.runs) else None
    decisive = confirmed or best
    if decisive.control is None:
        said = f"{CANNOT_TELL}: the same student alone has not been trained (loss.alpha=0, or experiment=student)"
    else:
        said = verdict(decisive.gain)
    teacher = get_run(best.cell.teacher_run)
    accuracy = teacher.metrics.get(TEST) if teacher else None
    return Comparison(rows, best, confirmed, said, notes(best, confirmed, distilled, get_run), accuracy)


def row_of(cell: Cell, everything: Sequence[Cell]) -> Row:
    """A cell held against the student alone on the seeds that both have."""
    control = control_of(cell, everything) if cell.stage == "distill" else None
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


def choose(distilled: Sequence[Row]) -> Row:
    """The row with the best validation accuracy (test accuracy where there is none) of those with the most seeds."""
    most = max(len(row.cell.runs) for row in distilled)
    candidates = [row for row in distilled if len(row.cell.runs) == most]

    def accuracy(row: Row) -> float:
        measured = row.validation or row.test
        return measured.mean if measured else -1

    return max(candidates, key=accuracy)


def notes(best: Row, confirmed: Row | None, distilled: Sequence[Row], get_run: GetRun) -> list[str]:
    """What a reader has to know to believe the verdict, or not to."""
    said = []
    most = len(best.cell.runs)
    candidates = [row for row in distilled if len(row.cell.runs) == most]
    if len(candidates) > 1:
        where = "validation images" if best.validation else "test images, for there was no validation split"
        said.append(f"the best of {len(candidates)} cells was chosen on {where}")
        if confirmed:
            seeds = ", ".join(map(str, confirmed.cell.runs))
            said.append(f"the verdict rests on seeds that the choice did not see: {seeds}")
        else:
            said.append(
                "the choice saw the same seeds as the verdict, which flatters it; sweep.confirm_seeds=5 adds new ones"
            )
    if len(candidates) < len(distilled):
        left = len(distilled) - len(candidates)
        said.append(f"{left} cells with fewer than {most} seeds were no candidates")
    if best.control:
        only_here = set(best.cell.runs) - set(best.control.runs)
        if only_here:
            said.append(f"seeds {', '.join(map(str, sorted(only_here)))} have no student alone to be paired with")
    varied = "" if len({row.cell.teacher_run for row in distilled}) == 1 else " (the rows have several)"
    said.append(
        "the interval covers the student's seeds (first weights, order of images), "
        f"not the teacher{varied} and not the sample of test images"
    )
    if best.validation and (doubt := seen_by_teacher(best.cell, get_run)):
        said.append(doubt)
    return said


def seen_by_teacher(cell: Cell, get_run: GetRun) -> str:
    """Why the teacher may know the validation images; "" if it does not."""
    source, settings = cell.teacher_run, dict(cell.first.params)
    known = set()
    while source not in known:
        known.add(source)
        run = get_run(source)
        if run is None:
            return f"the teacher's weights are from {_short(source)}: it may have been trained on the validation images"
        for key in ("dataset.val_fraction", "dataset.test_fraction", "dataset.split_seed"):
            if key in settings and run.params.get(key) != settings[key]:
                return (
                    f"the teacher was trained with {key}={run.params.get(key)} instead of {settings[key]}: "
                    "on some of the validation images"
                )
        weights = run.params.get("model.weights", "None")
        if weights in ("None", "imagenet"):
            return ""
        source = weights.removeprefix("runs:/")
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
        for key in sorted({key for cell in group for key, _ in cell.settings if key.startswith(prefixes)}):
            values = {dict(cell.settings).get(key, "none") for cell in group}
            if len(values) > 1:
                listed = ", ".join(sorted(map(_short, values)))
                raise ValueError(
                    f"these runs differ in their {what}, {key} is {listed}: --where {key}=… takes one of them, "
                    "--sweep the runs of a sweep, --mixed all, each kind by itself"
                )


def families(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that can be compared with each other; students alone and teachers are with every family of their data."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.stage == "distill":
            groups.setdefault(_family(cell, (*DATA, *BUDGET, *TEACHER)), []).append(cell)
    if not groups:
        return [list(cells)]
    result = []
    for group in groups.values():
        shared = _family(group[0], (*DATA, *BUDGET))
        alone = [cell for cell in cells if cell.stage == "student" and _family(cell, (*DATA, *BUDGET)) == shared]
        teachers = [cell for cell in cells if group[0].teacher_run in {run.id for run in cell.runs.values()}]
        result.append([*teachers, *alone, *group])
    return result


def _family(cell: Cell, keys: tuple[str, ...]) -> str:
    settings = dict(cell.settings)
    return json.dumps({key: settings[key] for key in sorted(settings) if key.startswith(keys)})


def _short(text: str) -> str:
    return text.replace("\\", "/").rpartition("/")[2] or "none"
