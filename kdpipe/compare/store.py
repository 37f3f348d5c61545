"""From an MLflow store to comparisons and their pictures."""

from collections.abc import Mapping
from functools import cache

from kdpipe.compare.cells import Cell, make_cells, teacher_runs
from kdpipe.compare.comparison import Comparison, GetRun, check_comparable, compare, families
from kdpipe.tracking import RunRecord, Tracker


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
            f"tracking.experiment={tracker.experiment}: no finished run yet in {tracker.uri}; make demo trains three"
        )
    cells = those(cells, where)
    if mixed:
        return [compare(family, run_finder(tracker)) for family in families(cells, one_teacher=True)]
    check_comparable(cells)
    return [compare(cells, run_finder(tracker))]


def compare_sweep(tracker: Tracker, sweep_id: str, where: Mapping[str, str] | None = None) -> list[Comparison]:
    """The comparison of a sweep's finished runs, one for each data set and budget in its grid; students alone of the
    same experiment serve as controls.

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
    cells = those(make_cells([*mine, *(teacher for teacher in teachers if teacher)]), where or {})
    found = families(cells, one_teacher=False)
    return [compare(family, find, controls, confirm) for family in found]


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


def pictures_of(comparison: Comparison, tracker: Tracker) -> dict[str, bytes]:
    """The pictures that there is something to draw for: PNGs by file name."""
    from kdpipe.compare import pictures  # a second of imports, for those who want pictures

    decisive = comparison.confirmed or comparison.best
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
    drawn = {"heatmap": pictures.heatmap(comparison), "curves": curves, "size": pictures.sizes(comparison)}
    return {f"{name}.png": pictures.to_png(figure) for name, figure in drawn.items() if figure}


def run_finder(tracker: Tracker) -> GetRun:
    """`tracker.get_run`, which asks the store once for each run."""

    @cache
    def find(run_id: str) -> RunRecord | None:
        return tracker.get_run(run_id) if run_id else None

    return find
