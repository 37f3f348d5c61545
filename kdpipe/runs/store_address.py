"""Which MLflow store a run goes to, and whether its address is one, without importing mlflow, which is slow."""

import os
import shlex
import socket
from pathlib import Path

from kdpipe.runs.sqlite_address import STORE, absolute, problem_of, sqlite_file, sqlite_uri
from kdpipe.settings.credentials import (
    HIDDEN,
    STORE_VARIABLE,
    is_hidden,
    server_address,
    without_password,
)
from kdpipe.settings.errors import ConfigError, flat

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# Not mssql: its URL may have the name of a data source or of an instance in place of the host.
PORTS = {"postgresql": 5432, "mysql": 3306}
PATIENCE = 300  # seconds that a sweep and its runs wait for a store that was up when the sweep began
TIMEOUT = 5  # seconds to connect, and again to answer


def store_uri(configured: str | None, output_dir: Path) -> str:
    """The configured store, else MLFLOW_TRACKING_URI, else a sqlite file in the output folder; that of a file is
    absolute. An address that is shown without its password stands for the whole one in MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: that variable has no such address.
    """
    known = os.environ.get(STORE_VARIABLE)
    uri = configured or known
    if not uri:
        return sqlite_uri(output_dir.expanduser().resolve() / STORE)
    if not is_hidden(uri):
        return absolute(uri)
    if known and known != uri and without_password(known) == uri:
        return known
    raise ConfigError(
        "tracking.uri",
        uri,
        f"the password in its place, or the whole address in {STORE_VARIABLE}",
        f"{HIDDEN} stands for a password that is not shown",
    )


def in_store(uri: str, command: str) -> str:
    """A command of MLflow's for a store; a server's name and password may be in MLflow's own variables."""
    return f"{STORE_VARIABLE}={shlex.quote(without_password(uri))} {command}"


def describe_error(error: Exception) -> str:
    """A store's error on one line, without passwords and without the SQL that SQLAlchemy appends."""
    return flat(str(error).split("\n[SQL:")[0], 300) or type(error).__name__


def is_server(uri: str) -> bool:
    """Whether this is the address of a tracking server."""
    return uri.startswith(("http:", "https:"))


def check_uri(uri: str) -> None:
    """Check that this is the address of a store, and that a database answers; of a server, `tracking.server` checks
    that.

    Raises:
        ConfigError: within seconds, for an unknown kind of URI or a store that would not take a run.
    """
    scheme = uri.split(":", 1)[0].split("+")[0] if ":" in uri else ""
    if is_server(uri):
        _check_address(uri)
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
    return ConfigError("tracking.uri", without_password(uri), expected, problem)


def _check_address(uri: str) -> None:
    try:
        server_address(uri)
    except ValueError as error:
        raise uri_error(uri, expected=_form("http://USER:PASSWORD@HOST:PORT")) from error


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
