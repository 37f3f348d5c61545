"""`python -m kdpipe -m …`: all cells of a grid are checked first, then those that are missing are trained, under one
parent run in MLflow that holds the comparison."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobStatus
from torch import distributed

from kdpipe.assembly.datasets import build_data, check_selection
from kdpipe.assembly.devices import check_device
from kdpipe.assembly.networks import build_model
from kdpipe.assembly.parts import check_components
from kdpipe.assembly.stores import reach_store
from kdpipe.assembly.teachers import KnownTeachers
from kdpipe.runs.claim import ClaimedError, locked, wait_until_free, worker_pid
from kdpipe.runs.commands import compare_command
from kdpipe.runs.journal import is_unfinished
from kdpipe.runs.moved_store import ARTIFACTS
from kdpipe.runs.store_address import PATIENCE
from kdpipe.settings.composition import left_out_keys
from kdpipe.settings.errors import ConfigError, shortened
from kdpipe.settings.hydra_errors import explain
from kdpipe.settings.schema import JobSettings, Settings
from kdpipe.sweeps.chain import check_links, compose_link, draft, links_of, networks_of
from kdpipe.sweeps.grid import (
    Axes,
    GridCell,
    PlannedRun,
    as_override,
    check_shared,
    compose_cell,
    describe,
    expand,
    is_of_method,
    plan,
    sweep_identity,
)
from kdpipe.system.interruption import forward_signals
from kdpipe.system.optional import optional
from kdpipe.system.progress import report_file, watch
from kdpipe.system.tables import UNLIMITED

if TYPE_CHECKING:
    from kdpipe.compare.comparison_table import Picture
    from kdpipe.tracking import RunRecord, Tracker

log = logging.getLogger("kdpipe.sweep")

LOCAL_LAUNCHERS = ("basic_launcher", "joblib_launcher")  # in the targets of Hydra's launchers


@dataclass
class Sweep:
    """A sweep in progress.

    Attributes:
        grid: the overrides of each cell.
        links: the overrides of each link of its chain; a sweep without one has one link.
        drafts: what these compose before anything is trained, link by link.
        teachers: each is looked up once.
        parent: id of its parent run in MLflow.
        finished: its finished runs, by identity.
    """

    sweeper: BasicSweeper
    axes: Axes
    grid: Sequence[Sequence[str]]
    links: Sequence[Sequence[str]]
    drafts: Sequence[Sequence[GridCell]]
    tracker: "Tracker"
    teachers: KnownTeachers = field(default_factory=dict)
    id: str = ""
    parent: str = ""
    finished: dict[str, "RunRecord"] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    @property
    def settings(self) -> Settings:
        """Those of its first cell, for what all share."""
        return self.drafts[0][0].settings

    @property
    def is_chain(self) -> bool:
        return len(self.links) > 1

    @property
    def rerun(self) -> bool:
        """Whether finished runs are trained anew."""
        return self.settings.sweep.rerun or self.settings.train.resume == "never"


def run_sweep(sweeper: BasicSweeper, arguments: Sequence[str]) -> None:
    """Train what is missing of a grid, and compare its runs.

    Raises:
        ValueError: a bad value in any cell, before the first one trains; cells that failed, after the last one.
    """
    if distributed.is_torchelastic_launched():
        raise ConfigError(
            "torchrun",
            expected="hydra/launcher=joblib for a sweep, a process for each run",
            problem="it shares one run",
        )
    axes, grid = expand(sweeper, arguments)
    links = links_of(sweeper, axes)
    drafts = draft(sweeper, grid, links)
    every = [cell.settings for cells in drafts for cell in cells]
    for line in left_out_keys([(cell.overrides, cell.settings) for cells in drafts for cell in cells]):
        log.info(line)
    for settings in every:
        check_components(settings)
    check_shared(every)
    check_links(grid[0], links, drafts)
    first = every[0]
    if runs_here(drafts[0][0].invocation.launcher):
        for settings in every:
            check_device(settings)
    uri = reach_store(first)

    from kdpipe.tracking import Tracker

    # The store is made here, once: processes that start together would make it at the same time.
    tracker = Tracker(uri, first.tracking.experiment, Path(first.output_dir) / ARTIFACTS)
    tracker.recover_all(Path(first.output_dir) / "runs")
    sweep = Sweep(sweeper, axes, grid, links, drafts, tracker)
    planned = plan(axes, drafts[0], tracker, sweep.teachers, link=1 if sweep.is_chain else None)
    check_networks(drafts[1:], tracker)
    if first.sweep.confirm_seeds:
        check_confirmation(sweep, planned)
    sweep.id = sweep_identity(planned, drafts[1:])
    chain = f"chain {' → '.join(map(networks_of, drafts))}" if sweep.is_chain else ""
    described = " × ".join(filter(None, [chain, describe(axes)])) or "one cell"
    total = sum(len({cell.identity for cell in cells}) for cells in drafts)
    log.info("sweep %s: %s; %d cells, %d runs", sweep.id, described, len(grid), total)
    name, runs = chain or f"sweep {' × '.join(axes)}", Path(first.output_dir) / "runs"
    with tracker.sweep(sweep.id, name, {"sweep": described}, runs) as sweep.parent:
        if sweep.is_chain:  # which the comparison of its runs has to know
            tracker.set_tag(sweep.parent, "kdpipe.links", str(len(links)))
        failed, left_out = train_links(sweep, planned)
        if first.sweep.confirm_seeds and not failed:
            last_seed = max(run.settings.seed for run in planned)
            confirming = plan_confirmation(sweep, lambda ids: cell_of_runs(sweep, planned, ids), last_seed)
            failed = train_missing(sweep, confirming)
            total += len(confirming)
        summarise(sweep)
        if failed:
            raise ValueError(failures(failed, total, left_out))


def check_networks(drafts: Sequence[Sequence[GridCell]], tracker: "Tracker") -> None:
    """Raise ConfigError for images or networks of links after the first that cannot be used: `plan` would find out only
    when the links before are trained."""
    every = [cell.settings for cells in drafts for cell in cells]
    alike = {str([one.model.plain, one.dataset.plain, one.train.select, one.train.early_stop]): one for one in every}
    for settings in alike.values():
        data = build_data(settings.dataset)
        check_selection(settings, data)
        build_model(settings, data, tracker)


def train_links(sweep: Sweep, planned: Sequence[PlannedRun]) -> tuple[dict[str, str], int]:
    """Train what is missing of each link, when the one before it is trained, for the cells that got so far. A sweep
    without a chain has one link.

    Args:
        planned: the first link's runs.

    Returns:
        The names of the runs that failed, with the reason, and how many were left out for that.
    """
    failed: dict[str, str] = {}
    left_out = 0
    grid, cells = sweep.grid, sweep.drafts[0]
    for number, (link, drafts) in enumerate(zip(sweep.links, sweep.drafts, strict=True), start=1):
        if sweep.is_chain:
            log.info("link %d of %d: %s", number, len(sweep.links), networks_of(drafts))
        if number > 1:
            finished = [sweep.finished.get(cell.identity) for cell in cells]
            teachers = [(cell, run.id) for cell, run in zip(cells, finished, strict=True) if run]
            grid = [overrides for overrides, run in zip(grid, finished, strict=True) if run]
            cells = compose_link(sweep.sweeper, grid, link, teachers)
            planned = plan(sweep.axes, cells, sweep.tracker, {}, number)
            left_out += len({cell.identity for cell in drafts}) - len(planned)
        failed |= train_missing(sweep, planned)
    return failed, left_out


def runs_here(launcher: str) -> bool:
    """Whether a launcher, by its target, runs its jobs on this machine, and not on the nodes of a cluster."""
    return any(local in launcher for local in LOCAL_LAUNCHERS)


def train_missing(sweep: Sweep, planned: Sequence[PlannedRun]) -> dict[str, str]:
    """Train the runs that are not finished.

    Returns:
        The names of those that failed, with the reason.
    """
    missing = [run for run in planned if not take_finished(sweep, run)]
    if len(missing) < len(planned):
        log.info("%d of %d runs are finished already", len(planned) - len(missing), len(planned))
    failed: dict[str, str] = {}
    while missing:
        reasons, undecided = launch(sweep, missing)
        sweep.tracker.wait(PATIENCE)
        for run in missing:  # a process that was killed leaves its run open
            with suppress(TimeoutError, FileNotFoundError), locked(run.folder):
                sweep.tracker.recover(run.folder)
        left = [run for run in missing if not take_finished(sweep, run)]
        again = undecided if len(left) < len(missing) else []  # as long as something gets done
        for run in left:
            if run not in again:
                failed[run.name] = reasons.get(run.identity, "it is not among the finished runs")
        missing = [run for run in left if run in again]
    return failed


def take_finished(sweep: Sweep, run: PlannedRun) -> bool:
    """Whether a run is finished; then it becomes part of the sweep."""
    finished = None if is_unfinished(run.folder, run.tags) else sweep.tracker.find_finished(run.tags)
    if finished is None or (sweep.rerun and finished.ended < sweep.started):
        return False
    train = run.settings.train
    if train.keep_epochs:
        train.warn_of_missing_epochs(train.last_epoch(finished.metrics), sweep.tracker.artifacts(finished.id), run.name)
    sweep.tracker.adopt(finished, sweep.id, sweep.parent)
    sweep.finished[run.identity] = finished
    return True


def launch(sweep: Sweep, missing: Sequence[PlannedRun]) -> tuple[dict[str, str], list[PlannedRun]]:
    """Hand runs to Hydra's launcher, and wait for them.

    Returns:
        Why runs failed, by identity; and those to try again: their job was lost, or another process had them.
    """
    # Each job logs its own progress, better than Hydra's launchers do.
    for name in ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins"):
        logging.getLogger(name).setLevel(logging.WARNING)
    assert sweep.sweeper.launcher
    launcher = sweep.drafts[0][0].invocation.launcher

    def workers() -> list[int]:
        return [worker for run in missing if (worker := worker_pid(run.folder))]

    try:
        with _watched(sweep, missing) as jobs, forward_signals(workers if runs_here(launcher) else list):
            results = sweep.sweeper.launcher.launch(jobs, initial_job_idx=0)
    except Exception as error:  # a process was killed, or a cluster lost a job; others may go on
        log.error("a job was lost: %s", explain(error))
        reasons = {run.identity: explain(error) for run in missing}
        undecided = list(missing)
    else:
        errors = {
            run.identity: result._return_value
            for run, result in zip(missing, results, strict=True)
            if result.status == JobStatus.FAILED
        }
        reasons = {identity: explain(error) for identity, error in errors.items()}
        undecided = [run for run in missing if isinstance(errors.get(run.identity), ClaimedError)]
    for run in undecided:
        wait_until_free(run.folder)
    return reasons, undecided


def check_confirmation(sweep: Sweep, planned: Sequence[PlannedRun]) -> None:
    """Raise ConfigError where there is nothing to confirm, or no student alone to compare it with."""
    key, number = "sweep.confirm_seeds", sweep.settings.sweep.confirm_seeds
    if sweep.is_chain:
        raise ConfigError(key, number, "0", "a chain is confirmed by the same chain on other seeds")
    distilled = [run for run in planned if run.tags["kdpipe.stage"] == "distill"]
    if not distilled:
        raise ConfigError(key, number, "0", "the grid has no distilled student to confirm")
    for overrides in dict.fromkeys(tuple(alone(run.cell)) for run in distilled):
        try:
            check_components(compose_cell(sweep.sweeper, overrides).settings)
        except Exception as error:
            raise ConfigError(
                key, number, "0", f"there is no student alone to compare with: {explain(error)}"
            ) from error


def alone(cell: GridCell) -> list[str]:
    """The overrides of the same student on the labels alone, but for its seed."""
    kept = _without(cell.overrides, "seed", "loss.alpha", "loss@also")
    kept = [override for override in kept if not override.lstrip("+").startswith("also.")]
    no_other = ["~loss@also"] if cell.settings.also else []
    if cell.settings.loss.blends:
        return [*kept, "loss.alpha=0", *no_other]
    kept = [override for override in _without(kept, "loss") if not is_of_method(override)]
    return [*kept, "loss=cross_entropy", *no_other]


def cell_of_runs(sweep: Sweep, planned: Sequence[PlannedRun], run_ids: AbstractSet[str]) -> GridCell:
    """The cell that one of some runs in MLflow belongs to."""
    return next(run.cell for run in planned if sweep.finished[run.identity].id in run_ids)


def plan_confirmation(
    sweep: Sweep, cell_of: Callable[[AbstractSet[str]], GridCell], last_seed: int
) -> list[PlannedRun]:
    """The best cell of each data set and budget, chosen on the runs so far, and its student alone, on new seeds.

    Args:
        cell_of: finds the cell of one of some runs, by their ids.
        last_seed: of the runs so far.
    """
    from kdpipe.compare.loading import compare_sweep

    numbers = [str(last_seed + 1 + seed) for seed in range(sweep.settings.sweep.confirm_seeds)]
    seeds = [f"seed={number}" for number in numbers]
    # Seeds that were confirmed before stay out of the choice, however few are asked for now.
    parent = sweep.tracker.get_run(sweep.parent)
    before = parent.tags.get("kdpipe.confirm_seeds", "").split() if parent else []
    sweep.tracker.set_tag(sweep.parent, "kdpipe.confirm_seeds", " ".join(sorted({*before, *numbers}, key=int)))
    grid: list[list[str]] = []
    for comparison in compare_sweep(sweep.tracker, sweep.id):
        if comparison.best:
            chosen = cell_of({run.id for run in comparison.best.cell.runs.values()})
            log.info("best is %s: it and the student alone on seeds %s", comparison.best.cell.title, ", ".join(numbers))
            grid += [[*alone(chosen), seed] for seed in seeds]
            grid += [[*_without(chosen.overrides, "seed"), seed] for seed in seeds]
    cells = [compose_cell(sweep.sweeper, overrides) for overrides in grid]
    return plan(sweep.axes, cells, sweep.tracker, sweep.teachers)


def _without(overrides: Sequence[str], *keys: str) -> list[str]:
    return [override for override in overrides if override.partition("=")[0] not in keys]


def summarise(sweep: Sweep) -> None:
    """Print the comparison of the sweep's runs, and keep it in the parent run."""
    if not sweep.finished:
        return

    from kdpipe.compare import comparison_table, frames
    from kdpipe.compare.loading import compare_sweep, draw_pictures, with_disagreement

    comparisons = [with_disagreement(found, sweep.tracker) for found in compare_sweep(sweep.tracker, sweep.id)]
    pictures: list[dict[str, Picture]] = [{} for _ in comparisons]
    with optional("plots of the comparison"):
        pictures = [draw_pictures(comparison, sweep.tracker) for comparison in comparisons]
    table, whole = (
        "\n\n".join(comparison_table.to_text(comparison, width) for comparison in comparisons)
        for width in (None, UNLIMITED)
    )
    files = {
        "comparison.txt": whole.encode(),
        "comparison.csv": frames.to_csv(comparisons).encode(),
        "comparison.html": comparison_table.to_html(f"sweep {sweep.id}", comparisons, pictures).encode(),
        **comparison_table.picture_files(pictures),
    }
    tags = {"kdpipe.verdict": "; ".join(comparison.verdict for comparison in comparisons)}
    tags["mlflow.note.content"] = comparison_table.to_markdown(comparisons)
    # Several data sets or budgets have no one best cell.
    metrics = frames.best_metrics(comparisons[0]) if len(comparisons) == 1 else {}
    print(f"\n{table}\n", flush=True)
    sweep.tracker.attach(sweep.parent, files, tags, metrics)
    log.info("in MLflow (make ui):")
    log.info("  summary and pictures: %s", sweep.tracker.link(sweep.parent))
    log.info("  the runs in a table: %s", sweep.tracker.table_link(sweep.id))
    log.info("  the runs as charts: %s", sweep.tracker.charts_link(sweep.id))
    log.info("  the runs compared: %s", sweep.tracker.compare_link([run.id for run in sweep.finished.values()]))
    log.info("this table again: %s --sweep %s", compare_command(sweep.settings), sweep.id)


