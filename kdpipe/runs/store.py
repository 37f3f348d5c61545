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
