"""Delivery of a run's folder to its MLflow store. Sending anything twice changes nothing."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric
from mlflow.exceptions import MlflowException

from kdpipe.runs.journal import (
    CREATION_TOKEN,
    FINISHED,
    KILLED,
    NOT_CREATED,
    RUNNING,
    Journal,
    Row,
    append_row,
    has_row,
    now,
    read_rows,
    sync_command,
)
from kdpipe.runs.names import CHARTED
from kdpipe.runs.sqlite_address import sqlite_file
from kdpipe.runs.store_address import describe_error, in_store, store_uri
from kdpipe.tracking.server import check_store, signed_in

log = logging.getLogger("kdpipe")

FINISH_TIMEOUT = 30.0  # seconds that a finished run waits for the store
STOP_TIMEOUT = 4.0  # the same for a run that was stopped or failed
RETRY_PAUSES = (1, 2, 4, 8, 15)  # seconds between attempts
PERMANENT_ERRORS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")  # of MLflow


class ActiveRun:
    """The run in progress. What it logs is in its folder when the call returns, and reaches the store later."""

    def __init__(self, client: MlflowClient, journal: Journal, rows: list[Row]) -> None:
        self.id = journal.run_id
        self.folder = journal.folder
        self.rows = rows
        self._journal = journal
        self._delivery = Delivery(client, journal, rows)
        self._started = time.monotonic() - journal.seconds

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a line to metrics.jsonl, unless an earlier process that got to this step has done so.

        Raises:
            ValueError: the store refused earlier metrics for good.
        """
        if not has_row(self.rows, step, metrics):
            row = {"step": step, **metrics}
            append_row(self.folder, row)
            self.rows.append(row)
            self._journal.times.append(now())
        self._delivery.raise_refusal()

    def commit(self) -> None:
        """Make what was logged so far final and deliver it: a process that resumes the run will not log it again."""
        self._journal.released, self._journal.seconds = len(self.rows), self.seconds
        self._journal.write()
        self._delivery.wake()

    def save(self, file: Path) -> None:
        """Store a file of the run's folder as an artifact."""
        if file.name not in self._journal.files:
            self._journal.files.append(file.name)
            self._journal.write()
        self._delivery.wake()

    @property
    def seconds(self) -> float:
        """How long processes have worked on this run, without the time between them."""
        return time.monotonic() - self._started

    def end(self, status: str, reason: str = "") -> None:
        """Close the run, once, and wait for the store for a while; log how to deliver what it still lacks.

        Raises:
            OSError: FINISHED could not be written to disk.
        """
        if self._journal.status != RUNNING:
            return
        self._journal.seconds = self.seconds
        if status == FINISHED:
            self._journal.released = len(self.rows)
        self._journal.end(status, reason)
        if self._delivery.finish(FINISH_TIMEOUT if status == FINISHED else STOP_TIMEOUT):
            return
        if deleted := self._delivery.deleted:
            log.warning("%s has all of this run: %s", self.folder, deleted)
        else:
            log.warning(
                "%s does not have all of this run%s; %s does, and this command delivers it: %s",
                self._journal.uri,
                self._delivery.refusal_reason(),
                self.folder,
                sync_command(self.folder),
            )


class _Stage(Enum):
    """Of a delivery; after the first two its thread ends."""

    OPEN = auto()
    CLOSING = auto()  # the run has ended, and the rest is being delivered
    DELIVERED = auto()
    REFUSED = auto()  # the store will never take it
    ABANDONED = auto()  # `finish` has given up


