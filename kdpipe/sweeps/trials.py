"""One trial of a search: a job asks for it when it starts, and trains its settings seed after seed."""

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import optuna
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.study import Study
from optuna.trial import Trial, TrialState

from kdpipe.assembly.datasets import build_data
from kdpipe.assembly.devices import use_hardware
from kdpipe.assembly.networks import build_network, images_for
from kdpipe.assembly.run_networks import with_networks_of_runs
from kdpipe.assembly.stores import reach_store
from kdpipe.evaluation.costs import cost
from kdpipe.runs.journal import Journal
from kdpipe.runs.moved_store import ARTIFACTS
from kdpipe.runs.names import LEFT_OUT, STATE, TRIAL
from kdpipe.settings.composition import Invocation, read_settings
from kdpipe.settings.hydra_errors import HYDRA_ERRORS, explain
from kdpipe.settings.metric_names import ending
from kdpipe.settings.schema import JobSettings, SearchJob, Settings
from kdpipe.sweeps.grid import as_override
from kdpipe.sweeps.space import Space, read_space, suggest
from kdpipe.sweeps.study import best_of, is_likely_worse, next_trial, open_storage, pruner, sampler, storage_address
from kdpipe.system.interruption import StopAfter, StoppedEarlyError
from kdpipe.system.progress import IS_OVER

log = logging.getLogger("kdpipe.sweep")

TIMING_SECONDS = 2.0
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"  # the state of a trial
STATES = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


class SeedResult(NamedTuple):
    """What a run came to: its metric, and its id in MLflow."""

    value: float
    run_id: str


# A run of these settings, which stops where it is told to, with StoppedEarlyError.
Run = Callable[[Settings, Invocation, StopAfter], SeedResult]


def compose_here(words: Sequence[str]) -> tuple[Settings, Invocation]:
    """The settings that overrides compose within a job.

    Raises:
        ValueError: a key or a value that they cannot have.
    """
    try:
        config = compose("config", list(words), return_hydra_config=True)
        invocation = Invocation.of(config.hydra)
        return with_networks_of_runs(read_settings(config, invocation), invocation), invocation
    except HYDRA_ERRORS as error:
        raise ValueError(explain(error, words)) from error


def work_on_trial(base: Settings, run: Run) -> float:
    """Ask for a trial and train it.

    Args:
        base: the settings of the job, for what all trials share.

    Returns:
        What the trial came to, 0 where there was none to work on, or it was stopped early.
    """
    search, job = base.search, base.search.job
    assert job is not None and search.trials is not None
    folder = Path(base.output_dir) / "runs" / f"sweep-{job.sweep}"
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.load_study(
        study_name=job.study,
        storage=open_storage(storage_address(search, base.output_dir)),
        sampler=sampler(search, 0),
        pruner=pruner(search, base.train.epochs),
    )
    with next_trial(study, search, folder, search.trials, job.since) as trial:
        if trial is None:
            log.info("no trial is left", extra=IS_OVER)
            return 0.0
        return _Trial(base, job, study, trial, run).work()


