"""From an MLflow store to comparisons and their pictures."""

from collections.abc import Mapping
from functools import cache

from kdpipe.compare import pictures
from kdpipe.compare.cells import Cell, make_cells
from kdpipe.compare.comparison import Comparison, check_comparable, compare, families
from kdpipe.tracking import RunRecord, Tracker


def compare_experiment(tracker: Tracker, where: Mapping[str, str], mixed: bool) -> list[Comparison]:
    """The comparison of all finished runs of an experiment.

    Args:
        where: settings; runs with another value there are left out.
        mixed: give students of different data, budgets or teachers each a comparison of their own.

    Raises:
        ValueError: no finished run, or runs that cannot be compared.
    """
    records = tracker.finished_runs()
    check_where(where, records, tracker)
    cells = [cell for cell in make_cells(records) if _fits(cell, where)]
    if not cells:
        raise ValueError(
            f"tracking.experiment={tracker.experiment}: no finished run yet in {tracker.uri}; make demo trains three"
        )
    if mixed:
        return [compare(family, run_finder(tracker)) for family in families(cells)]
    check_comparable(cells)
    return [compare(cells, run_finder(tracker))]


def compare_sweep(tracker: Tracker, sweep_id: str) -> Comparison:
    """The comparison of a sweep's finished runs; students alone of the same experiment serve as controls.

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
    teachers = [find(run_id) for run_id in sorted({record.tags.get("kdpipe.teacher_run", "") for record in mine})]
    others = [record for record in records if record not in mine]
    confirm = map(int, parent.tags.get("kdpipe.confirm_seeds", "").split())
    cells = make_cells([*mine, *(teacher for teacher in teachers if teacher)])
    return compare(cells, find, controls=make_cells(others), confirm=confirm)


def pictures_of(comparison: Comparison, tracker: Tracker) -> dict[str, bytes]:
    """The pictures that there is something to draw for: PNGs by file name."""
    decisive = comparison.confirmed or comparison.best
    curves = None
    if decisive:
        shown = {"distilled": decisive.cell}
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


def run_finder(tracker: Tracker):  # type: ignore[no-untyped-def]
    """`tracker.get_run`, which asks the store once for each run."""

    @cache
    def find(run_id: str) -> RunRecord | None:
        return tracker.get_run(run_id) if run_id else None

    return find


def check_where(where: Mapping[str, str], records: list[RunRecord], tracker: Tracker) -> None:
    """Raise ValueError for a setting, or a value of one, that no run has."""
    for key, value in where.items():
        values = {record.params[key] for record in records if key in record.params}
        if value not in values:
            there = f"{', '.join(sorted(values))}" if values else "no run has this setting"
            raise ValueError(f"--where {key}={value}: no finished run of {tracker.experiment} has it; there is {there}")


def _fits(cell: Cell, where: Mapping[str, str]) -> bool:
    return all(cell.first.params.get(key, value) == value for key, value in where.items())
