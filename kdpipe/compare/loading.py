"""From an MLflow store to comparisons and their plots."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from kdpipe.compare.cells import Cell, Controls, make_cells, teacher_runs
from kdpipe.compare.comparison import (
    Comparison,
    GetRun,
    best_run,
    check_comparable,
    compare_cells,
    families,
    make_row,
    metric_of,
    with_published,
)
from kdpipe.compare.comparison_table import Picture
from kdpipe.compare.disagreement import Correct, find_disagreement, read_predictions
from kdpipe.compare.other_weights import OtherWeights
from kdpipe.compare.records import RunSource
from kdpipe.compare.statistics import CANNOT_TELL
from kdpipe.runs.moved_store import ARTIFACTS
from kdpipe.runs.names import CONFUSION, DIFFERING, LEFT_OUT, PREDICTIONS, RELIABILITY
from kdpipe.settings.errors import ConfigError, one_of
from kdpipe.settings.metric_names import METRICS, Metric
from kdpipe.system.optional import no_windows
from kdpipe.tracking import RunRecord, Tracker

# Pictures among the artifacts of the decisive student's run, with their captions.
PICTURES_OF_A_RUN = {
    RELIABILITY: "Calibration: how confident the distilled student is, and how often it is right",
    CONFUSION: "Confusion matrix of the distilled student",
    DIFFERING: "The test images on which the distilled student and its teacher differ most",
}

log = logging.getLogger("kdpipe")


def open_experiment(uri: str, experiment: str, output_dir: Path) -> Tracker:
    """An existing experiment, once it has what earlier processes left in `output_dir`."""
    tracker = Tracker(uri, experiment, output_dir / ARTIFACTS, create=False)
    tracker.recover_all(output_dir / "runs")
    return tracker


def load_comparisons(
    source: RunSource,
    where: Mapping[str, str],
    mixed: bool,
    published: bool = False,
    metric: Metric | None = None,
) -> list[Comparison]:
    """The comparisons of an experiment's runs; arguments and errors are those of `kdpipe.compare.compare_runs`."""
    records = source.finished_runs()
    if not records:
        problem = f"no finished run yet in {source.name}; make demo trains three"
        raise ConfigError("tracking.experiment", source.experiment, problem=problem)
    cells = select_cells(make_cells(_with_metric(records, metric)), where)
    if not mixed:
        check_comparable(cells)
    groups = families(cells, one_teacher=True) if mixed else [cells]
    find = cache(source.get_run)
    comparisons = [_completed(compare_cells(group, find, metric=metric), source, published) for group in groups]
    if isinstance(source, OtherWeights):
        comparisons = [replace(found, notes=[source.note, *found.notes]) for found in comparisons]
    return comparisons


def _with_metric(records: Sequence[RunRecord], metric: Metric | None) -> list[RunRecord]:
    """Those that have measured the metric. Raises ConfigError if none has: earlier versions knew accuracy alone."""
    found = [record for record in records if metric is None or f"test/{metric}" in record.metrics]
    if records and not found:
        raise ConfigError("--metric", metric, problem="no finished run has measured it")
    if len(found) < len(records):
        log.warning("--metric %s: left out are %d runs that have not measured it", metric, len(records) - len(found))
    return found


def load_sweep(
    tracker: Tracker, sweep: str, where: Mapping[str, str], published: bool = False, metric: Metric | None = None
) -> list[Comparison]:
    """The comparisons of a sweep; arguments and errors are those of `kdpipe.compare.compare_runs`."""
    return [_completed(comparison, tracker, published) for comparison in compare_sweep(tracker, sweep, where, metric)]


def _completed(comparison: Comparison, source: RunSource, published: bool) -> Comparison:
    """With published accuracies, and what the predictions say."""
    if published:
        comparison = with_published(comparison, cache(source.get_run))
    return with_disagreement(comparison, source)


def compare_sweep(
    tracker: Tracker, sweep_id: str, where: Mapping[str, str] | None = None, metric: Metric | None = None
) -> list[Comparison]:
    """Compare a sweep's finished runs, each data set and budget of its grid by itself; students alone from the rest of
    the experiment serve as controls. For a chain, the verdict is on the last link and earlier links are rows. Raises
    ValueError if the sweep was not found, or has no finished run."""
    parent = tracker.find_sweep(sweep_id)
    records = _with_metric(tracker.finished_runs(), metric)
    if parent is None:
        known = sorted({one for record in records for one in _sweeps_of(record)})
        problem = f"not found in {tracker.experiment}" + ("" if known else ", which has no finished sweep runs")
        raise ConfigError("--sweep", sweep_id, one_of(known) if known else "", problem)
    # A trial that its search stopped early may have finished runs, on some of its seeds; other sweeps may need them.
    whole = [record for record in records if record.tags.get(LEFT_OUT) != sweep_id]
    mine = {record.id: record for record in whole if sweep_id in _sweeps_of(record)}
    if not mine:
        raise ConfigError("--sweep", sweep_id, problem="no finished run yet")
    find = cache(tracker.get_run)
    sources = sorted({source for record in mine.values() for source in teacher_runs(record)})
    teachers = [teacher for source in sources if (teacher := find(source))]
    controls = make_cells(record for record in records if record.id not in mine)
    confirm = [int(seed) for seed in parent.tags.get("kdpipe.confirm_seeds", "").split()]
    links = int(parent.tags.get("kdpipe.links", 1))
    cells = select_cells(make_cells([*mine.values(), *teachers], mine.values() if links > 1 else ()), where or {})
    if links > 1:
        return _compare_chain(cells, links, find, controls, metric)
    return [compare_cells(family, find, controls, confirm, metric) for family in families(cells, one_teacher=False)]


