"""Finished runs in one CSV file: to publish them, and to compare them again without their store.

Columns are named as by `mlflow.search_runs` (`run_id`, `params.…`, `metrics.…`, `tags.…`). Beside them, `history` has
the validation accuracy after each epoch, and `right` a bit for each test image: whether the answer is right.
"""

import base64
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kdpipe.compare.disagreement import read_predictions
from kdpipe.runs.names import PREDICTIONS
from kdpipe.settings.errors import ConfigError, first_line
from kdpipe.settings.identity import is_place
from kdpipe.tracking import RunRecord

HISTORY = "val/accuracy"
REQUIRED = (
    *("run_id", "seconds", "params.seed", "params.model.name", "params.dataset.name", "params.train.epochs"),
    *("params.loss._target_", "metrics.test/accuracy", "tags.kdpipe.stage", "tags.kdpipe.data", "name", "ended"),
)
FILE = "a file of kdpipe.compare --format runs"


class RunSource(Protocol):
    """What a comparison asks of the place where runs are: a store, or a file."""

    def finished_runs(self) -> list[RunRecord]: ...

    def get_run(self, run_id: str) -> RunRecord | None: ...

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]: ...

    def read(self, run_id: str, name: str) -> bytes | None: ...


def runs_to_csv(records: Iterable[RunRecord], source: RunSource) -> str:
    """A row for each run. What says where things are on a machine stays out."""
    frame = pd.DataFrame([_row(record, source) for record in records])
    place = {"params": 1, "metrics": 2, "tags": 3, "history": 4, "right": 5}
    columns = sorted(frame, key=lambda column: (place.get(column.partition(".")[0], 0), "." in column and column))
    return frame[columns].to_csv(index=False, lineterminator="\n")


def _row(record: RunRecord, source: RunSource) -> dict[str, object]:
    tags = {key: value for key, value in record.tags.items() if key.startswith(("kdpipe.", "git."))}
    return {
        "run_id": record.id,
        "name": record.name,
        "ended": round(record.ended),
        "seconds": round(record.seconds, 1),
        **{f"params.{key}": _without_folder(text) for key, text in record.params.items() if not is_place(key)},
        **{f"metrics.{key}": float(f"{value:.8g}") for key, value in record.metrics.items()},
        **{f"tags.{key}": _without_folder(text) for key, text in tags.items()},
        "history": " ".join(f"{value:.6g}" for _, value in source.history(record.id, HISTORY)),
        "right": _packed(source.read(record.id, PREDICTIONS)),
    }


def _without_folder(text: str) -> str:
    """The name of a file or folder of this machine."""
    return Path(text).name if text.startswith(("/", "~")) else text


def _packed(predictions: bytes | None) -> str:
    """Which answers are right, a bit for each test image in the order of their positions, compressed."""
    if predictions is None:
        return ""
    correct = read_predictions(predictions)
    bits = [correct[image] for image in sorted(correct, key=lambda image: int(image[0]))]
    return f"{len(bits)}:{base64.b85encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()}"


def _unpacked(right: str) -> NDArray[np.uint8]:
    """The bits of `_packed`, none for ""."""
    number, _, packed = right.partition(":")
    content = zlib.decompress(base64.b85decode(packed)) if packed else b""
    return np.unpackbits(np.frombuffer(content, np.uint8), count=int(number or 0))


class RunFile:
    """The runs in a file of `runs_to_csv`, as a `RunSource`.

    Raises:
        ConfigError: it cannot be read, lacks a column, or has a value that is none.
    """

    def __init__(self, file: Path) -> None:
        try:
            frame = pd.read_csv(file, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise ConfigError("--runs", file, FILE, first_line(error)) from error
        if missing := [column for column in REQUIRED if column not in frame]:
            raise ConfigError("--runs", file, FILE, f"it has no column {', '.join(missing)}")
        self._rows: dict[str, dict[str, str]] = {row["run_id"]: row for row in frame.to_dict("records")}
        try:
            self._records = {run_id: _record(row) for run_id, row in self._rows.items()}
            self._right = {run_id: _unpacked(row.get("right", "")) for run_id, row in self._rows.items()}
        except (ValueError, zlib.error) as error:
            raise ConfigError("--runs", file, FILE, f"a value cannot be read ({first_line(error)})") from error

    def finished_runs(self) -> list[RunRecord]:
        return list(self._records.values())

    def get_run(self, run_id: str) -> RunRecord | None:
        return self._records.get(run_id)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        values = self._rows[run_id].get("history", "").split() if metric == HISTORY else []
        return [(epoch, float(value)) for epoch, value in enumerate(values, start=1)]

    def read(self, run_id: str, name: str) -> bytes | None:
        """The predictions, as far as they are known: which are right."""
        right = self._right[run_id]
        if name != PREDICTIONS or not len(right):
            return None
        return pd.DataFrame({"image": range(len(right)), "label": 1, "answer": right}).to_csv(index=False).encode()


def _record(row: dict[str, str]) -> RunRecord:
    def group(prefix: str) -> dict[str, str]:
        return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix) and value}

    return RunRecord(
        id=row["run_id"],
        name=row["name"],
        params=group("params."),
        metrics={key: float(value) for key, value in group("metrics.").items()},
        tags=group("tags."),
        ended=float(row["ended"]),
        seconds=float(row["seconds"]),
    )
