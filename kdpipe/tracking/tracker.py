"""An experiment in an MLflow store, where runs are created and found."""

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar
from urllib.parse import quote, urlencode

import mlflow
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Param
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList

from kdpipe.runs.claim import ClaimedError, claim, is_local, locked
from kdpipe.runs.journal import (
    CREATION_TOKEN,
    FAILED,
    FINISHED,
    KILLED,
    METRICS,
    NOT_CREATED,
    Journal,
    Row,
    now,
    undelivered,
    write_rows,
)
from kdpipe.settings.addresses import WEIGHTS
from kdpipe.settings.errors import ConfigError, flat
from kdpipe.settings.identity import what_matters
from kdpipe.system.interruption import postponed
from kdpipe.tracking.delivery import STOP_TIMEOUT, ActiveRun, Recovery, delete_duplicates, new_token
from kdpipe.tracking.run_store import UNKNOWN_RUN, RunRecord, RunStore, record_of
from kdpipe.tracking.sqlite import set_aside_half_made, store_lock

MAX_PARAM_LENGTH = 6000  # MLflow's own limit
PAGE = 1000
MAX_DIFFERENCES, MAX_SHOWN = 3, 20  # settings in the name of a run, and characters of each
# Of the table of runs that we link to; more would not fit on a screen.
COLUMNS = (
    *("metrics.`selected/accuracy`", "metrics.`test/accuracy`", "params.`loss.alpha`", "params.`loss.temperature`"),
    *("params.`seed`", "params.`model.name`"),
)
IS_FINISHED = "attributes.status = 'FINISHED'"

T = TypeVar("T")

log = logging.getLogger("kdpipe")


