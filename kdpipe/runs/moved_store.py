"""Artifacts of a sqlite store whose folder was moved or copied. MLflow keeps absolute addresses of them; here they are
corrected, so that MLflow's own UI finds them too."""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kdpipe.runs.sqlite_address import sqlite_file

log = logging.getLogger("kdpipe")

ARTIFACTS = "mlartifacts"  # the folder beside a local store
LOCK_SECONDS = 20  # to wait for another process that writes to the store
UPDATES = {
    "runs": "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ? AND artifact_uri = ?",
    "experiments": "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ? AND artifact_location = ?",
}

Correction = tuple[str, str, str]  # the new address, the id of a run or an experiment, the old address


def correct_artifacts(uri: str, artifacts: Path) -> None:
    """Correct where the runs of a sqlite store have their artifacts.

    Those that lie beside the store are theirs, also where others are still in the former place: then it is a copy. A
    run whose artifacts are elsewhere stays as it is.

    Args:
        artifacts: another folder in which they may be where the former one is gone, that of the output folder.
    """
    file = sqlite_file(uri)
    if file is None or not file.is_file():
        return
    beside = file.resolve().parent / ARTIFACTS
    other = artifacts.expanduser().resolve()
    try:
        with closing(sqlite3.connect(file, timeout=LOCK_SECONDS)) as database:
            found = _corrections(database, beside, other)
            if not any(found.values()):
                return
            with database:  # a transaction
                for table, corrections in found.items():
                    database.executemany(UPDATES[table], corrections)
    except sqlite3.Error as error:  # not a store yet, or one that cannot be written
        if file.stat().st_size and "no such table" not in str(error):
            log.warning("%s may name artifacts where they no longer are (%s)", file, error)
        return
    if runs := len(found["runs"]):
        log.info("%s was moved or copied: it names the present place of the artifacts of %d runs now", file, runs)


def _corrections(database: sqlite3.Connection, beside: Path, other: Path) -> dict[str, list[Correction]]:
    runs: list[Correction] = []
    roots: dict[str, str] = {}  # the new place of the artifacts of an experiment, by its former one
    for run_id, address in database.execute("SELECT run_uuid, artifact_uri FROM runs"):
        inner = f"/{run_id}/artifacts"
        if not is_local_address(address) or not address.endswith(inner):
            continue
        former = address.removesuffix(inner)
        for root in [beside] if _path(address).exists() else [beside, other]:
            if former != root.as_uri() and Path(f"{root}{inner}").is_dir():
                runs.append((f"{root.as_uri()}{inner}", run_id, address))
                roots[former] = root.as_uri()
                break
    experiments: list[Correction] = []
    for number, address in database.execute("SELECT experiment_id, artifact_location FROM experiments"):
        if not is_local_address(address):
            continue
        gone = _path(address).name == ARTIFACTS and not _path(address).exists()
        places = [place.as_uri() for place in (beside, other) if place.is_dir()] if gone else []
        place = roots.get(address) or next(iter(places), address)
        if place != address:
            experiments.append((place, number, address))
    return {"runs": runs, "experiments": experiments}


def is_local_address(address: str | None) -> bool:
    """Whether MLflow keeps artifacts in a folder of this machine, and not on a server."""
    return str(address).startswith(("file:", "/"))


def _path(address: str) -> Path:
    """The folder of a local address: a path, or a percent-encoded file:///…"""
    return Path(unquote(urlsplit(address).path) if address.startswith("file:") else address)