def _sweeps_of(record: RunRecord) -> list[str]:
    return record.tags.get("kdpipe.sweep", "").split()


def _compare_chain(
    cells: Sequence[Cell], links: int, find: GetRun, controls: Sequence[Cell], metric: Metric | None
) -> list[Comparison]:
    """Compare a chain's last link, each data set and budget by itself, with the links before it as rows."""
    students_alone, metric = Controls([*cells, *controls]), metric or metric_of(cells)
    comparisons: list[Comparison] = []
    shown = set()
    ends = [cell for cell in cells if cell.link == links or cell.stage == "student"]
    for family in families(ends, one_teacher=False):
        if all(cell.stage == "student" for cell in family):
            continue
        chain = _with_teachers(family, cells)
        comparison = compare_cells(family, find, [*cells, *controls], metric=metric)
        rows = [*(make_row(cell, students_alone, metric) for cell in chain[len(family) :]), *comparison.rows]
        comparisons.append(replace(comparison, rows=sorted(rows, key=lambda row: row.cell.link)))
        shown |= {cell.key for cell in chain}
    if left := [cell for cell in cells if cell.key not in shown]:
        rows = [make_row(cell, students_alone, metric) for cell in sorted(left, key=lambda cell: cell.link)]
        text = f"{CANNOT_TELL}: the chain's last link, which these lead to, has no finished run"
        comparisons.append(Comparison(rows, None, None, text))
    return comparisons


def _with_teachers(students: Sequence[Cell], cells: Sequence[Cell]) -> list[Cell]:
    """These students, the cells that taught them, those that taught these, and so on."""
    found = list(students)
    while students:
        sources = {source for cell in students for source in cell.teacher_runs}
        students = [cell for cell in cells if cell.run_ids & sources and cell not in found]
        found += students
    return found


def select_cells(cells: list[Cell], where: Mapping[str, str]) -> list[Cell]:
    """The cells without another value for any of these settings; cells that lack a setting stay. Raises ConfigError if
    no run has a setting, a value, or all of them together."""
    selected = cells
    for key, wanted in where.items():
        condition = f"{key}={wanted}"
        if key == "seed":
            raise ConfigError("--where", condition, problem="a row covers all of its seeds, which cannot be selected")
        values = {cell.first.params.get(key, cell.settings.get(key)) for cell in cells} - {None}
        if not values:
            raise ConfigError("--where", condition, problem="no finished run has this setting")
        if not any(_same(value, wanted) for value in values):
            raise ConfigError("--where", condition, one_of(sorted(map(str, values))), "no finished run has this value")
        selected = [cell for cell in selected if _same(cell.settings.get(key, wanted), wanted)]
    if not selected:
        conditions = " --where ".join(map("=".join, where.items()))
        raise ConfigError("--where", conditions, problem="no finished run has all of these values")
    return selected


def _same(one: str | None, other: str) -> bool:
    """Whether two texts are equal, or equal numbers such as 0.5 and 0.50."""
    with suppress(ValueError):
        return float(str(one)) == float(other)
    return one == other


def draw_pictures(comparison: Comparison, tracker: RunSource) -> dict[str, Picture]:
    """The plots for which there is data, and the pictures that the decisive student's best run has stored, by file
    name."""
    with no_windows():  # Matplotlib takes a second to import
        from kdpipe.compare import plots
        from kdpipe.evaluation.figures import as_png

    drawn = {
        "pareto": (plots.pareto(comparison), plots.pareto_caption(comparison)),
        "gains": (plots.gains(comparison), "Gain over the student alone on the test images, with its 95 % interval"),
        "heatmap": (plots.heatmap(comparison), "Gain over the student alone at each alpha and temperature"),
    }
    pictures = {}
    if decisive := comparison.decisive:
        curves = {
            name: {seed: tracker.history(run.id, f"val/{comparison.metric}") for seed, run in cell.runs.items()}
            for name, cell in plots.cells_with_curves(comparison, decisive).items()
        }
        drawn["curves"] = (
            plots.curves(curves, comparison.metric),
            f"Validation {METRICS[comparison.metric]} during training, and the gain",
        )
        seed, best = best_run(decisive)
        for name, caption in PICTURES_OF_A_RUN.items():
            if content := tracker.read(best.id, name):
                pictures[name] = Picture(content, f"{caption} (run {best.name or best.id}, seed {seed})")
    found = {f"{name}.png": Picture(as_png(figure), caption) for name, (figure, caption) in drawn.items() if figure}
    return found | pictures


def with_disagreement(comparison: Comparison, store: RunSource) -> Comparison:
    """Add where the decisive student and the student alone disagree; reads the predictions of their runs only."""
    decisive = comparison.decisive
    if decisive is None or decisive.control is None:
        return comparison
    taught, alone = decisive.cell.runs, decisive.control.runs
    pairs = [
        (predictions, _predictions(alone[seed], store))
        for seed in sorted(taught.keys() & alone.keys())
        if (predictions := _predictions(taught[seed], store))
    ]
    return replace(comparison, disagreement=find_disagreement(pairs))


def _predictions(run: RunRecord, store: RunSource) -> Correct:
    content = store.read(run.id, PREDICTIONS)
    try:
        return {} if content is None else read_predictions(content)
    except ValueError as error:
        log.warning("run %s: %s", run.id, error)
        return {}
