"""Which MLflow store a run goes to, and whether it can be reached, without importing mlflow, which is slow."""

import logging
import os
import re
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kdpipe.runs.sqlite_address import STORE, absolute, problem_of, sqlite_file, sqlite_uri
from kdpipe.settings.errors import ConfigError, flat

log = logging.getLogger("kdpipe")

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# Not mssql: its URL may have the name of a data source or of an instance in place of the host.
PORTS = {"postgresql": 5432, "mysql": 3306}
PATIENCE = 300  # seconds that a sweep and its runs wait for a store that was up when the sweep began
TIMEOUT = 5  # seconds to connect, and again to answer
USER = re.compile(r"[\w+.-]+://[^:/]*:(.*)@", re.DOTALL)  # SCHEME://USER:PASSWORD@
PARAMETER = re.compile(r"[?&]([^=&]*)=([^&]*)")
SECRET = re.compile(r"passw|pwd|odbc_connect", re.IGNORECASE)  # in the name of a parameter


def store_uri(configured: str | None, output_dir: Path) -> str:
    """The configured store, else MLFLOW_TRACKING_URI, else a sqlite file in the output folder; that of a file is
    absolute."""
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    return absolute(uri) if uri else sqlite_uri(output_dir.expanduser().resolve() / STORE)


def without_password(uri: str) -> str:
    """A store's URI with PASSWORD in place of passwords, also of those in query parameters.

    SQLAlchemy's `hide_password` and urllib end a password at the first @ or /, and show the rest where it is not
    percent-encoded. Here it goes on to the last @.
    """
    secrets = [match.span(2) for match in PARAMETER.finditer(uri) if SECRET.search(unquote(match[1]))]
    if (match := USER.match(uri)) and not _is_address(uri):
        secrets.append(match.span(1))
    shown = uri
    for start, end in secrets:  # they may overlap
        shown = shown[:start] + "\0" * (end - start) + shown[end:]
    return re.sub("\0+", "PASSWORD", shown)


def _is_address(uri: str) -> bool:
    """Whether this is http://HOST:PORT/… or http://USER@HOST/…, where a later @ is part of the path."""
    try:
        return server_address(uri).startswith("http") and ":" not in urlsplit(uri).netloc.rpartition("@")[0]
    except ValueError:  # the port is not a number: it is the start of a password
        return False


def without_passwords(text: str) -> str:
    """A text, such as a driver's error message, with PASSWORD in place of the passwords in its URLs."""
    return re.sub(r"[\w+.-]+://\S+", lambda uri: without_password(uri[0]), text)


def describe_error(error: Exception) -> str:
    """A store's error on one line, without passwords and without the SQL that SQLAlchemy appends."""
    return flat(without_passwords(str(error)).split("\n[SQL:")[0], 300) or type(error).__name__


def server_address(uri: str) -> str:
    """A tracking server's URI without name and password, as MLflow's client and browsers call it.

    Raises:
        ValueError: the URI cannot be parsed.
    """
    parts = urlsplit(uri)
    if parts.port == 0:  # urlsplit checks the port only when asked for it
        raise ValueError("a port is at least 1")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2].lower()}{parts.path.rstrip('/')}"


def wait_for_store(uri: str, seconds: float) -> None:
    """`check_uri`, tried again for some time: the store was up before and may come back."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check_uri(uri)
        except ValueError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s: waiting for it", error)
            time.sleep(min(15.0, seconds))


def check_uri(uri: str) -> None:
    """Check that a store answers.

    Raises:
        ConfigError: within seconds, for an unknown kind of URI or a store that would not take a run.
    """
    scheme = uri.split(":", 1)[0].split("+")[0] if ":" in uri else ""
    if scheme in ("http", "https"):
        _check_server(uri)
    elif scheme not in DATABASES:
        raise uri_error(uri, expected="sqlite:///FILE, postgresql://… or http://HOST:PORT")
    elif scheme == "sqlite":
        _check_file(uri)
    else:
        _check_database(uri)


def _check_file(uri: str) -> None:
    """Check that a sqlite file is one, or could become one: MLflow would retry for minutes."""
    file = sqlite_file(uri)
    if file is None:
        raise uri_error(uri, "the runs would be lost", expected="sqlite:///FILE")
    if problem := problem_of(file):
        raise uri_error(uri, f"{problem}; output_dir and tracking.uri say where the store is")


def uri_error(uri: str, problem: str = "", expected: str = "") -> ConfigError:
    """What is wrong with a store, without its password."""
    return ConfigError("tracking.uri", without_password(uri), expected, without_passwords(problem))


def _check_server(uri: str) -> None:
    """Check that a tracking server answers, accepts the name it is called by, and reaches its database."""
    try:
        address = server_address(uri)
    except ValueError as error:
        raise uri_error(uri, expected=_form("http://USER:PASSWORD@HOST:PORT")) from error
    try:
        # The password need not be right to get an answer.
        status, answer = _ask(address)
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise uri_error(
            uri, f"no tracking server answers there ({reason}); start it and its database, or use sqlite:///FILE"
        ) from error
    if status == 403 and "Invalid Host header" in answer:
        name = urlsplit(address).hostname
        raise uri_error(
            uri,
            f"the server there refuses to be called {name}; use one of its own names, or start it with "
            f"make server ALLOWED_HOSTS={name}",
        )
    if status >= 500:
        raise uri_error(uri, f"the server there answers {status}, its database may be down: {answer}")


def _ask(address: str) -> tuple[int, str]:
    """The status of a tracking server's answer and, of an error, the start of its text."""
    # Not /health: that answers to any name, and without the database.
    url = f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, flat(error.read(500).decode(errors="replace"))


def _check_database(uri: str) -> None:
    """Check that something listens at a database's host and port: MLflow would retry for minutes."""
    from sqlalchemy.engine import make_url  # slow to import, too
    from sqlalchemy.exc import ArgumentError

    form = _form(f"{uri.split(':')[0]}://USER:PASSWORD@HOST:PORT/DATABASE")
    try:
        url = make_url(uri)
    except (ValueError, ArgumentError) as error:
        raise uri_error(uri, expected=form) from error
    if uri.partition("?")[0].count("@") > 1:  # SQLAlchemy takes what follows the first one for the host
        raise uri_error(uri, expected=form)
    port = url.port or PORTS.get(url.get_backend_name())
    elsewhere = url.query.keys() & {"host", "hostaddr", "unix_socket"}
    if not url.host or not port or elsewhere:
        return
    try:
        socket.create_connection((url.host, port), timeout=TIMEOUT).close()
    except OSError as error:
        raise uri_error(
            uri, f"no database answers at {url.host}:{port} ({error}); start it, or use sqlite:///FILE"
        ) from error


def _form(example: str) -> str:
    return f"{example}, with special characters in the password percent-encoded (@ as %40)"
