"""Which MLflow store a run goes to, and whether it can be reached: known before mlflow, slow to import, is."""

import logging
import os
import re
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

log = logging.getLogger("kdpipe")

# In a run's folder and among its artifacts.
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
PEER_WEIGHTS = "peer.safetensors"
PREDICTIONS = "predictions.csv"  # a line for each test image
CLASSES = "classes.csv"
CONFUSION, RELIABILITY, DIFFERING = "confusion.png", "reliability.png", "differing.png"
# Tags of a run.
IMAGE_SHAPE = "kdpipe.image_shape"  # of its stored images, such as 3x32x32
UNLABELLED_IMAGES = "kdpipe.unlabelled_images"  # how many it learned from, where there were any
TIMED_ON = "kdpipe.timed_on"  # the hardware that its networks were timed on
ONE_THREAD = "_1_thread"  # ends the names of times on one thread of a CPU
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# Not mssql: what stands in the place of its host may be the name of a data source or of an instance.
PORTS = {"postgresql": 5432, "mysql": 3306}
PATIENCE = 300  # seconds that a sweep and its runs wait for a store that was there when the sweep began
SECONDS = 5  # that a connection, and then an answer, may take


def store_uri(configured: str | None, output_dir: Path) -> str:
    """Which store: what is configured, else MLFLOW_TRACKING_URI, else a sqlite file in the output folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output_dir.resolve() / 'mlflow.db'}"


def without_password(text: str) -> str:
    """A store's URI, or a text with URIs, to be shown."""
    text = re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:PASSWORD@", text)
    return re.sub(r"([?&]password=)[^&\s]*", r"\1PASSWORD", text)


def reason_of(error: Exception) -> str:
    """What a store's error says first; SQLAlchemy goes on for many lines."""
    return without_password(str(error).strip().split("\n")[0])[:300] or type(error).__name__


def epoch_file(epoch: object) -> str:
    """The name of the file with the weights that a run had after an epoch; a pattern for "*"."""
    return f"epoch_{epoch}.safetensors"


def names_weights(address: object) -> bool:
    """Whether this is how a run's weights are written: runs:/<run id>, runs:/<run id>/epoch_<number>."""
    return bool(re.fullmatch(r"runs:/[^/]+(/(model|epoch_[1-9]\d*)(\.safetensors)?)?", str(address)))


def run_and_file(address: str) -> tuple[str, str]:
    """The run's id, and the name of its file of weights, that such an address is made of."""
    run_id, _, name = address.removeprefix("runs:/").partition("/")
    return run_id, f"{name.removesuffix('.safetensors')}.safetensors" if name else WEIGHTS


def weights_address(run_id: str, file: str) -> str:
    """How such an address is written: runs:/<run id> for the weights at the end."""
    return f"runs:/{run_id}" if file == WEIGHTS else f"runs:/{run_id}/{file.removesuffix('.safetensors')}"


def wait_for_store(uri: str, seconds: float) -> None:
    """`check_uri` for a store that was there before: it may be back within some time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check_uri(uri)
        except ValueError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s: waiting for it", error)
            time.sleep(min(15.0, seconds))


def shown(uri: str) -> str:
    """The store in an error."""
    return f"tracking.uri={without_password(uri)}"


def check_uri(uri: str) -> None:
    """Raise ValueError, within seconds, for a URI of no known kind and for a store that would not take a run."""
    scheme = uri.split(":", 1)[0].split("+")[0] if ":" in uri else ""
    if scheme in ("http", "https"):
        check_server(uri)
    elif scheme not in DATABASES:
        raise ValueError(f"{shown(uri)}: sqlite:///FILE, postgresql://… or http://HOST:PORT is accepted")
    elif scheme != "sqlite":
        check_database(uri)


def check_server(uri: str) -> None:
    """Raise ValueError where no tracking server answers, where it refuses the name that it is called by, and where its
    database does not answer."""
    try:
        parts = urlsplit(uri)
        # As MLflow's client calls it, in lower case; a password need not be right to get an answer.
        host = parts.netloc.rpartition("@")[2].lower()
        status, said = ask(f"{parts.scheme}://{host}{parts.path.rstrip('/')}")
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{shown(uri)}: no tracking server answers there ({reason}); "
            "start it and its database, or use sqlite:///FILE"
        ) from error
    if status == 403 and "Invalid Host header" in said:
        raise ValueError(
            f"{shown(uri)}: the server there refuses to be called {parts.hostname}; one of its own names is "
            f"accepted, and this one with make server ALLOWED_HOSTS={parts.hostname}"
        )
    if status >= 500:
        raise ValueError(f"{shown(uri)}: the server there answers {status}, its database may not: {said}")


def ask(server: str) -> tuple[int, str]:
    """The status of a tracking server's answer, and the start of what it says where that is an error."""
    # Not /health: that answers to any name, and without the database.
    url = f"{server}/api/2.0/mlflow/experiments/get?experiment_id=0"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, " ".join(error.read(500).decode(errors="replace").split())


def check_database(uri: str) -> None:
    """Raise ValueError where nothing listens at a database's host and port: MLflow would try again for minutes."""
    from sqlalchemy.engine import make_url  # slow to import, too
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ValueError, ArgumentError) as error:
        accepted = f"{uri.split(':')[0]}://USER:PASSWORD@HOST:PORT/DATABASE"
        raise ValueError(f"{shown(uri)}: {accepted} is accepted") from error
    port = url.port or PORTS.get(url.get_backend_name())
    elsewhere = url.query.keys() & {"host", "hostaddr", "unix_socket"}
    if not url.host or not port or elsewhere:
        return
    try:
        socket.create_connection((url.host, port), timeout=SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"{shown(uri)}: no database answers at {url.host}:{port} ({error}); start it, or use sqlite:///FILE"
        ) from error
