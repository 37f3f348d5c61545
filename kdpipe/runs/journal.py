"""What a run has to tell MLflow, as files in its folder: written first, and told as soon as the store takes it.

`metrics.jsonl` has a line for each epoch and one for the end; `tracking.json` says which run of which store they are
for, how the run ended, and whether the store knows all of it.
"""

import json
import logging
import shlex
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from kdpipe.runs.store import without_password
from kdpipe.system.files import append_atomically, write_atomically

log = logging.getLogger("kdpipe")

METRICS = "metrics.jsonl"
TRACKING = "tracking.json"
CHECKPOINTS = "checkpoints"  # a folder
BEGUN = "kdpipe.begun"  # a tag: a token that the folder knows before the store has the run, and gives it an id
NOT_YET = ""  # the id of such a run
RUNNING, FINISHED, KILLED, FAILED = "RUNNING", "FINISHED", "KILLED", "FAILED"  # as MLflow has them

Row = dict[str, float]  # {"step": 3, "train/loss": 0.5, …}
KINDS = {  # of what tracking.json holds
    "uri": str,
    "run_id": str,
    "tags": dict,
    "status": str,
    "reason": str,
    "ended": int,
    "seconds": float,
    "files": list,
    "released": int,
    "times": list,
    "delivered": bool,
}


@dataclass
class Journal:
    """What is known of the run in a folder.

    Attributes:
        uri, run_id: of the store, and of the run there; NOT_YET until the store has answered.
        tags: those that say which run this is.
        status: RUNNING, FINISHED, KILLED or FAILED.
        reason: why it was KILLED or FAILED.
        ended: milliseconds since 1970; 0 while it runs.
        seconds: that processes have worked on it.
        files: names in the folder, to be kept as artifacts.
        released: how many lines of metrics.jsonl stand, because there is a checkpoint of what they tell of.
        times: of these lines, in milliseconds: told twice with the same one, a line is in MLflow once.
        delivered: whether the store knows all of this, and of the rows.
    """

    folder: Path
    uri: str
    run_id: str
    tags: dict[str, str]
    status: str = RUNNING
    reason: str = ""
    ended: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    released: int = 0
    times: list[int] = field(default_factory=list)
    delivered: bool = False

    @property
    def store(self) -> str:
        """The store's URI, to be shown."""
        return without_password(self.uri)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The journal in a folder; None where there is none, or none that can be read."""
        try:
            content = json.loads((folder / TRACKING).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            content = None
        if not _is_well_formed(content):
            log.warning("%s cannot be read: left out of account", folder / TRACKING)
            return None
        return cls(folder=folder, **content)

    def write(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_atomically(self.folder / TRACKING, json.dumps(content, indent=1).encode())

    def end(self, status: str, reason: str = "") -> None:
        """The run is over, for now at least.

        Raises:
            OSError: that it is FINISHED could not be written. Any other end stands without that, in memory.
        """
        over: dict[str, Any] = {"status": status, "reason": reason, "ended": now(), "delivered": False}
        try:
            replace(self, **over).write()
        except OSError:
            if status == FINISHED:
                raise
        for name, value in over.items():
            setattr(self, name, value)

    def is_of(self, tags: Mapping[str, str]) -> bool:
        """Whether it is about the run with these tags."""
        return tags.items() <= self.tags.items()

    def settled(self) -> None:
        """The store knows all of it: what is only there to go on from is not needed, unless the run is to go on."""
        self.delivered = True
        with suppress(OSError):  # then it is told again
            if self.status == FINISHED:
                shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
                (self.folder / TRACKING).unlink(missing_ok=True)
            else:
                self.write()


def _is_well_formed(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and {name: type(value) for name, value in content.items()} == KINDS
        and content["status"] in (RUNNING, FINISHED, KILLED, FAILED)
        and all(isinstance(text, str) for text in [*content["tags"].values(), *content["files"]])
        and (content["run_id"] != NOT_YET or BEGUN in content["tags"])
        and all(isinstance(time, int) for time in content["times"])
    )


def is_unfinished(folder: Path, tags: Mapping[str, str]) -> bool:
    """Whether a run with these tags was begun in a folder and did not come to its end, whatever came of an earlier
    one."""
    journal = Journal.read(folder)
    return journal is not None and journal.is_of(tags) and journal.status != FINISHED


def sync_command(folder: Path) -> str:
    """The command that tells the stores what they missed of the runs beside this folder's."""
    output_dir = folder.parent.parent
    here = output_dir.resolve() == Path("outputs").resolve()
    return shlex.join(["python", "-m", "kdpipe.sync", *([] if here else ["--output-dir", str(output_dir)])])


def undelivered(runs: Path) -> list[Path]:
    """The folders in `runs` that have something to tell, or whose process may be gone."""
    journals = [Journal.read(file.parent) for file in sorted(runs.glob(f"*/{TRACKING}"))]
    return [journal.folder for journal in journals if journal and not journal.delivered]


def read_rows(folder: Path) -> list[Row]:
    """The lines of metrics.jsonl, up to one that a killed process left torn."""
    rows: list[Row] = []
    try:
        lines = (folder / METRICS).read_text(errors="replace").splitlines()
    except OSError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (isinstance(row, dict) and all(isinstance(value, int | float) for value in row.values())):
            break
        if "step" not in row or len(row) < 2:
            break
        rows.append(row)
    return rows


def rows_since(folder: Path, history: list[Row]) -> list[Row]:
    """The rows of a run: those of a checkpoint, and what was released after it (it is not the newest, then)."""
    journal = Journal.read(folder)
    rows = read_rows(folder)[: max(journal.released if journal else 0, len(history))]
    return rows if rows[: len(history)] == history else history


def write_rows(folder: Path, rows: list[Row]) -> None:
    """Have these lines in metrics.jsonl, and no others."""
    write_atomically(folder / METRICS, "".join(map(_line, rows)).encode())


def append_row(folder: Path, row: Row) -> None:
    append_atomically(folder / METRICS, _line(row))


def has_row(rows: list[Row], step: int, names: Mapping[str, Any]) -> bool:
    """Whether one of the rows is for this step and has these metrics."""
    return any(row["step"] == step and row.keys() >= names.keys() for row in rows)


def now() -> int:
    """In milliseconds since 1970."""
    return int(time.time() * 1000)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
