"""From an MLflow store to comparisons and their pictures."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from kdpipe.compare.answers import Answers, exchange, read_answers
from kdpipe.compare.cells import Cell, Controls, make_cells, teacher_runs
from kdpipe.compare.comparison import Comparison, GetRun, best_run, check_comparable, compare, families, row_of
from kdpipe.compare.rendering import Picture
from kdpipe.compare.statistics import CANNOT_TELL
from kdpipe.runs.names import CONFUSION, DIFFERING, PREDICTIONS, RELIABILITY
from kdpipe.tracking import RunRecord, RunStore, Tracker

# Pictures that a run of the decisive student drew, and what they show.
OF_A_RUN = {
    RELIABILITY: "How sure the distilled student is, and how often it is right",
    CONFUSION: "Which classes the distilled student takes for which",
    DIFFERING: "The test images on which the distilled student and its teacher differ most",
}

log = logging.getLogger("kdpipe")


def compare_experiment(tracker: Tracker, where: Mapping[str, str], mixed: bool) -> list[Comparison]:
    """The comparison of all finished runs of an experiment.

    Args:
        where: settings; runs with another value there are left out.
        mixed: give students of different data, budgets or teachers each a comparison of their own.

    Raises:
        ValueError: no finished run, or runs that cannot be compared.
    """
    cells = make_cells(tracker.finished_runs())
    if not cells:
        raise ValueError(
            f"tracking.experiment={tracker.experiment}: no finished run yet in {tracker.name}; make demo trains three"
        )
    cells = those(cells, where)
    if mixed:
        return [compare(family, run_finder(tracker)) for family in families(cells, one_teacher=True)]
    check_comparable(cells)
    return [compare(cells, run_finder(tracker))]


def compare_sweep(tracker: Tracker, sweep_id: str, where: Mapping[str, str] | None = None) -> list[Comparison]:
    """The comparison of a sweep's finished runs, one for each data set and budget in its grid; students alone of the
    same experiment serve as controls. In a chain it is that of the last link, and has the links before as rows.

    Raises:
        ValueError: no such sweep, or none of its runs is finished.
    """
    parent = tracker.find_sweep(sweep_id)
    records = tracker.finished_runs()
    if parent is None:
        known = sorted({one for record in records for one in record.tags.get("kdpipe.sweep", "").split()})
        there = ", ".join(known) or "none"
        raise ValueError(f"--sweep {sweep_id}: there is no such sweep in {tracker.experiment}; it has {there}")
    mine = [record for record in records if sweep_id in record.tags.get("kdpipe.sweep", "").split()]
    if not mine:
        raise ValueError(f"--sweep {sweep_id}: no finished run yet")
    find = run_finder(tracker)
    teachers = [find(run_id) for run_id in sorted({source for record in mine for source in teacher_runs(record)})]
    controls = make_cells(record for record in records if record not in mine)
    confirm = [int(seed) for seed in parent.tags.get("kdpipe.confirm_seeds", "").split()]
    links = int(parent.tags.get("kdpipe.links", 1))
    chain = mine if links > 1 else []
    cells = those(make_cells([*mine, *(teacher for teacher in teachers if teacher)], chain), where or {})
    if links > 1:
        return compare_chain(cells, links, find, controls)
    return [compare(family, find, controls, confirm) for family in families(cells, one_teacher=False)]


def compare_chain(cells: Sequence[Cell], links: int, find: GetRun, controls: Sequence[Cell]) -> list[Comparison]:
    """The comparison of a chain's last link, one for each of its data sets and budgets, with the links before."""
    students_alone = Controls([*cells, *controls])
    comparisons, shown = [], []
    ends = [cell for cell in cells if cell.link == links or cell.stage == "student"]
    for family in families(ends, one_teacher=False):
        if all(cell.stage == "student" for cell in family):
            continue
        known = list(family)
        while before := [cell for cell in cells if cell not in known and _has_taught(cell, known)]:
            known += before
        comparison = compare(family, find, [*cells, *controls])
        rows = [row_of(cell, students_alone) for cell in known if cell not in family]
        rows = sorted([*rows, *comparison.rows], key=lambda row: row.cell.link)
        comparisons.append(replace(comparison, rows=rows))
        shown += known
    if left := [cell for cell in cells if cell not in shown]:
        rows = [row_of(cell, students_alone) for cell in sorted(left, key=lambda cell: cell.link)]
        said = f"{CANNOT_TELL}: the chain's last link, which these lead to, has no finished run"
        comparisons.append(Comparison(rows, None, None, said))
    return comparisons


