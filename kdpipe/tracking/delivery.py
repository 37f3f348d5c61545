"""From a run's folder to the store: told twice is as good as told once."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from kdpipe.runs.journal import (
    BEGUN,
    FINISHED,
    KILLED,
    NOT_YET,
    RUNNING,
    Journal,
    Row,
    append_row,
    has_row,
    now,
    read_rows,
    sync_command,
)
from kdpipe.runs.store import check_uri, describe_error

log = logging.getLogger("kdpipe")

AT_THE_END = 30.0  # seconds that a finished run waits for the store
IN_A_HURRY = 4.0  # where somebody waits for the process to end
PAUSES = (1, 2, 4, 8, 15)  # seconds between attempts
# Of MLflow: what will not be another time.
FINAL = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")


class Run:
    """The run in progress. What it is told stands in its folder when the call returns, and reaches the store later."""

    def __init__(self, client: MlflowClient, journal: Journal, rows: list[Row]) -> None:
        self.id = journal.run_id
        self.folder = journal.folder
        self.rows = rows
        self._journal = journal
        self._delivery = Delivery(client, journal, rows)
        self._started = time.monotonic() - journal.seconds

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a line to metrics.jsonl, unless an earlier process that came to this step did.

        Raises:
            ValueError: the store refuses what it was told before, and would refuse it again.
        """
        if not has_row(self.rows, step, metrics):
            row = {"step": step, **metrics}
            append_row(self.folder, row)
            self.rows.append(row)
            self._journal.times.append(now())
        self._delivery.raise_refusal()

    def deliver(self) -> None:
        """Let all that was logged stand, and have the store told: a process that goes on will not log it again."""
        self._journal.released, self._journal.seconds = len(self.rows), self.seconds
        self._journal.write()
        self._delivery.wake()

    def save(self, file: Path) -> None:
        """Keep a file of the run's folder as an artifact."""
        if file.name not in self._journal.files:
            self._journal.files.append(file.name)
            self._journal.write()
        self._delivery.wake()

    @property
    def seconds(self) -> float:
        """How long processes have worked on this run, without the time between them."""
        return time.monotonic() - self._started

    def end(self, status: str, reason: str = "") -> None:
        """Close the run, once, and wait a little for the store to have it all; else say how it gets it later.

        Raises:
            OSError: the disk does not take that it is FINISHED.
        """
        if self._journal.status != RUNNING:
            return
        self._journal.seconds = self.seconds
        if status == FINISHED:
            self._journal.released = len(self.rows)
        self._journal.end(status, reason)
        if not self._delivery.finish(AT_THE_END if status == FINISHED else IN_A_HURRY):
            log.warning(
                "%s has not got all of this run%s; %s has, and this delivers it: %s",
                self._journal.store,
                self._delivery.why_not(),
                self.folder,
                sync_command(self.folder),
            )


class Delivery:
    """Tells the store what a journal and its rows have, in a thread of its own, until it has it all."""

    def __init__(self, client: MlflowClient, journal: Journal, rows: list[Row]) -> None:
        self._client, self._journal, self._rows = client, journal, rows
        self._told = Told()
        self._state = threading.Condition()
        self._work = self._ending = self._done = self._given_up = False
        self._failures = 0
        self._refusal: Exception | None = None
        threading.Thread(target=self._run, name="kdpipe-delivery", daemon=True).start()

    def wake(self) -> None:
        """Tell the store of the files that there are, and of the rows that stand."""
        with self._state:
            self._work = True
            self._state.notify_all()

    def finish(self, patience: float) -> bool:
        """Tell the store how the run ended, and no more after that.

        Returns:
            Whether the store has it all, within so many seconds; earlier where it is known not to answer.
        """
        with self._state:
            known_as_down = self._failures > 0
            self._failures = 0
            self._work = self._ending = True
            self._state.notify_all()
            try:
                self._state.wait_for(
                    lambda: self._done or self._refusal or self._failures > (0 if known_as_down else 1), patience
                )
            finally:
                self._given_up = True  # the folder may be another process's from now on
                self._state.notify_all()
            return self._done

    def why_not(self) -> str:
        return f" ({describe_error(self._refusal)})" if self._refusal else ""

    def raise_refusal(self) -> None:
        if self._refusal:
            raise ValueError(f"MLflow refuses this run's data: {describe_error(self._refusal)}") from self._refusal

    def _run(self) -> None:
        silent = False
        while True:
            with self._state:
                self._state.wait_for(lambda: self._work)
                if self._given_up:
                    return
                self._work = False
                rows, ending = self._rows[: self._journal.released], self._ending
            try:
                deliver(self._client, self._journal, rows, self._told, lambda: not self._given_up, ending)
            except Exception as error:  # of MLflow, SQLAlchemy, drivers, requests
                if is_final(error):
                    with self._state:
                        self._refusal = error
                        self._state.notify_all()
                    return
                if not silent:
                    log.warning(
                        "%s does not take metrics now (%s): training goes on, they are kept and told later",
                        self._journal.store,
                        describe_error(error),
                    )
                silent = True
                with self._state:
                    self._failures += 1
                    self._work = True
                    self._state.notify_all()
                    pause = PAUSES[min(self._failures, len(PAUSES)) - 1]
                    if ending:
                        self._state.wait(pause)
                    else:
                        self._state.wait_for(lambda: self._ending, pause)
                continue
            if silent:
                log.info("%s is back, and has what it missed", self._journal.store)
            silent = False
            with self._state:
                self._failures = 0
                if ending and not self._given_up:
                    self._journal.settled()
                    self._done = True
                    self._state.notify_all()
                    return


