"""What the commands on finished runs (`python -m kdpipe.compare`, `cost`, `export`, `predict`) have in common."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from kdpipe.runs.store import check_uri, store_uri


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command be told which MLflow store it reads, as the runs themselves are."""
    parser.add_argument(
        "--uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in the output folder)"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="default: %(default)s")


def existing_store(arguments: argparse.Namespace) -> str:
    """The URI of the store that a command was told to read.

    Raises:
        ValueError: there is none; told within seconds.
    """
    uri = store_uri(arguments.uri, arguments.output_dir)
    check_uri(uri)
    local = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not local.is_file():
        raise ValueError(f"{local}: there is no such MLflow store; make demo, or any run, makes one")
    return uri


def printable(text: str) -> str:
    """A line that may hold text from files, such as class names, for a terminal: control characters, which would steer
    it, are replaced, and so are what turns the order of letters and surrogates, which cannot be printed."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", "�", text)


def run_command(name: str, command: Callable[[], str]) -> None:
    """Print what a command comes to, or its error as one line."""
    try:
        print(command(), flush=True)
    except BrokenPipeError:  # whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(printable(f"{name}: {' '.join(str(error).split())}"), file=sys.stderr)
        sys.exit(1)