def _has_taught(cell: Cell, students: Sequence[Cell]) -> bool:
    """Whether a run of the cell is the teacher of one of these."""
    return any(run.id in student.teacher_runs for student in students for run in cell.runs.values())


def those(cells: list[Cell], where: Mapping[str, str]) -> list[Cell]:
    """The cells that have no other values than these.

    Raises:
        ValueError: for a setting, or a value of one, that no run has.
    """
    for key, wanted in where.items():
        if key == "seed":
            raise ValueError(f"--where seed={wanted}: seeds are not chosen, each row is all of its seeds")
        values = {cell.first.params.get(key, dict(cell.settings).get(key)) for cell in cells} - {None}
        if not any(_same(value, wanted) for value in values):
            there = f"there is {', '.join(sorted(map(str, values)))}" if values else "no run has this setting"
            raise ValueError(f"--where {key}={wanted}: no finished run has this value; {there}")
    return [
        cell
        for cell in cells
        if all(_same(dict(cell.settings).get(key, wanted), wanted) for key, wanted in where.items())
    ]


def _same(one: str | None, other: str) -> bool:
    """Whether two texts say the same, 0.5 and 0.50 too."""
    try:
        return float(str(one)) == float(other)
    except ValueError:
        return one == other


def pictures_of(comparison: Comparison, tracker: Tracker) -> dict[str, Picture]:
    """The pictures that there is something to draw for, and those that a run of the decisive student drew, by file
    name."""
    from kdpipe.compare import plots as pictures  # a second of imports, for those who want pictures

    decisive = comparison.decisive
    curves = None
    if decisive:
        shown = {"student distilled": decisive.cell}
        if decisive.control:
            shown = {"student alone": decisive.control.only(decisive.cell.runs), **shown}
        curves = pictures.curves(
            {
                name: {seed: tracker.history(run.id, "val/accuracy") for seed, run in cell.runs.items()}
                for name, cell in shown.items()
            }
        )
    drawn = {
        "pareto": (pictures.pareto(comparison), pictures.pareto_caption(comparison)),
        "heatmap": (pictures.heatmap(comparison), "Gain over the student alone at each alpha and temperature"),
        "curves": (curves, "Validation accuracy in the course of the training"),
    }
    found = {
        f"{name}.png": Picture(pictures.to_png(figure), caption) for name, (figure, caption) in drawn.items() if figure
    }
    return found | (_pictures_of_a_run(decisive.cell, tracker) if decisive else {})


def _pictures_of_a_run(cell: Cell, tracker: RunStore) -> dict[str, Picture]:
    """What the run that one would use drew of itself."""
    seed, run = best_run(cell)
    contents = {name: tracker.read(run.id, name) for name in OF_A_RUN}
    return {
        name: Picture(content, f"{OF_A_RUN[name]} (run {run.name or run.id}, seed {seed})")
        for name, content in contents.items()
        if content
    }


def image_by_image(comparison: Comparison, tracker: RunStore) -> Comparison:
    """The comparison, with what the decisive student gained and lost over the student alone on single images. Only
    the files of its runs are read."""
    decisive = comparison.decisive
    if decisive is None or decisive.control is None:
        return comparison
    pairs = []
    for seed in sorted(decisive.cell.runs.keys() & decisive.control.runs.keys()):
        distilled = _answers(decisive.cell.runs[seed], tracker)
        alone = _answers(decisive.control.runs[seed], tracker) if distilled else None
        if distilled and alone:
            pairs.append((distilled, alone))
    return replace(comparison, exchange=exchange(pairs))


def _answers(run: RunRecord, tracker: RunStore) -> Answers | None:
    content = tracker.read(run.id, PREDICTIONS)
    try:
        return None if content is None else read_answers(content)
    except ValueError as error:
        log.warning("run %s: %s", run.id, error)
        return None


def run_finder(tracker: Tracker) -> GetRun:
    """`tracker.get_run`, which asks the store once for each run."""

    @cache
    def find(run_id: str) -> RunRecord | None:
        return tracker.get_run(run_id) if run_id else None

    return find
