"""An MLflow store, whose runs are read and extended by their ids, in any experiment."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import mlflow
from mlflow.entities import Metric, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from kdpipe.runs.journal import FINISHED, now
from kdpipe.runs.moved_store import is_local_address
from kdpipe.runs.names import CHARTED, ONE_THREAD, TIMED_ON
from kdpipe.runs.store_address import describe_error, is_server, uri_error
from kdpipe.settings.addresses import epoch_file
from kdpipe.settings.credentials import without_password
from kdpipe.settings.errors import ConfigError, first_line
from kdpipe.tracking.server import check_store, sign_in, wait_for_store
from kdpipe.tracking.sqlite import store_lock

T = TypeVar("T")

log = logging.getLogger("kdpipe")

PAGE = 1000
UNKNOWN_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # error codes of MLflow


@dataclass(frozen=True)
class RunRecord:
    """A run as it is in MLflow."""

    id: str
    name: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    ended: float  # seconds since 1970
    seconds: float  # of work
    status: str = FINISHED


class RunStore:
    """An MLflow store, for work on runs by their ids.

    Args:
        uri: of the store, from `store_address.store_uri`.

    Attributes:
        name: the URI without its password.
        uri: as MLflow's client takes it, from `server.sign_in`.

    Raises:
        ConfigError: the store cannot be opened.
    """

    def __init__(self, uri: str) -> None:
        # Alembic and MLflow log dozens of lines about setting up a new database.
        for name in ("alembic", "mlflow.tracking.fluent"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # This one logs the traceback of each error that it raises.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        # MLflow remembers where a run's artifacts are by its id alone, which a copied store shares.
        _artifact_repos_cache.clear()
        self.name, self._given_uri = without_password(uri), uri
        check_store(uri)
        self.uri = sign_in(uri)
        try:
            with store_lock(uri):
                self.client = self._opened()
        except Exception as error:  # of MLflow, SQLAlchemy, drivers, requests
            if isinstance(error, ConfigError):
                raise
            raise uri_error(uri, f"this store cannot be opened ({describe_error(error)})") from error

    def _opened(self) -> mlflow.MlflowClient:
        client = mlflow.MlflowClient(tracking_uri=self.uri)
        client.search_experiments(max_results=1)  # it may not be a store
        return client

    def wait(self, seconds: float) -> None:
        """Wait for the store to answer, if it went down."""
        wait_for_store(self._given_uri, seconds)

    def attach(
        self, run_id: str, files: Mapping[str, bytes], tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        """Add artifacts, tags and metrics to a run."""
        with TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self.client.log_artifacts(run_id, folder)
        for key, value in tags.items():
            self.set_tag(run_id, key, value)
        self.log_metrics(run_id, metrics, step=0)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of a run, finished or not; the last value at a step counts."""
        self.client.log_batch(run_id, metrics=[Metric(name, value, now(), step) for name, value in metrics.items()])

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.client.set_tag(run_id, key, value)

    def get_run(self, run_id: str) -> RunRecord | None:
        """A run by its id; None where the store does not have it."""
        try:
            return record_of(self.client.get_run(run_id))
        except MlflowException as error:
            if error.error_code not in UNKNOWN_RUN:
                raise
            return None

    def deleted_identities(self) -> dict[str, str]:
        """The ids of deleted runs by their kdpipe.identity, where no other run of it is left."""
        client, every = self.client, ViewType.ALL
        experiments = pages(lambda token: client.search_experiments(every, PAGE, page_token=token))
        ids, wanted = [found.experiment_id for found in experiments], "tags.`kdpipe.identity` != ''"
        deleted, left = {}, set()
        for run in pages(lambda token: client.search_runs(ids, wanted, every, PAGE, page_token=token)):
            identity = run.data.tags["kdpipe.identity"]
            if run.info.lifecycle_stage == "deleted":
                deleted[identity] = run.info.run_id
            else:
                left.add(identity)
        return {identity: run_id for identity, run_id in deleted.items() if identity not in left}

    def artifacts(self, run_id: str) -> list[str]:
        """The names of a run's artifacts."""
        return [file.path for file in self.client.list_artifacts(run_id)]

    @contextmanager
    def downloaded(self, run_id: str, name: str, key: str) -> Iterator[Path]:
        """An artifact as a local file within the block.

        Args:
            key: of the config, or an argument of a command, whose value is the run; for errors.

        Raises:
            ConfigError: the run does not exist, or lacks this artifact.
        """
        with TemporaryDirectory() as folder:
            file = self._download(run_id, name, key, folder)
            try:
                yield file
            except ValueError as error:  # about its content
                raise ValueError(str(error).replace(str(file), f"runs:/{run_id}/{name}")) from error

    def _download(self, run_id: str, name: str, key: str, folder: str) -> Path:
        try:
            place = self.client.get_run(run_id).info.artifact_uri
            return self._fetch(run_id, name, None if is_local_address(place) else folder)
        except (MlflowException, OSError) as error:
            if self.get_run(run_id):
                similar = [file for file in self.artifacts(run_id) if Path(file).suffix == Path(name).suffix]
                existing = ", ".join(sorted(similar, key=lambda file: (len(file), file)))  # epoch_5 before epoch_10
                problem = f"this run has no {name}, but {existing}" if existing else f"this run has no {name}"
            else:
                problem = f"run not found in {self.name}"
            raise ConfigError(key, f"runs:/{run_id}", "runs:/<id of a finished run>", problem) from error

    def read(self, run_id: str, name: str) -> bytes | None:
        """The content of an artifact; None where it is missing or cannot be read."""
        try:
            if name not in self.artifacts(run_id):
                return None
            with TemporaryDirectory() as folder:  # for a copy of a server's file
                return self._fetch(run_id, name, folder).read_bytes()
        except (MlflowException, OSError) as error:
            log.warning("run %s: %s cannot be read (%s)", run_id, name, first_line(error))
            return None

    def restore(self, run_id: str, folder: Path) -> None:
        """Copy a run's artifacts into its folder, which a later run of the same identity may have overwritten. Weights
        after single epochs are left out: the later run has its own."""
        for file in self.client.list_artifacts(run_id):
            if not file.is_dir and not fnmatch(file.path, epoch_file("*")):
                self._fetch(run_id, file.path, str(folder))

    def _fetch(self, run_id: str, name: str, folder: str | None) -> Path:
        """An artifact as a local file: a copy in `folder`, or itself where the store's files are local."""
        return Path(
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=name, tracking_uri=self.uri, dst_path=folder
            )
        )

    @property
    def ui(self) -> str:
        """URL of the UI: the server's, or of the one that `make ui` starts."""
        return self.uri if is_server(self.uri) else "http://127.0.0.1:5000"  # the browser asks for name and password


def record_of(run: mlflow.entities.Run) -> RunRecord:
    ended = (run.info.end_time or 0) / 1000
    metrics = {name: value for name, value in run.data.metrics.items() if name not in CHARTED.values()}
    if not run.data.tags.get(TIMED_ON, "cpu").startswith("cpu"):  # these are from an earlier timing on a CPU
        metrics = {name: value for name, value in metrics.items() if not name.endswith(ONE_THREAD)}
    return RunRecord(
        id=run.info.run_id,
        name=run.info.run_name or "",
        params=dict(run.data.params),
        metrics=metrics,
        tags=dict(run.data.tags),
        ended=ended,
        # Start to end is too long for a resumed run, which has the tag.
        seconds=float(run.data.tags.get("kdpipe.seconds", ended - run.info.start_time / 1000)),
        status=run.info.status,
    )


def pages(page: Callable[[str | None], PagedList[T]]) -> Iterator[T]:
    """All items of a paged answer. `page` takes the token of a page, None for the first."""
    token = None
    while True:
        found = page(token)
        yield from found
        token = found.token
        if not token:
            return