class Delivery:
    """Sends a journal and its rows to the store from a thread of its own, and retries until the store has it all."""

    def __init__(self, client: MlflowClient, journal: Journal, rows: list[Row]) -> None:
        self._client, self._journal, self._rows = client, journal, rows
        self._known = Known()
        self._changed = threading.Condition()  # guards what follows
        self._stage = _Stage.OPEN
        self._pending = False
        self._failures = 0
        self._refusal: Exception | None = None
        self.deleted = ""  # what became of a run that is deleted, which the store may get back
        threading.Thread(target=self._run, name="kdpipe-delivery", daemon=True).start()

    def wake(self) -> None:
        """Deliver the files and the rows that are final by now."""
        with self._changed:
            self._pending = True
            self._changed.notify_all()

    def finish(self, patience: float) -> bool:
        """Deliver the rest and how the run ended, and nothing afterwards.

        Args:
            patience: seconds to wait. A store that is known to be down gets one more attempt.

        Returns:
            Whether the store has everything.
        """
        with self._changed:
            attempts = 1 if self._failures else 2
            self._failures = 0
            if self._stage is _Stage.OPEN:
                self._move(_Stage.CLOSING)
            try:
                self._changed.wait_for(
                    lambda: self._stage is not _Stage.CLOSING or self._failures >= attempts, patience
                )
            finally:
                if self._stage is _Stage.CLOSING:  # another process may own the folder from now on
                    self._move(_Stage.ABANDONED)
            return self._stage is _Stage.DELIVERED

    def refusal_reason(self) -> str:
        return f" ({describe_error(self._refusal)})" if self._refusal else ""

    def raise_refusal(self) -> None:
        if self._refusal:
            raise ValueError(f"MLflow refuses this run's data: {describe_error(self._refusal)}") from self._refusal

    def _move(self, stage: _Stage) -> None:
        with self._changed:
            self._stage = stage
            self._changed.notify_all()

    def _run(self) -> None:
        is_down = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._stage is not _Stage.OPEN)
                stage = self._stage
                if stage not in (_Stage.OPEN, _Stage.CLOSING):
                    return
                self._pending = False
                rows = self._rows[: self._journal.released]
            try:
                for _ in send(self._client, self._journal, rows, self._known, stage is _Stage.CLOSING):
                    if self._stage not in (_Stage.OPEN, _Stage.CLOSING):
                        return
            except Exception as error:  # of MLflow, SQLAlchemy, drivers, requests
                self.deleted = deletion(self._client, self._journal) if is_permanent(error) else ""
                if is_permanent(error) and not self.deleted:
                    self._refusal = error
                    self._move(_Stage.REFUSED)
                    return
                if self.deleted and not is_down:
                    log.warning("training continues, though its %s", self.deleted)
                elif not is_down:
                    log.warning(
                        "%s is not taking metrics (%s): training continues, and they are delivered later",
                        self._journal.uri,
                        describe_error(error),
                    )
                is_down = True
                self._pause(stage)
                continue
            if is_down:
                log.info("%s is back, and has what it missed", self._journal.uri)
            is_down, self.deleted = False, ""
            with self._changed:
                self._failures = 0
                if stage is self._stage is _Stage.CLOSING:
                    self._journal.mark_delivered()
                    self._move(_Stage.DELIVERED)

    def _pause(self, stage: _Stage) -> None:
        """After a failure, wait for the next attempt: at most until the next stage."""
        with self._changed:
            self._failures += 1
            self._pending = True
            self._changed.notify_all()
            pause = RETRY_PAUSES[min(self._failures, len(RETRY_PAUSES)) - 1]
            self._changed.wait_for(lambda: self._stage is not stage, pause)


@dataclass
class Known:
    """What the store is known to have of a run."""

    rows: int | None = None  # how many; None before the store was asked
    files: set[str] = field(default_factory=set)


def send(client: MlflowClient, journal: Journal, rows: list[Row], known: Known, closing: bool) -> Iterator[None]:
    """Send what the store lacks of a run: rows, files and, where it is `closing`, how it ended.

    Yields before each request: a caller that stops there sends no more.

    Raises:
        Exception: whatever MLflow raises; part of it may have been sent.
    """
    times = journal.times + [now()] * (len(rows) - len(journal.times))
    by_epoch = rows[0].keys() if rows and "train/loss" in rows[0] else ()
    if known.rows is None:
        known.rows = count_rows(client, journal.run_id, rows)
    for number in range(known.rows, len(rows)):
        yield
        row = rows[number]
        values = {name: value for name, value in row.items() if name != "step"}
        values |= {CHARTED[name]: row[name] for name in CHARTED if name in row and name in by_epoch}
        metrics = [Metric(name, float(value), times[number], int(row["step"])) for name, value in values.items()]
        client.log_batch(journal.run_id, metrics=metrics)
        known.rows = number + 1
    for name in [name for name in journal.files if name not in known.files]:
        yield
        if (journal.folder / name).exists():
            client.log_artifact(journal.run_id, str(journal.folder / name))
        else:
            log.warning("%s is missing: MLflow does not get it", journal.folder / name)
        known.files.add(name)
    if closing:
        yield
        delete_duplicates(client, journal)
        for key, value in {"kdpipe.seconds": f"{journal.seconds:.1f}", "kdpipe.reason": journal.reason}.items():
            if value:
                yield
                client.set_tag(journal.run_id, key, value)
        yield
        client.set_terminated(journal.run_id, journal.status, end_time=journal.ended)


def count_rows(client: MlflowClient, run_id: str, rows: Sequence[Row]) -> int:
    """How many of the rows the store has; they are sent in order."""
    steps: dict[str, set[int]] = {}
    for number, row in enumerate(rows):
        name = next(key for key in row if key != "step")
        if name not in steps:
            steps[name] = {point.step for point in client.get_metric_history(run_id, name)}
        if row["step"] not in steps[name]:
            return number
    return len(rows)


