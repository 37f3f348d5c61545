"""`python -m kdpipe -m search.trials=40 loss.alpha='interval(0,1)'`: trials that Optuna chooses instead of a grid's
cells, bad ones stopped early, under one parent run in MLflow that holds the study's pictures and the comparison."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from kdpipe.assembly.devices import check_device
from kdpipe.assembly.parts import check_components
from kdpipe.assembly.stores import reach_store
from kdpipe.assembly.teachers import KnownTeachers
from kdpipe.runs.moved_store import ARTIFACTS
from kdpipe.runs.names import LEFT_OUT
from kdpipe.settings.errors import ConfigError, shortened
from kdpipe.settings.hydra_errors import explain
from kdpipe.settings.schema import SearchJob
from kdpipe.sweeps.grid import GridCell, PlannedRun, as_override, check_shared, compose_cell, is_of_method, plan
from kdpipe.sweeps.space import Axis, Space, has, read_space
from kdpipe.sweeps.study import (
    best_of,
    common_failure,
    counted,
    open_storage,
    open_study,
    storage_address,
    workers,
)
from kdpipe.sweeps.sweep import (
    Sweep,
    alone,
    check_confirmation,
    failures,
    plan_confirmation,
    runs_here,
    summarise,
    train_missing,
)
from kdpipe.system.interruption import forward_signals
from kdpipe.system.optional import optional
from kdpipe.system.progress import report_file, watch
from kdpipe.tracking import Tracker

log = logging.getLogger("kdpipe.sweep")

BEST_SHOWN = 5


def run_search(sweeper: BasicSweeper, arguments: Sequence[str]) -> None:
    """Train the trials that are missing of a search, and compare them.

    Raises:
        ValueError: a bad value anywhere in the space, before the first trial; trials that failed, after the last one.
    """
    assert sweeper.hydra_context
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    space = read_space(arguments, parser)
    cells = check_space(sweeper, space)
    first = cells[0]
    check_search(first, space)
    search, uri = first.settings.search, reach_store(first.settings)
    runs = Path(first.settings.output_dir) / "runs"
    storage = open_storage(storage_address(search, first.settings.output_dir))
    tracker = Tracker(uri, first.settings.tracking.experiment, Path(first.settings.output_dir) / ARTIFACTS)
    tracker.recover_all(runs)
    teachers: KnownTeachers = {}
    planned = plan({}, cells, tracker, teachers)
    sweep = Sweep(sweeper, {}, [cell.overrides for cell in cells], [[]], [cells], tracker, teachers)
    if first.settings.sweep.confirm_seeds:
        check_confirmation(sweep, planned)
    students_alone = plan_students_alone(sweep, space, planned)
    sweep.id = search_identity(planned, space, first)
    study = open_study(
        search, storage, search.study or sweep.id, first.settings.train.epochs, space.words, inputs_of(planned)
    )
    study.set_user_attr("words", space.overrides)
    study.set_user_attr("seeds", list(space.seeds))
    described = " × ".join(axis.word for axis in space.axes)
    log.info("search %s: %s; %d trials on %d seeds", sweep.id, described, search.trials, len(space.seeds))
    name = f"search {' × '.join(axis.name for axis in space.axes)}"
    with tracker.sweep(sweep.id, name, {"search": described}, runs) as sweep.parent:
        if failed := train_missing(sweep, students_alone):
            raise ValueError(failures(failed, len(students_alone)))
        sources = {run.teacher for run in planned}
        problem = work_through(sweep, study, space, sources.pop() if len(sources) == 1 else "")
        adopt_trials(sweep, study)
        if search_best := best_of(study):
            if first.settings.sweep.confirm_seeds and not problem:

                def cell_of(run_ids: AbstractSet[str]) -> GridCell:
                    return chosen_cell(sweep, study, space, run_ids)

                confirming = plan_confirmation(sweep, cell_of, max(space.seeds))
                failed = train_missing(sweep, confirming)
                problem = failures(failed, len(confirming)) if failed else problem
            summarise(sweep)
            describe_study(sweep, study, search_best)
        if problem:
            raise ValueError(problem)


def check_space(sweeper: BasicSweeper, space: Space) -> list[GridCell]:
    """The cells in the corners of a space: for each combination of options one with all smallest values; the others
    are checked alone.

    Raises:
        ValueError: a value in the space that a run cannot have.
    """
    corners: list[GridCell] = []
    asked: set[str] = set()
    for groups in space.choices_of_groups():
        known = compose_cell(sweeper, [*space.fixed, *groups]).settings.effective
        axes = [axis for axis in space.values if has(known, axis.name)]
        asked |= {axis.name for axis in axes}
        lowest = [axis.ends[0] for axis in axes]
        corners.append(compose_cell(sweeper, [*space.fixed, *groups, *lowest]))
        check_components(corners[-1].settings)
        for place, axis in enumerate(axes):
            for other in axis.ends[1:]:
                values = [*lowest[:place], other, *lowest[place + 1 :]]
                check_components(compose_cell(sweeper, [*space.fixed, *groups, *values]).settings)
    for axis in space.values:
        if axis.name not in asked:  # Hydra names the key that was meant
            compose_cell(sweeper, [*space.fixed, *next(space.choices_of_groups()), axis.ends[0]])
            raise ConfigError(axis.key, axis.word.partition("=")[2], problem="this setting has no effect here")
    check_shared([cell.settings for cell in corners])
    return corners


def check_search(first: GridCell, space: Space) -> None:
    """Raise ConfigError for a search that cannot be made."""
    settings = first.settings
    search = settings.search
    if search.sampler == "grid" and (endless := [axis for axis in space.axes if axis.is_endless]):
        raise ConfigError("search.sampler", "grid", "tpe, cmaes or random", f"{endless[0].word} has no end of values")
    if search.sampler == "cmaes" and (choices := [axis for axis in space.axes if axis.is_choice]):
        raise ConfigError("search.sampler", "cmaes", "tpe, random or grid", f"{choices[0].word} is no range of numbers")
    if settings.chain is not None:
        raise ConfigError("chain", settings.chain, "null in a search")
    problem = "a search goes on with its study; search.study=NAME begins another one"
    if settings.sweep.rerun:
        raise ConfigError("sweep.rerun", True, "false", problem)
    if settings.train.resume == "never":
        raise ConfigError("train.resume", "never", "auto", problem)
    if settings.dataset.val_fraction == 0:
        problem = "what a search chooses on test images, it cannot report on them"
        raise ConfigError("dataset.val_fraction", 0, "a validation split", problem)
    if runs_here(first.invocation.launcher):
        check_device(settings)


def plan_students_alone(sweep: Sweep, space: Space, planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The student alone on each seed: what every trial's gain is over. None where other settings than the method's are
    chosen: the best trial has its own student alone."""
    of_method = ("loss", "also", "teacher", "distillation", "model@teacher", "loss@also")
    others = [axis for axis in space.axes if not axis.name.startswith(of_method) or not _is_of_method(axis)]
    if others:
        log.info("%s is no setting of the method: only sweep.confirm_seeds trains the student alone", others[0].name)
        return []
    taught = [run for run in planned if run.tags["kdpipe.stage"] == "distill"]
    words = dict.fromkeys(tuple(alone(run.cell)) for run in taught)
    cells = [compose_cell(sweep.sweeper, [*its, f"seed={seed}"]) for its in words for seed in space.seeds]
    return plan({"seed": list(map(str, space.seeds))}, cells, sweep.tracker, sweep.teachers)