class _Trial:
    """A trial in progress."""

    def __init__(self, base: Settings, job: SearchJob, study: Study, trial: Trial, run: Run) -> None:
        self.base, self.job, self.study, self.trial, self._run = base, job, study, trial, run
        self.space: Space = read_space(study.user_attrs["words"], OverridesParser.create())
        self.has_one_goal = len(base.search.goals) == 1
        self.epochs = 0  # of a run, unless it stops by itself
        self.seen = 0  # epochs of the run in progress
        self.trained = 0  # epochs of the runs before it
        self.runs: list[str] = []
        self.values: list[float] = []
        self.latency = 0.0  # milliseconds

    def work(self) -> float:
        """Train the trial and tell the study, whatever it comes to."""
        try:
            words = suggest(self.trial, self.space, lambda words: compose_here(words)[0].effective)
            self.trial.set_user_attr("words", words)
            log.info("trial %d: %s", self.trial.number, " ".join(words))
            stopped = self._measure(words) or self._train(words)
        except Exception as error:
            return self._end(FAILED, explain(error))
        return self._end(PRUNED, stopped) if stopped else self._end(COMPLETE, "")

    def _measure(self, words: Sequence[str]) -> str:
        """Time the trial's network, if anybody wants to know; why it is not trained, "" where it is."""
        limit = self.base.search.max_latency_ms
        if limit is None and self.has_one_goal:
            return ""
        settings, _ = compose_here([*self.space.fixed, *words])
        self.latency = latency_of(self.study, settings)
        self.trial.set_user_attr("latency_ms", self.latency)
        if limit is not None and self.latency > limit:
            return f"not trained, {settings.model.name} takes {self.latency:.3g} ms for one image"
        return ""

    def _train(self, words: Sequence[str]) -> str:
        """Train one seed after the other; why the trial was stopped early, "" where it was not."""
        best, seeds = best_of(self.study), self.space.seeds
        for place, seed in enumerate(seeds):
            settings, invocation = compose_here([*self.space.fixed, *words, f"seed={seed}", self._job_override(seed)])
            self.epochs, self.seen = settings.train.epochs, 0
            try:
                if epoch := self.trial.user_attrs.get("stop_after"):  # the process was killed before it could tell
                    journal = Journal.read(settings.folder)
                    raise StoppedEarlyError(epoch, journal.run_id if journal else "")
                result = self._run(settings, invocation, self._is_pruned if place == 0 else self._count)
            except StoppedEarlyError as stopped:
                self.runs += [stopped.run_id] if stopped.run_id else []
                return f"stopped after epoch {stopped.epoch} of seed {seed}"
            self.runs.append(result.run_id)
            self.values.append(result.value)
            self.trial.set_user_attr("values", self.values)
            self.trained += self.seen or self.epochs  # a run that was finished before has no epoch in progress
            self._count(0, {})
            if place + 1 == len(seeds) or best is None or not self.has_one_goal:
                continue
            if is_likely_worse(self.values, best.user_attrs["values"]):
                return f"likely worse than trial {best.number}, after {place + 1} seeds"
        return ""

    def _is_pruned(self, epoch: int, metrics: dict[str, float]) -> bool:
        """Whether the trial is to stop after an epoch of its first seed."""
        self._count(epoch, metrics)
        if not self.has_one_goal:
            return False
        metric = self.base.train.metric + ending(self.base.train.select)
        value = metrics.get(f"val/{metric}", metrics.get(f"test/{metric}"))
        if value is None:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an epoch that is trained again is known already
            self.trial.report(value, epoch)
        if epoch == self.epochs or not self.trial.should_prune():
            return False
        self.trial.set_user_attr("stop_after", epoch)
        return True

    def _job_override(self, seed: int) -> str:
        """What a run has to know of its sweep."""
        job = JobSettings(
            id=self.job.sweep,
            parent=self.job.parent,
            name=f"t{self.trial.number}_s{seed}",
            teacher=self.job.teacher,
            number=self.trial.number,
            reports=self.job.reports,
        )
        return as_override("sweep.job", job)

    def _count(self, epoch: int, metrics: dict[str, float]) -> bool:
        self.seen = epoch
        self.trial.set_user_attr("epochs", self.trained + epoch)
        return False

    def _end(self, state: str, reason: str) -> float:
        """Tell the study and the trial's runs how it ended."""
        value = fmean(self.values) if self.values else 0.0
        if reason:
            self.trial.set_user_attr("reason", reason)
        self.trial.set_user_attr("runs", self.runs)
        try:
            uri = reach_store(self.base)

            from kdpipe.tracking import Tracker

            tracker = Tracker(uri, self.base.tracking.experiment, Path(self.base.output_dir) / ARTIFACTS)
            for run_id in self.runs:
                tracker.set_tag(run_id, STATE, state)
                tracker.set_tag(run_id, TRIAL, str(self.trial.number))
                if state != COMPLETE:
                    tracker.set_tag(run_id, LEFT_OUT, self.job.sweep)
        finally:  # a store that is gone makes no trial worse
            goals = [value] if self.has_one_goal else [value, self.latency]
            self.study.tell(self.trial, goals if state == COMPLETE else None, STATES[state])
        shown = f"{100 * value:.2f} %, the mean of {len(self.values)} seeds" if state == COMPLETE else reason
        level = logging.ERROR if state == FAILED else logging.INFO
        log.log(level, "trial %d %s: %s", self.trial.number, state, shown, extra=IS_OVER)
        return value


def latency_of(study: Study, settings: Settings) -> float:
    """Milliseconds that a network takes for one image on this machine; measured once, and kept in the study."""
    hardware = use_hardware(settings)
    described = json.dumps([hardware.machine, settings.model.plain, settings.dataset.plain, settings.train.threads])
    key = f"latency_ms/{hashlib.sha256(described.encode()).hexdigest()[:12]}"
    if key not in study.user_attrs:
        data = build_data(settings.dataset)
        model = build_network("model", settings.model, data, freeze="none").to(hardware.device)
        measured = cost({"model": model}, images_for(model, data, data.splits["test"][:1]), hardware, TIMING_SECONDS)
        study.set_user_attr(key, measured["model/latency_ms"])
    return float(study.user_attrs[key])