class Told:
    """What this process has told the store, or found there."""

    def __init__(self) -> None:
        self.rows: int | None = None  # how many; None before the store was asked
        self.files: set[str] = set()


def deliver(
    client: MlflowClient, journal: Journal, rows: list[Row], told: Told, wanted: Callable[[], bool], closing: bool
) -> None:
    """Tell the store what it does not know yet of a run: rows, files and, where it is `closing`, how it ended.

    Args:
        wanted: whether to go on.

    Raises:
        Exception: whatever MLflow raises; some of it may have been told.
    """
    times = journal.times + [now()] * (len(rows) - len(journal.times))
    if told.rows is None:
        told.rows = rows_known(client, journal.run_id, rows)
    for number in range(told.rows, len(rows)):
        if not wanted():
            return
        row = rows[number]
        metrics = [
            Metric(name, float(value), times[number], int(row["step"])) for name, value in row.items() if name != "step"
        ]
        client.log_batch(journal.run_id, metrics=metrics)
        told.rows = number + 1
    for name in [name for name in journal.files if name not in told.files]:
        if not wanted():
            return
        if (journal.folder / name).exists():
            client.log_artifact(journal.run_id, str(journal.folder / name))
        else:
            log.warning("%s is gone: MLflow does not get it", journal.folder / name)
        told.files.add(name)
    if closing:
        if wanted():
            remove_doubles(client, journal)
        tags = {"kdpipe.seconds": f"{journal.seconds:.1f}", "kdpipe.reason": journal.reason}
        for key, value in tags.items():
            if value and wanted():
                client.set_tag(journal.run_id, key, value)
        if wanted():
            client.set_terminated(journal.run_id, journal.status, end_time=journal.ended)


def rows_known(client: MlflowClient, run_id: str, rows: Sequence[Row]) -> int:
    """How many of the rows the store has, which is told them in turn."""
    steps: dict[str, set[int]] = {}
    for number, row in enumerate(rows):
        name = next(key for key in row if key != "step")
        if name not in steps:
            steps[name] = {point.step for point in client.get_metric_history(run_id, name)}
        if row["step"] not in steps[name]:
            return number
    return len(rows)


def begun_token(experiment_id: str) -> str:
    """A new token for BEGUN, which says in what experiment the run with this tag is."""
    return f"{experiment_id}/{uuid4().hex}"


def remove_doubles(client: MlflowClient, journal: Journal) -> None:
    """Delete the runs that the store began beside the journal's: MLflow's client asks again where a server died or
    hung before it answered, and the server may carry out both requests, the first one long after."""
    if token := journal.tags.get(BEGUN):
        for run_id in runs_begun(client, token):
            if run_id != journal.run_id:
                client.delete_run(run_id)


def runs_begun(client: MlflowClient, token: str) -> list[str]:
    """The ids of the runs whose BEGUN is this token, the first one first."""
    experiment = token.partition("/")[0]
    runs = client.search_runs([experiment], f"tags.`{BEGUN}` = '{token}'", order_by=["attributes.start_time ASC"])
    return [run.info.run_id for run in runs]


def is_final(error: Exception) -> bool:
    """Whether the store will refuse the same again: it is there, and does not want it."""
    return isinstance(error, MlflowException) and error.error_code in FINAL


class Stores:
    """Clients of the stores that journals name; a store that did not answer is not asked again."""

    def __init__(self, known: Mapping[str, MlflowClient] | None = None) -> None:
        self._clients = dict(known or {})
        self._problems: dict[str, str] = {}

    def settle(self, folder: Path) -> str:
        """Put right what a process left in a run's folder when it died or could not reach the store; the folder is
        locked by the caller.

        Returns:
            Why the store does not take what the folder has; "" where it has it all.
        """
        journal = Journal.read(folder)
        if journal is None or journal.delivered:
            return ""
        if journal.status == RUNNING:
            journal.end(KILLED, "its process is gone")
            log.info(
                "run %s was left unfinished by a process that is gone: it is KILLED", journal.run_id or folder.name
            )
        uri = journal.uri
        try:
            if uri not in self._problems and uri not in self._clients:
                check_there(uri)
                self._clients[uri] = MlflowClient(tracking_uri=uri)
            if uri not in self._problems:
                if journal.run_id == NOT_YET:
                    journal.run_id = next(iter(runs_begun(self._clients[uri], journal.tags[BEGUN])), NOT_YET)
                if journal.run_id == NOT_YET:  # there is nothing to tell of it
                    journal.settled()
                    return ""
                rows = read_rows(folder)[: journal.released]
                deliver(self._clients[uri], journal, rows, Told(), lambda: True, closing=True)
                journal.settled()
                return ""
        except Exception as error:  # as in `Delivery`
            if is_final(error):  # such as a run that was deleted there: the folder keeps it, and may go on in a new one
                journal.delivered = True
                journal.write()
                return f"{journal.store} refuses what this run has, for good ({describe_error(error)})"
            self._problems[uri] = describe_error(error)
        return f"{journal.store} does not take what this run has ({self._problems[uri]})"


def check_there(uri: str) -> None:
    """Raise ValueError for a store that does not answer, or a sqlite file that is gone: a new one would be made."""
    check_uri(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ValueError("there is no such file")
