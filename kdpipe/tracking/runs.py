"""A store's runs by their ids, whatever experiment they are of."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from kdpipe.runs.journal import FINISHED, now
from kdpipe.runs.names import ONE_THREAD, TIMED_ON, epoch_file
from kdpipe.runs.store import describe_error, server_address, uri_error, without_password
from kdpipe.tracking.sqlite import store_lock

log = logging.getLogger("kdpipe")

UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what MLflow says of a run that it does not have


@dataclass(frozen=True)
class RunRecord:
    """A run as MLflow knows it."""

    id: str
    name: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    ended: float  # seconds since 1970
    seconds: float  # that processes worked on it
    status: str = FINISHED


class RunStore:
    """An MLflow store, for what is done with runs that are named by their ids.

    Args:
        uri: of the store, as `store.store_uri` gives it.

    Attributes:
        name: the same, to be shown.

    Raises:
        ValueError: no store at `uri`.
    """

    def __init__(self, uri: str) -> None:
        # Alembic and MLflow tell in dozens of lines how they set up a new database.
        for name in ("alembic", "mlflow.tracking.fluent"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # With the traceback of each error that it raises, too.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self.uri, self.name = uri, without_password(uri)
        try:
            with store_lock(uri):
                self.client = self._opened()
        except Exception as error:  # MLflow lets the errors of SQLAlchemy, of drivers and of requests through
            raise uri_error(uri, f"this store cannot be opened ({describe_error(error)})") from error

    def _opened(self) -> mlflow.MlflowClient:
        client = mlflow.MlflowClient(tracking_uri=self.uri)
        client.search_experiments(max_results=1)  # it may be no store at all
        return client

    def attach(
        self, run_id: str, files: Mapping[str, bytes], tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        """Keep files as artifacts of a run, tags and metrics."""
        with TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self.client.log_artifacts(run_id, folder)
        for key, value in tags.items():
            self.set_tag(run_id, key, value)
        self.log_metrics(run_id, metrics, step=0)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of a run, finished or not; of two values at one step the later one counts."""
        self.client.log_batch(run_id, metrics=[Metric(name, value, now(), step) for name, value in metrics.items()])

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.client.set_tag(run_id, key, value)

    def get_run(self, run_id: str) -> RunRecord | None:
        """A run by its id, None where the store has no such run."""
        try:
            return record_of(self.client.get_run(run_id))
        except MlflowException as error:
            if error.error_code not in UNKNOWN:
                raise
            return None

    def artifacts(self, run_id: str) -> list[str]:
        """The names of the files that a run has kept."""
        return [file.path for file in self.client.list_artifacts(run_id)]

    @contextmanager
    def downloaded(self, run_id: str, name: str, key: str) -> Iterator[Path]:
        """A file that a run has kept, as a local one for the time of the block.

        Raises:
            ValueError: no such run, or one that has not kept this file.
        """
        with TemporaryDirectory() as folder:
            file = self._download(run_id, name, key, folder)
            try:
                yield file
            except ValueError as error:  # of what is in it
                raise ValueError(str(error).replace(str(file), f"runs:/{run_id}/{name}")) from error

    def _download(self, run_id: str, name: str, key: str, folder: str) -> Path:
        try:
            place = self.client.get_run(run_id).info.artifact_uri
            is_local = place.startswith(("file:", "/"))
            file = mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=name, tracking_uri=self.uri, dst_path=None if is_local else folder
            )
            return Path(file)
        except (MlflowException, OSError) as error:
            if self.get_run(run_id):
                alike = [file for file in self.artifacts(run_id) if Path(file).suffix == Path(name).suffix]
                there = ", ".join(sorted(alike, key=lambda file: (len(file), file)))  # epoch_5 before epoch_10
                problem = f"this run has no {name}, but {there}" if there else f"this run has no {name}"
            else:
                problem = f"there is no such run in {self.name}"
            raise ValueError(
                f"{key}=runs:/{run_id}: {problem}; the id of a finished run is accepted, runs:/<run id>"
            ) from error

    def read(self, run_id: str, name: str) -> bytes | None:
        """What is in a file that a run has kept; None where it has no such file, or the file cannot be read now."""
        try:
            if name not in self.artifacts(run_id):
                return None
            with TemporaryDirectory() as folder:  # of a server's file a copy is made
                file = mlflow.artifacts.download_artifacts(
                    run_id=run_id, artifact_path=name, tracking_uri=self.uri, dst_path=folder
                )
                return Path(file).read_bytes()
        except (MlflowException, OSError) as error:
            log.warning("run %s: %s cannot be read (%s)", run_id, name, str(error).split("\n")[0])
            return None

    def restore(self, run_id: str, folder: Path) -> None:
        """Put a run's files into its folder, where a later run of the same identity may have been: all but the weights
        of its epochs, of which the later run has its own."""
        names = [file.path for file in self.client.list_artifacts(run_id) if not file.is_dir]
        for name in names:
            if fnmatch(name, epoch_file("*")):
                continue
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=name, tracking_uri=self.uri, dst_path=str(folder)
            )

    @property
    def ui(self) -> str:
        """The UI: the server's, or the one that `make ui` starts."""
        if not self.uri.startswith("http"):
            return "http://127.0.0.1:5000"
        return server_address(self.uri)  # a browser asks for name and password


def record_of(run: mlflow.entities.Run) -> RunRecord:
    ended = (run.info.end_time or 0) / 1000
    metrics = dict(run.data.metrics)
    if not run.data.tags.get(TIMED_ON, "cpu").startswith("cpu"):  # those are of an earlier timing, on a CPU
        metrics = {name: value for name, value in metrics.items() if not name.endswith(ONE_THREAD)}
    return RunRecord(
        id=run.info.run_id,
        name=run.info.run_name or "",
        params=dict(run.data.params),
        metrics=metrics,
        tags=dict(run.data.tags),
        ended=ended,
        # A run that was interrupted says how long it was worked on; else it is from the start to the end.
        seconds=float(run.data.tags.get("kdpipe.seconds", ended - run.info.start_time / 1000)),
        status=run.info.status,
    )