class Tracker(RunStore):
    """An experiment in an MLflow store.

    Args:
        uri: of the store, from `store_address.store_uri`. A half-made sqlite file of a dead process is set aside.
        experiment: its name.
        artifacts: folder of the artifacts of a local store; a server has its own.
        create: whether to create a missing experiment.

    Raises:
        ConfigError: the store cannot be opened, or has no such experiment.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path, create: bool = True) -> None:
        self.experiment, self._artifacts, self._create_missing = experiment, artifacts, create
        super().__init__(uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            names = ", ".join(known.name for known in self._experiments())
            raise ConfigError("tracking.experiment", experiment, f"one of {names}", f"not found in {self.name}")
        if found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore -x {found.experiment_id}"
            problem = f"this experiment was deleted; {restore} brings it back"
            raise ConfigError("tracking.experiment", experiment, problem=problem)
        self.experiment_id: str = found.experiment_id
        self._recovery = Recovery({uri: self.client})

    def _opened(self) -> mlflow.MlflowClient:
        if not self._create_missing:
            return super()._opened()
        set_aside_half_made(self.uri)
        client = mlflow.MlflowClient(tracking_uri=self.uri)
        if client.get_experiment_by_name(self.experiment) is None:
            location = self._artifacts.resolve().as_uri() if self.uri.startswith("sqlite") else None
            with suppress(MlflowException):  # another process has created it meanwhile, on a server
                client.create_experiment(self.experiment, artifact_location=location)
        return client

    @contextmanager
    def run(
        self,
        name: str,
        folder: Path,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        run_id: str | None = None,
        history: Sequence[Row] = (),
        seconds: float = 0.0,
    ) -> Iterator[ActiveRun]:
        """The run of a folder: FINISHED when the block ends, KILLED or FAILED with the reason as a tag on an exception.

        Args:
            run_id: of the run to resume; a new run is created where the store no longer has it.
            history: the rows to keep of it.
            seconds: that were spent on it.
        """
        known = run_id if run_id and self._can_resume(run_id) else NOT_CREATED
        if known == NOT_CREATED and "kdpipe.sweep" not in tags:  # whose runs are named by its axes
            name = self._distinct_name(name, params, tags)
        before, rows = Journal.read(folder), list(history)
        if before and before.uri != self.uri and not before.delivered:
            left = before.run_id or folder.name
            log.warning("run %s continues in %s; %s will not have the rest of it", left, self.name, before.store)
        tokened = {**tags, CREATION_TOKEN: self._token(before, known)}
        times = before.times[: len(rows)] if before and before.run_id == run_id else []
        times += [now()] * (len(rows) - len(times))
        run = journal = None
        try:
            with postponed():  # the folder has to know each run that is created in the store
                opened = Journal(folder, self.uri, known, tokened, seconds=seconds, times=times)
                if known == NOT_CREATED:
                    opened.write()  # with the token, by which a run is found if this process is killed now
                    self._create(opened, name, tokened)
                journal = opened
                (folder / WEIGHTS).unlink(missing_ok=True)
                if rows:
                    write_rows(folder, rows)
                else:
                    (folder / METRICS).unlink(missing_ok=True)
                journal.write()  # last: the lines of another run are not this one's
            if known != NOT_CREATED:
                self._reopen(journal.run_id, tags)
            self._log_params(journal.run_id, params)
            run = ActiveRun(self.client, journal, rows)
            run.commit()
            yield run
            run.end(FINISHED)
        except BaseException as error:
            if journal:
                (run or ActiveRun(self.client, journal, rows)).end(*status_after(error))
            raise

    def recover(self, folder: Path) -> None:
        """Deliver what an earlier process left in a run's folder, which the caller has locked."""
        if problem := self._recovery.recover(folder):
            log.warning("%s: %s", folder, problem)

    def recover_all(self, runs: Path) -> None:
        """Do so for all folders in `runs` that were left on this machine."""
        for folder in undelivered(runs):
            with suppress(OSError), locked(folder):  # in progress, or another user's
                if is_local(folder):
                    self.recover(folder)

    def _can_resume(self, run_id: str) -> bool:
        """Whether the experiment has this run."""
        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code not in UNKNOWN_RUN:
                raise
            return False
        return bool(info.lifecycle_stage == "active" and info.experiment_id == self.experiment_id)

    def _reopen(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.client.update_run(run_id, status="RUNNING")
        if "kdpipe.reason" in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, "kdpipe.reason")
        for key, value in {**git_tags(), **tags}.items():
            if key not in ("kdpipe.sweep", "mlflow.parentRunId"):  # `adopt` sets these when the run is finished
                self.client.set_tag(run_id, key, value)

    @contextmanager
    def sweep(self, sweep_id: str, name: str, params: Mapping[str, object], runs: Path) -> Iterator[str]:
        """The id of a sweep's parent run, an existing or a new one; closed as in `run`. While it is open, a folder in
        `runs` has its journal."""
        with ExitStack() as stack:
            folder = runs / f"sweep-{sweep_id}"
            is_first = True
            try:
                stack.enter_context(claim(folder))
            except ClaimedError:  # another process that shares the sweep has the folder
                is_first = False
            with store_lock(self.uri):  # two processes may run the same sweep
                found = self.find_sweep(sweep_id)
                token = {CREATION_TOKEN: new_token(self.experiment_id)}
                journal = Journal(folder, self.uri, found.id if found else NOT_CREATED, token)
                if is_first:
                    journal.write()
                if found:
                    self._reopen(journal.run_id, {})
                else:
                    self._create(journal, name, {"kdpipe.stage": "sweep", "kdpipe.sweep": sweep_id, **token})
                    self._log_params(journal.run_id, params)
            if is_first:
                journal.write()
            try:
                yield journal.run_id
                delete_duplicates(self.client, journal)
                self.client.set_terminated(journal.run_id, FINISHED)
                journal.status = FINISHED
            except BaseException as error:
                journal.status, journal.reason = status_after(error)

                def close() -> None:
                    self.client.set_terminated(journal.run_id, journal.status)
                    self.client.set_tag(journal.run_id, "kdpipe.reason", journal.reason)

                journal.delivered = finishes_within(STOP_TIMEOUT, close)
                raise
            finally:
                if is_first and (journal.status == FINISHED or journal.delivered):
                    stack.callback(shutil.rmtree, folder, ignore_errors=True)

    def adopt(self, run: RunRecord, sweep_id: str, parent_id: str) -> None:
        """Add a finished run to a sweep."""
        with store_lock(self.uri):  # two sweeps may add it at once
            tags = self.client.get_run(run.id).data.tags
            sweeps = tags.get("kdpipe.sweep", "").split()
            if sweep_id not in sweeps:
                self.client.set_tag(run.id, "kdpipe.sweep", " ".join([*sweeps, sweep_id]))
            if "mlflow.parentRunId" not in tags:
                self.client.set_tag(run.id, "mlflow.parentRunId", parent_id)

    def _distinct_name(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """The name of a new run: if the experiment has another run of this name, such as a teacher of the same network
        at another size, with the settings in which they differ."""
        if not (quoted := _quoted(f"{name}%")):
            return name
        oldest_first = ["attributes.start_time ASC"]
        query = f"attributes.run_name LIKE {quoted}"
        found = self.client.search_runs([self.experiment_id], query, max_results=PAGE, order_by=oldest_first)
        identities = {run.info.run_name: run.data.tags.get("kdpipe.identity") for run in found}
        first = next((run.data for run in found if run.info.run_name == name), None)
        if first is None or identities[name] == tags.get("kdpipe.identity"):
            return name
        before, mine = what_matters(first.params), what_matters({key: str(value) for key, value in params.items()})
        keys = [key for key in mine if mine[key] != before.get(key, "None") and key not in ("seed", "model.name")]
        shown = [f"{key.removeprefix('model.')}={mine[key]}" for key in keys if len(mine[key]) <= MAX_SHOWN]
        named = " ".join([name, *shown[:MAX_DIFFERENCES]])
        is_taken = identities.get(named, tags.get("kdpipe.identity")) != tags.get("kdpipe.identity")
        return f"{named} {tags['kdpipe.identity']}" if is_taken else named

    def _token(self, before: Journal | None, run_id: str) -> str:
        """The CREATION_TOKEN of a run: that of the earlier journal, if it is about this run or about one that the store
        may still create."""
        is_same = before is not None and (before.uri, before.run_id) == (self.uri, run_id)
        token = before.tags.get(CREATION_TOKEN, "") if before and is_same else ""
        return token if token.startswith(f"{self.experiment_id}/") else new_token(self.experiment_id)

    def _create(self, journal: Journal, name: str, tags: Mapping[str, str]) -> None:
        """Create the run of a journal, whose CREATION_TOKEN is among the tags."""
        run = self.client.create_run(self.experiment_id, run_name=name, tags={**_origin(), **git_tags(), **tags})
        journal.run_id = run.info.run_id
        delete_duplicates(self.client, journal)

    def _log_params(self, run_id: str, params: Mapping[str, object]) -> None:
        # MLflow's params cannot change, and those that matter do not change in a resumed run.
        known = self.client.get_run(run_id).data.params
        new = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in params.items() if key not in known]
        for start in range(0, len(new), 100):  # at most so many at once
            self.client.log_batch(run_id, params=new[start : start + 100])

    def log_dataset(self, run_id: str, name: str, fingerprint: str, source: str, splits: Mapping[str, int]) -> None:
        """Log the images of a run as its MLflow dataset."""
        profile = json.dumps(dict(splits))
        # MLflow keeps one profile for each digest, so the digest has to depend on the splits too.
        digest = f"{fingerprint[:16]}-{hashlib.sha256(f'{source} {profile}'.encode()).hexdigest()[:8]}"
        dataset = Dataset(name, digest, "local", source, profile=profile)
        tags = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(run_id, [DatasetInput(dataset, tags)])

    def find_finished(self, tags: Mapping[str, str]) -> RunRecord | None:
        """The newest finished run of this experiment with these tags."""
        return next(self._search([self.experiment_id], tags, only_first=True), None)

    def find_sweep(self, sweep_id: str) -> RunRecord | None:
        """The parent run of a sweep, finished or not."""
        tags = {"kdpipe.stage": "sweep", "kdpipe.sweep": sweep_id}
        return next(self._search([self.experiment_id], tags, where=(), only_first=True), None)

    def find_teacher(self, params: Mapping[str, object], images: str) -> RunRecord | None:
        """The newest finished teacher run, in any experiment, with these params and images with this fingerprint."""
        experiments = [found.experiment_id for found in self._experiments()]
        for record in self._search(experiments, {"kdpipe.stage": "teacher", "kdpipe.data": images}, params):
            never_trained = record.params["train.epochs"] == "0" and record.params["model.weights"] == "None"
            if not never_trained:
                return record
        return None

    def finished_runs(self) -> list[RunRecord]:
        """All finished runs that kdpipe wrote to this experiment, newest first."""
        return list(self._search([self.experiment_id], where=(IS_FINISHED, "tags.`kdpipe.identity` != ''")))

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """The steps and values of a metric."""
        return [(point.step, point.value) for point in self.client.get_metric_history(run_id, metric)]

    def link(self, run_id: str) -> str:
        """URL of the run's page in the UI, among the pages for training."""
        return f"{self.ui}/#/experiments/{self.experiment_id}/runs/{run_id}?workflowType=machine_learning"

    def table_link(self, sweep_id: str = "") -> str:
        """URL of the table of the experiment's runs, or of a sweep's, with their accuracy, alpha, temperature and seed.
        MLflow keeps the columns of a shared table in a tag of the experiment."""
        key = f"kdpipe-{sweep_id}" if sweep_id else "kdpipe"
        state: dict[str, object] = {"selectedColumns": list(COLUMNS)}
        if sweep_id:
            state |= {"searchFilter": _in_sweep(sweep_id), "orderByKey": COLUMNS[0], "orderByAsc": False}
        with suppress(MlflowException):  # of a server where only others may set it: the table has its own columns then
            self.client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{key}", json.dumps(state))
        query = urlencode({"workflowType": "machine_learning", "viewStateShareKey": key})
        return f"{self.ui}/#/experiments/{self.experiment_id}/runs?{query}"

    def charts_link(self, sweep_id: str) -> str:
        """URL of the charts of a sweep's runs. MLflow's charts leave out nested runs; a filter and an order make the
        list flat."""
        query = {
            "workflowType": "machine_learning",
            "searchFilter": _in_sweep(sweep_id),
            "orderByKey": COLUMNS[0],  # any order but the default
            "orderByAsc": "false",
            "compareRunsMode": "CHART",
        }
        return f"{self.ui}/#/experiments/{self.experiment_id}/runs?{urlencode(query, quote_via=quote)}"

    def compare_link(self, run_ids: Sequence[str]) -> str:
        """URL of MLflow's comparison of runs, with parallel coordinates."""
        runs, experiments = (json.dumps(ids, separators=(",", ":")) for ids in (list(run_ids), [self.experiment_id]))
        query = {"runs": runs, "experiments": experiments}
        return f"{self.ui}/#/compare-runs?{urlencode(query, quote_via=quote)}"

    def _search(
        self,
        experiments: list[str],
        tags: Mapping[str, str] = MappingProxyType({}),
        params: Mapping[str, object] = MappingProxyType({}),
        where: Sequence[str] = (IS_FINISHED,),
        only_first: bool = False,
    ) -> Iterator[RunRecord]:
        """The runs with these tags and params that meet all conditions in `where`, newest first.

        MLflow's filters have no escapes, so a value that cannot be quoted is compared here.
        """
        wanted = {("tags", key): value for key, value in tags.items()}
        wanted |= {("params", key): str(value)[:MAX_PARAM_LENGTH] for key, value in params.items()}
        quoted = [f"{kind}.`{key}` = {text}" for (kind, key), value in wanted.items() if (text := _quoted(value))]

        def page(token: str | None) -> PagedList[mlflow.entities.Run]:
            return self.client.search_runs(
                experiments,
                " and ".join([*where, *quoted]),
                max_results=1 if only_first and len(quoted) == len(wanted) else PAGE,
                order_by=["attributes.end_time DESC"],
                page_token=token,
            )

        for record in map(record_of, _pages(page)):
            if all(getattr(record, kind).get(key) == value for (kind, key), value in wanted.items()):
                yield record

    def _experiments(self) -> Iterator[Experiment]:
        return _pages(lambda token: self.client.search_experiments(max_results=PAGE, page_token=token))


