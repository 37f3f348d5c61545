"""Addresses of MLflow stores that are sqlite files, as SQLAlchemy reads them: sqlite:///FILE?timeout=60.

In FILE, % and ? are percent-encoded, relative paths start in the current folder, and ~ is the user's home.
"""

import os
import re
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

STORE = "mlflow.db"  # the file of a store in the output folder
ADDRESS = re.compile(r"(?P<start>sqlite(\+\w+)?:///)(?P<file>[^?]+)(?P<query>\?.*)?", re.DOTALL)
SPECIAL = re.compile(r"[%?]")


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store, absolute; None for other stores, and for a database in memory."""
    match = ADDRESS.fullmatch(uri)
    if match is None or match["file"] == ":memory:":
        return None
    name = unquote(match["file"])
    if name.startswith("file:") and "uri" in parse_qs((match["query"] or "")[1:]):  # sqlite's own kind of address
        name = unquote(urlsplit(name).path)
    return Path(name).expanduser().absolute()


def sqlite_uri(file: Path, start: str = "sqlite:///", query: str = "") -> str:
    """The address of a sqlite file, as `sqlite_file` reads it.

    MLflow makes the folder before the last slash as it is written, percent signs included: behind a name that has to be
    encoded, the slashes are, too, and no second folder appears beside the real one.
    """
    path = str(file)
    if special := SPECIAL.search(path):
        first = path.rfind(os.sep, 0, special.start()) + 1
        encoded = SPECIAL.sub(lambda letter: quote(letter[0]), path[first:]).replace(os.sep, quote(os.sep, safe=""))
        path = path[:first] + encoded
    return f"{start}{path}{query}"


def absolute(uri: str) -> str:
    """The address of the same store from any folder; of other kinds of stores, as it is."""
    match, file = ADDRESS.fullmatch(uri), sqlite_file(uri)
    if match is None or file is None or match["file"].startswith("file:"):
        return uri
    return sqlite_uri(file, match["start"], match["query"] or "")


def problem_of(file: Path) -> str:
    """Why no sqlite store can be opened or made there; "" where it seems possible. MLflow would try for minutes."""
    try:
        if file.is_dir():
            return f"{file} is a folder, not a file"
        folder = next(folder for folder in file.parents if folder.exists())
        if not folder.is_dir():
            return f"{folder} is a file, not a folder"
        if not os.access(folder, os.X_OK | (0 if file.exists() else os.W_OK)):
            return f"the folder {folder} does not let you {'read' if file.exists() else 'write'} in it"
        if file.exists():
            with file.open("rb") as opened:
                if opened.read(16) not in (b"", b"SQLite format 3\x00"):
                    return f"{file} is not a sqlite database"
    except OSError as error:
        return f"{file}: {error.strerror}"
    return ""


def write_problem(file: Path) -> str:
    """Why an existing store takes no new runs; "" where it does."""
    # SQLite writes its journal beside the file.
    fixed = [path for path in (file, file.parent) if path.exists() and not os.access(path, os.W_OK)]
    return f"{fixed[0]} is read-only" if fixed else ""
