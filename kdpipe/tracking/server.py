"""Tracking servers, asked through MLflow's own client: it knows their certificates, passwords and tokens."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests import Response
from requests.exceptions import SSLError

from kdpipe.runs.store_address import TIMEOUT, check_uri, is_server, uri_error
from kdpipe.settings.credentials import server_address
from kdpipe.settings.errors import flat

NAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"  # of MLflow's client

log = logging.getLogger("kdpipe")
_replaced: dict[str, tuple[str | None, str]] = {}  # what these were before an address set them, and to what


def sign_in(uri: str) -> str:
    """The address of a store for MLflow's client. A server's name and password go to the client's own variables: in the
    address, they would be in the links that MLflow prints, and in its errors. They are for this server alone, and the
    next one that is signed in to does not get them."""
    for name, (before, ours) in _replaced.items():
        if os.environ.get(name) == ours:
            _set(name, before)
    _replaced.clear()
    if not is_server(uri):
        return uri
    parts = urlsplit(uri)
    for name, value in {NAME: parts.username, PASSWORD: parts.password}.items():
        if value:
            _replaced[name] = os.environ.get(name), unquote(value)
            os.environ[name] = unquote(value)
    return server_address(uri)


@contextmanager
def signed_in(uri: str) -> Iterator[str]:
    """`sign_in` within the block."""
    earlier, now = dict(_replaced), {name: os.environ.get(name) for name in (NAME, PASSWORD)}
    try:
        yield sign_in(uri)
    finally:
        for name, value in now.items():
            _set(name, value)
        _replaced.clear()
        _replaced.update(earlier)


def _set(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def wait_for_store(uri: str, seconds: float) -> None:
    """`check_store`, tried again for some time: the store was up before and may come back."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check_store(uri)
        except ValueError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s: waiting for it", error)
            time.sleep(min(15.0, seconds))


def check_store(uri: str) -> None:
    """Check that a store answers.

    Raises:
        ConfigError: within seconds, for an unknown kind of URI or a store that would not take a run.
    """
    check_uri(uri)
    if is_server(uri):
        _check_server(uri)


def _check_server(uri: str) -> None:
    """Check that a tracking server answers, takes this name and password, accepts the name it is called by, and reaches
    its database."""
    try:
        answer = _ask(uri)
    except MlflowException as error:
        raise uri_error(uri, _why_there_is_no_answer(error)) from error
    text = flat(answer.text, 500)
    if answer.status_code == 403 and "Invalid Host header" in text:
        name = urlsplit(server_address(uri)).hostname
        raise uri_error(
            uri,
            f"the server there refuses to be called {name}; use one of its own names, or start it with "
            f"make server ALLOWED_HOSTS={name}",
        )
    if answer.status_code == 401:
        raise uri_error(
            uri, f"the server there does not accept this name and password ({text}); {NAME} and {PASSWORD} set them"
        )
    if answer.status_code == 403:
        raise uri_error(uri, f"the server there does not permit this user to read its experiments ({text})")
    if answer.status_code == 404:
        raise uri_error(uri, "what answers there is no MLflow server (404 for its experiments)")
    if answer.status_code >= 500:
        raise uri_error(uri, f"the server there answers {answer.status_code}, its database may be down: {text}")


def _ask(uri: str) -> Response:
    # Not /health: that answers to any name, without password and database. And not an experiment by its id: this user
    # may not be permitted to read it.
    with signed_in(uri) as address:
        answer: Response = http_request(
            get_default_host_creds(address),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            json={"max_results": 1},
            timeout=TIMEOUT,
            max_retries=0,
            raise_on_status=False,
        )
    return answer


def _why_there_is_no_answer(error: MlflowException) -> str:
    cause = error.__context__ or error
    reason = _innermost(cause)
    if isinstance(cause, SSLError):
        why = getattr(reason, "verify_message", "") or flat(reason)
        return (
            f"its certificate is not trusted, or this is no HTTPS server ({why}); "
            "MLFLOW_TRACKING_SERVER_CERT_PATH=FILE names the authority that signed it, "
            "MLFLOW_TRACKING_INSECURE_TLS=true trusts any"
        )
    if isinstance(cause, OSError) and "certificate" in str(cause) and "path" in str(cause):  # a file that is missing
        return f"{flat(cause)}; MLFLOW_TRACKING_SERVER_CERT_PATH or REQUESTS_CA_BUNDLE names it"
    return (
        f"no tracking server answers there ({_without_object(flat(reason))}); start it and its database, or use "
        "sqlite:///FILE"
    )


def _without_object(text: str) -> str:
    """What urllib3 says, without the connection or the pool that it begins with."""
    return re.sub(r"^(<[^>]*>|\w+\([^)]*\)): ", "", text)


def _innermost(error: BaseException) -> BaseException:
    inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    return _innermost(inner) if isinstance(inner, BaseException) else error
