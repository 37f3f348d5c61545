"""`python -m kdpipe.sync`: deliver to MLflow what it missed while it could not be reached, or where it was before its
folder was moved."""

import argparse
import sys
from pathlib import Path

from kdpipe.runs.claim import is_local, locked
from kdpipe.runs.command_line import folder
from kdpipe.runs.journal import undelivered
from kdpipe.runs.moved_store import ARTIFACTS, correct_artifacts
from kdpipe.runs.sqlite_address import STORE, sqlite_uri
from kdpipe.settings.credentials import put_away
from kdpipe.settings.errors import ConfigError


def sync(runs: Path) -> tuple[list[str], bool]:
    """Deliver what the folders of runs have and their stores lack.

    Returns:
        A line for each of these folders, and whether all went well. A run in progress delivers by itself.
    """
    from kdpipe.tracking import Recovery  # imports mlflow, which takes seconds: only where there is something to do

    lines, is_well, recovery = [], True, Recovery()
    for run in undelivered(runs):
        try:
            with locked(run):
                problem = recovery.recover(run) if is_local(run) else "its process was on another machine"
        except TimeoutError:
            lines.append(f"{run}: in progress")
            continue
        except OSError as error:
            problem = f"{error.strerror} ({error.filename})"
        is_well = is_well and not problem
        lines.append(f"{run}: {problem or 'delivered'}")
    return lines, is_well


def cli() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.sync", description="Deliver to MLflow what it missed while it could not be reached."
    )
    parser.add_argument("--output-dir", default="outputs", type=folder, help="the runs' output_dir (default: outputs)")
    parser.add_argument("--uri", help="address of their store with its password (default: MLFLOW_TRACKING_URI)")
    arguments = parser.parse_args()
    runs = arguments.output_dir / "runs"
    if arguments.uri:
        put_away(arguments.uri)  # the journals of runs leave the password out
    if not runs.is_dir():
        error = ConfigError("--output-dir", runs.parent, "the output_dir of runs", "this folder has no runs")
        print(f"kdpipe.sync: {error}", file=sys.stderr)
        sys.exit(1)
    correct_artifacts(sqlite_uri(runs.parent / STORE), runs.parent / ARTIFACTS)
    if not undelivered(runs):
        print(f"{runs}: all is delivered")
        return
    lines, is_well = sync(runs)
    print("\n".join(lines))
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    cli()
