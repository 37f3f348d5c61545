"""What a run logs, written to its folder first and delivered to MLflow as soon as the store takes it.

`metrics.jsonl` has a line for each epoch and one for the end. `tracking.json` names the store and the run there, and
says how the run ended and whether the store has all of it.
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
from typing import Any, Self, get_origin, get_type_hints

from kdpipe.runs.sqlite_address import STORE, sqlite_file, sqlite_uri
from kdpipe.settings.credentials import without_password
from kdpipe.system.files import append_atomically, write_atomically

log = logging.getLogger("kdpipe")

METRICS = "metrics.jsonl"
TRACKING = "tracking.json"
CHECKPOINTS = "checkpoints"  # a folder
# A tag with a token that is in the folder before the store creates the run and gives it an id.
CREATION_TOKEN = "kdpipe.begun"
NOT_CREATED = ""  # the id of a run that the store may not have created
OWN_STORE = f"sqlite:///../../{STORE}"  # in a journal: the store in the run's output folder, which may be moved
RUNNING, FINISHED, KILLED, FAILED = "RUNNING", "FINISHED", "KILLED", "FAILED"  # as in MLflow

Row = dict[str, float]  # {"step": 3, "train/loss": 0.5, …}


@dataclass
class Journal:
    """The state of the run in a folder, as in tracking.json.

    Attributes:
        uri: of the store, without its password.
        run_id: of the run there; NOT_CREATED until the store has answered.
        tags: those that identify the run.
        status: RUNNING, FINISHED, KILLED or FAILED.
        reason: why it was KILLED or FAILED.
        ended: milliseconds since 1970; 0 while it runs.
        seconds: that processes have worked on it.
        files: names in the folder, to be stored as artifacts.
        released: how many lines of metrics.jsonl are final, because a checkpoint covers them.
        times: of these lines, in milliseconds. MLflow stores a metric once that is sent twice with the same time.
        delivered: whether the store has all of this, and the rows.
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

    def __post_init__(self) -> None:
        self.uri = without_password(self.uri)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The journal in a folder; None where it is missing or unreadable."""
        try:
            content = json.loads((folder / TRACKING).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            content = None
        if not _is_well_formed(content):
            log.warning("%s cannot be read and is ignored", folder / TRACKING)
            return None
        return cls(folder=folder, **{**content, "uri": _found(content["uri"], folder)})

    def write(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        if self.uri == sqlite_uri(_own_store(self.folder)):
            content["uri"] = OWN_STORE
        write_atomically(self.folder / TRACKING, json.dumps(content, indent=1).encode())

    def end(self, status: str, reason: str = "") -> None:
        """Note that the run is over, at least for now.

        Raises:
            OSError: FINISHED could not be written. Any other end is noted in memory then.
        """
        end: dict[str, Any] = {"status": status, "reason": reason, "ended": now(), "delivered": False}
        try:
            replace(self, **end).write()
        except OSError:
            if status == FINISHED:
                raise
        for name, value in end.items():
            setattr(self, name, value)

    def matches(self, tags: Mapping[str, str]) -> bool:
        """Whether this is the journal of the run with these tags."""
        return tags.items() <= self.tags.items()

    def mark_delivered(self) -> None:
        """Note that the store has everything. A finished run needs no checkpoints and no journal any more."""
        self.delivered = True
        with suppress(OSError):  # then it is delivered again
            if self.status == FINISHED:
                shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
                (self.folder / TRACKING).unlink(missing_ok=True)
            else:
                self.write()


def _own_store(folder: Path) -> Path:
    """The sqlite file in the output folder that a run's folder is in."""
    return folder.resolve().parent.parent / STORE


def _found(uri: str, folder: Path) -> str:
    """The URI of a store as a journal has it, from where the folder is now."""
    own, file = _own_store(folder), sqlite_file(uri)
    was_moved = file is not None and file.name == STORE and not file.exists() and own.exists()
    return sqlite_uri(own) if uri == OWN_STORE or was_moved else uri


def _is_well_formed(content: Any) -> bool:
    types = {name: get_origin(hint) or hint for name, hint in get_type_hints(Journal).items() if name != "folder"}
    return (
        isinstance(content, dict)
        and {name: type(value) for name, value in content.items()} == types
        and content["status"] in (RUNNING, FINISHED, KILLED, FAILED)
        and all(isinstance(text, str) for text in [*content["tags"].values(), *content["files"]])
        and (content["run_id"] != NOT_CREATED or CREATION_TOKEN in content["tags"])
        and all(isinstance(time, int) for time in content["times"])
    )


def is_unfinished(folder: Path, tags: Mapping[str, str]) -> bool:
    """Whether the newest run in a folder has these tags and is not FINISHED."""
    journal = Journal.read(folder)
    return journal is not None and journal.matches(tags) and journal.status != FINISHED


def sync_command(folder: Path) -> str:
    """The command that delivers what stores lack of this run and of those next to it."""
    output_dir = folder.parent.parent
    here = output_dir.resolve() == Path("outputs").resolve()
    return shlex.join(["python", "-m", "kdpipe.sync", *([] if here else ["--output-dir", str(output_dir)])])


def undelivered(runs: Path) -> list[Path]:
    """The folders in `runs` with something to deliver, or whose process may be gone."""
    journals = [Journal.read(file.parent) for file in sorted(runs.glob(f"*/{TRACKING}"))]
    return [journal.folder for journal in journals if journal and not journal.delivered]


def read_rows(folder: Path) -> list[Row]:
    """The lines of metrics.jsonl, up to one that a killed process left incomplete."""
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
        if not (isinstance(row, dict) and "step" in row and len(row) > 1):
            break
        if not all(isinstance(value, int | float) for value in row.values()):
            break
        rows.append(row)
    return rows


def rows_since(folder: Path, history: list[Row]) -> list[Row]:
    """The rows of a run: those of a checkpoint, and final ones after it, where a newer checkpoint was damaged."""
    journal = Journal.read(folder)
    rows = read_rows(folder)[: max(journal.released if journal else 0, len(history))]
    return rows if rows[: len(history)] == history else history


def write_rows(folder: Path, rows: list[Row]) -> None:
    """Replace the lines of metrics.jsonl."""
    write_atomically(folder / METRICS, "".join(map(_line, rows)).encode())


def append_row(folder: Path, row: Row) -> None:
    append_atomically(folder / METRICS, _line(row))


def has_row(rows: list[Row], step: int, names: Mapping[str, Any]) -> bool:
    """Whether a row has this step and these metrics."""
    return any(row["step"] == step and row.keys() >= names.keys() for row in rows)


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