@contextmanager
def _watched(sweep: Sweep, missing: Sequence[PlannedRun]) -> Iterator[list[list[str]]]:
    """The overrides of the jobs, whose progress is shown within the block: a line where one starts and ends, and on a
    terminal one bar for all."""
    runs = Path(sweep.settings.output_dir) / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".progress-", dir=runs, ignore_cleanup_errors=True) as folder:
        numbers = range(1, len(missing) + 1)
        files = [report_file(Path(folder), number) for number in numbers]
        sizes = [max(run.settings.train.epochs, 1) for run in missing]
        with watch(files, [run.name for run in missing], sizes):
            yield [
                [*run.overrides, *_job_overrides(sweep, run, number, Path(folder).name)]
                for number, run in zip(numbers, missing, strict=True)
            ]


def _job_overrides(sweep: Sweep, run: PlannedRun, number: int, reports: str) -> list[str]:
    """What a job has to know of its sweep."""
    job = JobSettings(
        id=sweep.id, parent=sweep.parent, name=run.name, teacher=run.teacher, number=number, reports=reports
    )
    return [as_override("sweep.job", job), *(["train.resume=never"] if sweep.rerun else [])]


def failures(failed: dict[str, str], total: int, left_out: int = 0) -> str:
    """One line on the runs that failed, grouped by reason, and on the number left out that they would have taught."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in failed.items():
        by_reason.setdefault(reason, []).append(name)
    groups = []
    for reason, names in by_reason.items():
        groups.append(f"{shortened(names, 5)} ({reason})")
    if left_out:
        groups.append(f"{left_out} that they would have taught left out")
    return f"{len(failed)} of {total} runs failed: {'; '.join(groups)}; the same command trains what is missing"