def _pages(page: Callable[[str | None], PagedList[T]]) -> Iterator[T]:
    """All items of a paged answer. `page` takes the token of a page, None for the first."""
    token = None
    while True:
        found = page(token)
        yield from found
        token = found.token
        if not token:
            return


def _in_sweep(sweep_id: str) -> str:
    """MLflow's filter for the runs of a sweep."""
    return f"tags.`kdpipe.sweep` LIKE '%{sweep_id}%' AND tags.`kdpipe.identity` != ''"


def status_after(error: BaseException) -> tuple[str, str]:
    """KILLED or FAILED, and the reason."""
    status = KILLED if isinstance(error, KeyboardInterrupt | SystemExit) else FAILED
    reason = flat(str(error)) or "interrupted"
    return status, f"{type(error).__name__}: {reason}"[:MAX_PARAM_LENGTH]


def finishes_within(seconds: float, work: Callable[[], None]) -> bool:
    """Do something that may hang or fail, and return whether it succeeded in time."""
    done = threading.Event()

    def quietly() -> None:
        with suppress(Exception):
            work()
            done.set()

    threading.Thread(target=quietly, daemon=True).start()
    return done.wait(seconds)


def git_tags() -> dict[str, str]:
    """The commit of the working folder, and whether code is uncommitted; empty where Git does not say."""
    try:
        import git
    except ImportError:  # which it raises where there is no git executable
        return {}
    try:
        with git.Repo(search_parent_directories=True) as repository:
            # New files other than code (outputs, exported models) change no run.
            new_code = repository.git.ls_files("--others", "--exclude-standard", "--", ":/*.py")
            is_dirty = repository.is_dirty() or bool(new_code)
            return {"git.commit": repository.head.commit.hexsha, "git.dirty": str(is_dirty).lower()}
    except (git.GitError, OSError, ValueError):  # no repository, or another owner's; ValueError: no commit yet
        return {}


def _origin() -> dict[str, str]:
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown"
    return {"mlflow.user": user, "mlflow.source.name": "kdpipe", "mlflow.source.type": "LOCAL"}


def _quoted(value: str) -> str | None:
    """A value in a filter; None where MLflow cannot parse it with either quote mark."""
    if "\\" in value or ("'" in value and '"' in value):
        return None
    return f'"{value}"' if "'" in value else f"'{value}'"
