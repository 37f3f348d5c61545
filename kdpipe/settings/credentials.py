"""Passwords in the addresses of stores, and how they stay out of what is printed and kept.

Hydra keeps a run's config and its command, launchers pass commands on, and we print them. So a password is taken out of
`tracking.uri` where it comes in: the whole address goes to MLFLOW_TRACKING_URI, which the processes that we start
inherit, and from then on its shown form, with PASSWORD in place of the password, stands for it.
"""

import os
import re
from urllib.parse import unquote, urlsplit

STORE_VARIABLE = "MLFLOW_TRACKING_URI"
HIDDEN = "PASSWORD"  # stands for a password that is not shown
USER = re.compile(r"[\w+.-]+://[^:/]*:(.*)@", re.DOTALL)  # SCHEME://USER:PASSWORD@
PARAMETER = re.compile(r"[?&]([^=&]*)=([^&]*)")
# In the name of a parameter.
SECRET = re.compile(r"passw|pwd|token|secret|credential|signature|(api|access)_?key|odbc_connect", re.IGNORECASE)


def _secrets(uri: str) -> list[tuple[int, int]]:
    """Where passwords begin and end; they may overlap.

    SQLAlchemy's `hide_password` and urllib end a password at the first @ or /, and show the rest where it is not
    percent-encoded. Here it goes on to the last @.
    """
    secrets = [match.span(2) for match in PARAMETER.finditer(uri) if SECRET.search(unquote(match[1]))]
    if (match := USER.match(uri)) and not _is_address(uri):
        secrets.append(match.span(1))
    return secrets


def _is_address(uri: str) -> bool:
    """Whether this is http://HOST:PORT/… or http://USER@HOST/…, where a later @ is part of the path."""
    try:
        return server_address(uri).startswith("http") and ":" not in urlsplit(uri).netloc.rpartition("@")[0]
    except ValueError:  # the port is not a number: it is the start of a password
        return False


def server_address(uri: str) -> str:
    """A tracking server's URI without name and password, as MLflow's client and browsers call it.

    Raises:
        ValueError: the URI cannot be parsed.
    """
    parts = urlsplit(uri)
    if parts.port == 0:  # urlsplit checks the port only when asked for it
        raise ValueError("a port is at least 1")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2].lower()}{parts.path.rstrip('/')}"


def without_password(uri: str) -> str:
    """A store's URI with PASSWORD in place of passwords, also of those in query parameters."""
    shown = uri
    for start, end in _secrets(uri):
        shown = shown[:start] + "\0" * (end - start) + shown[end:]
    return re.sub("\0+", HIDDEN, shown)


def without_passwords(text: str) -> str:
    """A text, such as a driver's error message, with PASSWORD in place of the passwords in its URLs."""
    return re.sub(r"[\w+.-]+://\S+", lambda uri: without_password(uri[0]), text)


def is_hidden(uri: str) -> bool:
    """Whether a URI has PASSWORD in place of a password."""
    return any(uri[start:end] == HIDDEN for start, end in _secrets(uri))


def put_away(uri: str) -> str:
    """A store's URI as it may be shown and kept; if that leaves out a password, the whole one goes to
    MLFLOW_TRACKING_URI."""
    shown = without_password(uri)
    if shown != uri:
        os.environ[STORE_VARIABLE] = uri
    return shown


def how_to_fill_in(text: str) -> str:
    """A note for a command that a user may paste; "" where it hides nothing."""
    hides = any(is_hidden(uri) for uri in re.findall(r"[\w+.-]+://\S+", text))
    return f"put the password in place of {HIDDEN}, or set {STORE_VARIABLE} to the whole address" if hides else ""