def _is_of_method(axis: Axis) -> bool:
    return not axis.name.startswith("loss.") or is_of_method(axis.word)


def search_identity(planned: Sequence[PlannedRun], space: Space, first: GridCell) -> str:
    """The search's 12 hex digits: a hash of what it chooses from, of how, and of the images and teachers it found."""
    search = first.settings.search
    how = [search.sampler, search.pruner, search.seed, search.goals, search.max_latency_ms]
    return hashlib.sha256(json.dumps([_found(planned), space.words, how]).encode()).hexdigest()[:12]


def inputs_of(planned: Sequence[PlannedRun]) -> str:
    """12 hex digits of the settings, images and teachers that the trials of a study share."""
    return hashlib.sha256(json.dumps(_found(planned)).encode()).hexdigest()[:12]


def _found(planned: Sequence[PlannedRun]) -> list[tuple[str, str]]:
    return sorted((run.identity, run.tags["kdpipe.inputs"]) for run in planned)


def work_through(sweep: Sweep, study: Study, space: Space, teacher: str) -> str:
    """Train the trials that are left.

    Returns:
        Why trials failed; "" where none did.
    """
    search, since = sweep.settings.search, time.time()
    assert search.trials is not None
    reasons: list[str] = []
    while True:
        before = _over(study)
        if before >= search.trials or common_failure(study.get_trials(deepcopy=False), since):
            break
        reasons += _launch(sweep, study, space, search.trials - before, teacher, since)
        if _over(study) == before:
            break
    trials = study.get_trials(deepcopy=False)
    if problem := common_failure(trials, since):
        return f"the search stopped, its last trials failed for one reason: {problem}"
    if running := counted(study)["running"]:
        log.info("%d trials are in progress elsewhere; the same command shows the whole", running)
    if failed := [trial for trial in trials if trial.state == TrialState.FAIL]:
        named = shortened(f"trial {trial.number} ({trial.user_attrs.get('reason', '')})" for trial in failed)
        return f"{len(failed)} of {len(trials)} trials failed: {named}"
    return "; ".join(dict.fromkeys(reasons)) if _over(study) < search.trials and not running else ""


