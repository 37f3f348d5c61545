"""What the commands on finished runs (`python -m kdpipe.compare`, `cost`, `export`, `predict`) share."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdpipe.runs.moved_store import ARTIFACTS, correct_artifacts
from kdpipe.runs.sqlite_address import sqlite_file
from kdpipe.runs.store_address import check_uri, store_uri
from kdpipe.settings.errors import ConfigError, one_line
from kdpipe.system.tables import UNLIMITED


def folder(text: str) -> Path:
    """A folder that a flag names; shells leave the ~ in --out=~/student as it is."""
    return Path(text).expanduser()


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the MLflow store."""
    parser.add_argument("--uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in --output-dir)")
    parser.add_argument("--output-dir", type=folder, default=Path("outputs"), help="default: %(default)s")


def add_wide_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for tables that may be wider than the terminal."""
    text = "show all columns and digits, even if the lines break (default: what fits into the terminal, or COLUMNS)"
    parser.add_argument("--wide", action="store_true", help=text)


def table_width(arguments: argparse.Namespace) -> int | None:
    """The width of tables for these arguments; None for that of the terminal."""
    return UNLIMITED if arguments.wide else None


def check_flags(arguments: argparse.Namespace, **types: Any) -> None:
    """Raise ConfigError for the value of a flag that is not of its type, such as `seconds=NonNegative`."""
    from pydantic import TypeAdapter, ValidationError

    from kdpipe.settings.values import expected

    for name, annotation in types.items():
        value = getattr(arguments, name)
        try:
            TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError:
            raise ConfigError(f"--{name.replace('_', '-')}", value, expected(annotation)) from None


def existing_store(arguments: argparse.Namespace) -> str:
    """The URI of the MLflow store to read.

    Raises:
        ValueError: it does not exist, or does not answer within seconds.
    """
    uri = store_uri(arguments.uri, arguments.output_dir)
    check_uri(uri)
    local = sqlite_file(uri)
    if local and not local.is_file():
        raise ValueError(f"{local}: MLflow store not found; make demo, or any run, creates one")
    correct_artifacts(uri, arguments.output_dir / ARTIFACTS)
    return uri


def printable(text: str) -> str:
    """Text made safe for a terminal, without control characters, surrogates and marks that reverse its direction."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", "�", text)


def run_command(name: str, command: Callable[[], str]) -> None:
    """Print what a command returns, or its error on one line."""
    try:
        print(command(), flush=True)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(printable(f"{name}: {one_line(error)}"), file=sys.stderr)
        sys.exit(1)
