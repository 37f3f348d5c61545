"""`python -m kdpipe.sync`: tell MLflow what it missed while it could not be reached."""

import argparse
import sys
from pathlib import Path

from kdpipe.runs.claim import is_of_this_machine, locked
from kdpipe.runs.journal import undelivered


def sync(runs: Path) -> tuple[list[str], bool]:
    """Deliver what the folders of runs have and their stores have not.

    Returns:
        A line for each of these folders, and whether all went well; a run in progress delivers by itself.
    """
    from kdpipe import tracking  # imports mlflow, which takes seconds: only where there is something to do

    told, well, stores = [], True, tracking.Stores()
    for folder in undelivered(runs):
        try:
            with locked(folder):
                if is_of_this_machine(folder):
                    problem = stores.settle(folder)
                else:
                    problem = "its process is on another machine, or was"
        except TimeoutError:
            told.append(f"{folder}: in progress")
            continue
        except OSError as error:
            problem = f"{error.strerror} ({error.filename})"
        well = well and not problem
        told.append(f"{folder}: {problem or 'delivered'}")
    return told, well


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.sync", description="Tell MLflow what it missed while it could not be reached."
    )
    parser.add_argument("--output-dir", default="outputs", type=Path, help="the runs' output_dir (default: outputs)")
    runs = parser.parse_args().output_dir / "runs"
    if not runs.is_dir():
        print(f"kdpipe.sync: --output-dir {runs.parent}: there are no runs in it", file=sys.stderr)
        sys.exit(1)
    if not undelivered(runs):
        print(f"{runs}: all is delivered")
        return
    told, well = sync(runs)
    print("\n".join(told))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