def _over(study: Study) -> int:
    states = counted(study)
    return states["complete"] + states["pruned"] + states["failed"]


def _launch(sweep: Sweep, study: Study, space: Space, number: int, teacher: str, since: float) -> list[str]:
    """Hand jobs to Hydra's launcher, each of which asks for a trial when it starts, and wait for them; the reasons for
    which jobs were lost."""
    for name in ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins"):
        logging.getLogger(name).setLevel(logging.WARNING)
    launcher = sweep.sweeper.launcher
    assert launcher
    is_local = runs_here(sweep.drafts[0][0].invocation.launcher)
    try:
        with (
            _watched(sweep, study, number, teacher, since) as jobs,
            forward_signals(lambda: workers(study) if is_local else []),
        ):
            results = launcher.launch(jobs, initial_job_idx=0)
    except Exception as error:  # a process was killed, or a cluster lost a job; others may go on
        log.error("a job was lost: %s", explain(error))
        return [explain(error)]
    return [explain(one._return_value) for one in results if one.status == JobStatus.FAILED]


@contextmanager
def _watched(sweep: Sweep, study: Study, number: int, teacher: str, since: float) -> Iterator[list[list[str]]]:
    """The overrides of the jobs, whose progress is shown within the block."""
    base = [word for word in sweep.drafts[0][0].overrides]
    runs = Path(sweep.settings.output_dir) / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".progress-", dir=runs, ignore_cleanup_errors=True) as folder:
        numbers = range(1, number + 1)
        files = [report_file(Path(folder), one) for one in numbers]
        with watch(files, ["search"] * number, [1.0] * number):
            jobs = []
            for one in numbers:
                job = SearchJob(
                    study=study.study_name,
                    sweep=sweep.id,
                    parent=sweep.parent,
                    teacher=teacher,
                    since=since,
                    number=one,
                    reports=Path(folder).name,
                )
                own_folder = [f"hydra.sweep.subdir=sweep-{sweep.id}", "hydra.output_subdir=null"]
                jobs.append([*base, as_override("search.job", job), *own_folder])
            yield jobs


def adopt_trials(sweep: Sweep, study: Study) -> None:
    """Make the finished runs of complete trials part of the sweep: some may be of an earlier one."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.COMPLETE:
            for run_id in trial.user_attrs["runs"]:
                if run := sweep.tracker.get_run(run_id):
                    sweep.tracker.adopt(run, sweep.id, sweep.parent)
                    if run.tags.get(LEFT_OUT) == sweep.id:  # by another trial of the same settings
                        sweep.tracker.set_tag(run.id, LEFT_OUT, "")
                    sweep.finished[run.tags["kdpipe.identity"]] = run


def chosen_cell(sweep: Sweep, study: Study, space: Space, run_ids: AbstractSet[str]) -> GridCell:
    """The cell of the trial that has one of these runs."""
    trial = next(one for one in study.get_trials(deepcopy=False) if run_ids & {*one.user_attrs.get("runs", ())})
    return compose_cell(sweep.sweeper, [*space.fixed, *trial.user_attrs["words"]])


def describe_study(sweep: Sweep, study: Study, best: FrozenTrial) -> None:
    """Print what the search came to, and keep its pictures in the parent run."""
    search, trials = sweep.settings.search, study.get_trials(deepcopy=False)
    states = counted(study)
    lines = [f"{states[state]} {state}" for state in ("complete", "pruned", "failed", "running") if states[state]]
    trained = sum(trial.user_attrs.get("epochs", 0) for trial in trials)
    seeds = len(study.user_attrs["seeds"])
    whole = len(trials) * seeds * sweep.settings.train.epochs
    log.info("%d trials: %s", len(trials), ", ".join(lines))
    log.info("epochs trained: %s of the %s that a grid of as many cells takes", f"{trained:,}", f"{whole:,}")
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    shown = study.best_trials if len(search.goals) > 1 else sorted(complete, key=lambda one: -one.values[0])
    what = "the Pareto front" if len(search.goals) > 1 else "the best"
    log.info("%s, by validation %s:", what, sweep.settings.train.metric.replace("_", " "))
    for trial in shown[:BEST_SHOWN]:
        time_taken = f", {trial.values[1]:.3g} ms" if len(search.goals) > 1 else ""
        log.info("  trial %d: %.2f %%%s: %s", trial.number, 100 * trial.values[0], time_taken, _words_of(trial))
    metrics = {"search/trials": len(trials), "search/epochs": trained, "search/best": best.values[0]}
    files: dict[str, bytes] = {}
    with optional("pictures of the search"):
        from kdpipe.sweeps.study_pictures import study_pictures

        files = study_pictures(study)
    sweep.tracker.attach(sweep.parent, files, {"kdpipe.search": study.study_name}, metrics)


def _words_of(trial: FrozenTrial) -> str:
    return " ".join(trial.user_attrs["words"])
