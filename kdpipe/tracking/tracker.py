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
from urllib.parse import quote, urlencode

import mlflow
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Param
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList
from sqlalchemy import create_engine, text

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
from kdpipe.runs.moved_store import correct_artifacts
from kdpipe.runs.sqlite_address import sqlite_file, write_problem
from kdpipe.runs.store_address import describe_error, is_server
from kdpipe.settings.addresses import WEIGHTS
from kdpipe.settings.errors import ConfigError, flat
from kdpipe.settings.identity import what_matters
from kdpipe.system.interruption import StoppedEarlyError, postponed
from kdpipe.tracking.delivery import (
    STOP_TIMEOUT,
    ActiveRun,
    Recovery,
    delete_duplicates,
    deletion,
    new_token,
    restore_command,
)
from kdpipe.tracking.run_store import PAGE, UNKNOWN_RUN, RunRecord, RunStore, pages, record_of
from kdpipe.tracking.server import NAME
from kdpipe.tracking.sqlite import set_aside_half_made, store_lock

MAX_PARAM_LENGTH = 6000  # MLflow's own limit
DEFAULT = "0"  # id of the experiment that every store has
MAX_DIFFERENCES, MAX_SHOWN = 3, 20  # settings in the name of a run, and characters of each
# Of the table of runs that we link to; more would not fit on a screen.
COLUMNS = (
    *("metrics.`selected/accuracy`", "metrics.`test/accuracy`", "params.`loss.alpha`", "params.`loss.temperature`"),
    *("params.`seed`", "params.`model.name`"),
)
IS_FINISHED = "attributes.status = 'FINISHED'"

FAR = ("dataset.name", "kdpipe.data", "model.name")  # what sets a teacher apart from the one that is wanted

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
            problem = f"this experiment was deleted; {restore_command(self.name, found)} brings it back"
            raise ConfigError("tracking.experiment", experiment, problem=problem)
        self.experiment_id: str = found.experiment_id
        self._recovery = Recovery({self.name: self.client})

    def _opened(self) -> mlflow.MlflowClient:
        correct_artifacts(self.uri, self._artifacts)
        if not self._create_missing:
            return super()._opened()
        set_aside_half_made(self.uri)
        if (file := sqlite_file(self.uri)) and (problem := write_problem(file)):
            raise ValueError(problem)
        with self._permitted():
            return self._created(mlflow.MlflowClient(tracking_uri=self.uri))

    @contextmanager
    def _permitted(self) -> Iterator[None]:
        """Say what it is about where a server does not permit something."""
        try:
            yield
        except MlflowException as error:
            if error.error_code != "PERMISSION_DENIED":
                raise
            who = os.environ.get(NAME, "this user")
            problem = f"{who} has no permission in {self.name} ({describe_error(error)})"
            raise ConfigError("tracking.experiment", self.experiment, problem=problem) from error

    def _created(self, client: mlflow.MlflowClient) -> mlflow.MlflowClient:
        """A client of a store that has the experiment."""
        location = None if is_server(self.uri) else self._artifacts.resolve().as_uri()
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                client.create_experiment(self.experiment, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process has created it, on a server
                    raise
        elif location and found.experiment_id == DEFAULT and found.artifact_location.endswith(f"/mlruns/{DEFAULT}"):
            self._move_default(found.artifact_location, location)
        return client

    def _move_default(self, before: str, location: str) -> None:
        """Put the artifacts of the experiment Default where those of others are. MLflow creates it with the database,
        for a folder in the one where that happens to be, and has no function to change that."""
        engine = create_engine(self.uri)
        with engine.begin() as database:
            move = "UPDATE experiments SET artifact_location = :location WHERE artifact_location = :before"
            database.execute(text(move), {"location": location, "before": before})
        engine.dispose()

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
        known = run_id if run_id and self._is_active(run_id) else NOT_CREATED
        if known == NOT_CREATED and "kdpipe.sweep" not in tags:  # whose runs are named by its axes
            name = self._distinct_name(name, params, tags)
        before, rows = Journal.read(folder), list(history)
        if before and before.uri != self.name and not before.delivered:
            left = before.run_id or folder.name
            log.warning("run %s continues in %s; %s will not have the rest of it", left, self.name, before.uri)
        tokened = {**tags, CREATION_TOKEN: self._token(before, known)}
        times = before.times[: len(rows)] if before and before.run_id == run_id else []
        times += [now()] * (len(rows) - len(times))
        run = journal = None
        try:
            with postponed():  # the folder has to know each run that is created in the store
                opened = Journal(folder, self.name, known, tokened, seconds=seconds, times=times)
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

    def _is_active(self, run_id: str | None) -> bool:
        """Whether the experiment has this run, and it is not deleted."""
        if not run_id:
            return False
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
                journal = Journal(folder, self.name, found.id if found else NOT_CREATED, token)
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
                if isinstance(error, MlflowException) and (deleted := deletion(self.client, journal)):
                    raise ValueError(f"the sweep's {deleted}") from error
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
            if not self._is_active(tags.get("mlflow.parentRunId")):
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
        is_same = before is not None and (before.uri, before.run_id) == (self.name, run_id)
        token = before.tags.get(CREATION_TOKEN, "") if before and is_same else ""
        return token if token.startswith(f"{self.experiment_id}/") else new_token(self.experiment_id)

    def _create(self, journal: Journal, name: str, tags: Mapping[str, str]) -> None:
        """Create the run of a journal, whose CREATION_TOKEN is among the tags."""
        with self._permitted():
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
        found = self._search(experiments, {"kdpipe.stage": "teacher", "kdpipe.data": images}, params)
        return next(filter(_has_learned, found), None)

    def nearest_teacher(self, params: Mapping[str, object], images: str) -> tuple[RunRecord, dict[str, str]] | None:
        """The finished teacher run that differs least from these params and images with this fingerprint, the newest of
        several; and its own values of what differs, `kdpipe.data` for the fingerprint."""
        experiments = [found.experiment_id for found in self._experiments()]
        near = []
        for record in filter(_has_learned, self._search(experiments, {"kdpipe.stage": "teacher"})):
            own = {key: record.params.get(key, "None") for key in params}
            differing = {key: value for key, value in own.items() if value != str(params[key])[:MAX_PARAM_LENGTH]}
            if record.tags.get("kdpipe.data") != images:
                differing["kdpipe.data"] = record.tags.get("kdpipe.data", "")
            near.append((record, differing))
        # Other images are farther than another network, and that is farther than other settings of the same.
        return min(near, key=lambda found: (*(key in found[1] for key in FAR), len(found[1])), default=None)

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

        for record in map(record_of, pages(page)):
            if all(getattr(record, kind).get(key) == value for (kind, key), value in wanted.items()):
                yield record

    def _experiments(self) -> Iterator[Experiment]:
        return pages(lambda token: self.client.search_experiments(max_results=PAGE, page_token=token))


def _has_learned(record: RunRecord) -> bool:
    """Whether a run's network has seen images: not where random weights were only evaluated."""
    return record.params["train.epochs"] != "0" or record.params["model.weights"] != "None"


def _in_sweep(sweep_id: str) -> str:
    """MLflow's filter for the runs of a sweep."""
    return f"tags.`kdpipe.sweep` LIKE '%{sweep_id}%' AND tags.`kdpipe.identity` != ''"


def status_after(error: BaseException) -> tuple[str, str]:
    """KILLED or FAILED, and the reason."""
    status = KILLED if isinstance(error, KeyboardInterrupt | SystemExit | StoppedEarlyError) else FAILED
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