def new_token(experiment_id: str) -> str:
    """A new CREATION_TOKEN, which names the experiment of its run."""
    return f"{experiment_id}/{uuid4().hex}"


def delete_duplicates(client: MlflowClient, journal: Journal) -> None:
    """Delete other runs with the journal's token. MLflow's client repeats a request when a server dies or hangs before
    it answers, and the server may carry out both, the first one long after."""
    if token := journal.tags.get(CREATION_TOKEN):
        for run_id in runs_with_token(client, token):
            if run_id != journal.run_id:
                client.delete_run(run_id)


def runs_with_token(client: MlflowClient, token: str) -> list[str]:
    """The ids of the runs with this CREATION_TOKEN, oldest first."""
    experiment = token.partition("/")[0]
    runs = client.search_runs(
        [experiment], f"tags.`{CREATION_TOKEN}` = '{token}'", order_by=["attributes.start_time ASC"]
    )
    return [run.info.run_id for run in runs]


def is_permanent(error: Exception) -> bool:
    """Whether the store answered and would refuse the same again."""
    return isinstance(error, MlflowException) and error.error_code in PERMANENT_ERRORS


def deletion(client: MlflowClient, journal: Journal) -> str:
    """What became of a run that was deleted in the store, and how to get it back; "" where it was not."""
    try:
        run = client.get_run(journal.run_id).info
        if run.lifecycle_stage != "deleted":
            return ""
        back = restore_command(journal.uri, client.get_experiment(run.experiment_id), journal.run_id)
    except Exception as error:  # as in `Delivery`
        if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
            return ""
        return f"run {journal.run_id} no longer exists in {journal.uri}; its command makes a new run of what is here"
    return (
        f"run {journal.run_id} was deleted in {journal.uri}; {back} brings it back, then "
        f"{sync_command(journal.folder)} delivers the rest; without that, its command makes a new run of what is here"
    )


def restore_command(uri: str, experiment: Experiment, run_id: str = "") -> str:
    """The command that brings back a deleted experiment with its runs, or one of these. It may be run in a shell where
    MLFLOW_TRACKING_URI is another store."""
    restore = f"runs restore --run-id {run_id}"
    if experiment.lifecycle_stage == "deleted":
        restore = f"experiments restore -x {experiment.experiment_id}"
    return in_store(uri, f"mlflow {restore}")


class Recovery:
    """Delivers what dead or disconnected processes left behind. A store that did not answer is not asked again.

    Args:
        clients: of stores that are open already, by their URIs.
    """

    def __init__(self, clients: Mapping[str, MlflowClient] | None = None) -> None:
        self._clients = dict(clients or {})
        self._problems: dict[str, str] = {}

    def recover(self, folder: Path) -> str:
        """Deliver the rest of a run whose process is gone, from its folder, which the caller has locked.

        Returns:
            Why the store does not take it; "" where it has everything.
        """
        journal = Journal.read(folder)
        if journal is None or journal.delivered:
            return ""
        if journal.status == RUNNING:
            journal.end(KILLED, "its process is gone")
            log.info("run %s: its process is gone, so it is marked KILLED", journal.run_id or folder.name)
        if journal.uri in self._clients:
            return self._deliver(journal, self._clients[journal.uri])
        if journal.uri not in self._problems:
            try:
                with signed_in(_existing(journal.uri)) as address:
                    return self._deliver(journal, MlflowClient(tracking_uri=address))
            except ValueError as error:
                self._problems[journal.uri] = describe_error(error)
        return f"{journal.uri} does not take this run's data ({self._problems[journal.uri]})"

    def _deliver(self, journal: Journal, client: MlflowClient) -> str:
        try:
            if journal.run_id == NOT_CREATED:
                created = runs_with_token(client, journal.tags[CREATION_TOKEN])
                journal.run_id = next(iter(created), NOT_CREATED)
            if journal.run_id != NOT_CREATED:
                rows = read_rows(journal.folder)[: journal.released]
                for _ in send(client, journal, rows, Known(), closing=True):
                    pass
            journal.mark_delivered()
            return ""
        except Exception as error:  # as in `Delivery`
            if is_permanent(error):
                if deleted := deletion(client, journal):
                    return deleted
                journal.delivered = True
                journal.write()
                return f"{journal.uri} refuses this run's data for good ({describe_error(error)})"
            self._clients.pop(journal.uri, None)
            self._problems[journal.uri] = describe_error(error)
            return f"{journal.uri} does not take this run's data ({self._problems[journal.uri]})"


def _existing(uri: str) -> str:
    """The whole URI of a store that answers. Raises ValueError for another one, and for a missing sqlite file: MLflow
    would create a new one."""
    uri = store_uri(uri, Path())
    check_store(uri)
    if (file := sqlite_file(uri)) and not file.is_file():
        raise ValueError("no such file")
    return uri
