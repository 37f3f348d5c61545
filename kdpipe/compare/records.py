"""Finished runs in one CSV file: to publish them, and to compare them again without their store.

Columns are named as by `mlflow.search_runs` (`run_id`, `params.…`, `metrics.…`, `tags.…`). Beside them, `history` has
the validation accuracy after each epoch, `tests` the test accuracy where it was measured after each epoch, and `right`
a bit for each test image: whether the answer is right.
"""

import base64
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kdpipe.compare.cells import teacher_runs
from kdpipe.compare.disagreement import read_predictions
from kdpipe.runs.names import PREDICTIONS
from kdpipe.settings.addresses import run_and_file
from kdpipe.settings.errors import ConfigError, first_line
from kdpipe.settings.identity import is_place
from kdpipe.tracking import RunRecord

HISTORIES = {"val/accuracy": "history", "test/accuracy": "tests"}  # columns, by metric
OF_AVERAGES = {f"{metric}_ema": f"{column}_ema" for metric, column in HISTORIES.items()}  # where runs have them
REQUIRED = (
    *("run_id", "seconds", "params.seed", "params.model.name", "params.dataset.name", "params.train.epochs"),
    *("params.loss._target_", "metrics.test/accuracy", "tags.kdpipe.stage", "tags.kdpipe.data", "name", "ended"),
)
LISTED = "listed"  # whether a comparison has it, rather than only its students
FILE = "a file of kdpipe.compare --format runs"


class RunSource(Protocol):
    """What a comparison asks of the place where runs are: a store, or a file."""

    @property
    def name(self) -> str: ...

    @property
    def experiment(self) -> str: ...

    def finished_runs(self) -> list[RunRecord]: ...

    def get_run(self, run_id: str) -> RunRecord | None: ...

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]: ...

    def read(self, run_id: str, name: str) -> bytes | None: ...


def runs_to_csv(records: Iterable[RunRecord], source: RunSource) -> str:
    """A row for each run, and for each that its weights or its teacher come from. What says where things are on a
    machine stays out."""
    listed = {record.id: record for record in records}
    rows = [{**_row(record, source), LISTED: True} for record in listed.values()]
    rows += [{**_row(record, source), LISTED: False} for record in _sources(listed, source)]
    frame = pd.DataFrame(rows)
    place = {
        "params": 1,
        "metrics": 2,
        "tags": 3,
        LISTED: 4,
        "history": 5,
        "history_ema": 5,
        "tests": 6,
        "tests_ema": 6,
        "right": 7,
    }
    columns = sorted(frame, key=lambda column: (place.get(column.partition(".")[0], 0), "." in column and column))
    return frame[columns].to_csv(index=False, lineterminator="\n")


def _sources(listed: Mapping[str, RunRecord], source: RunSource) -> list[RunRecord]:
    """The runs that these learned from or began with, and those before them, without these themselves."""
    found = dict(listed)
    waiting = list(listed.values())
    for record in waiting:  # it grows
        begun_with = record.params.get("model.weights", "")
        before = [run_and_file(begun_with)[0]] if begun_with.startswith("runs:/") else []
        for run_id in (*teacher_runs(record), *before):
            if run_id not in found and (run := source.get_run(run_id)):
                found[run_id] = run
                waiting.append(run)
    return [record for run_id, record in found.items() if run_id not in listed]


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
        **{column: _history(source.history(record.id, metric)) for metric, column in HISTORIES.items()},
        **{
            column: text
            for metric, column in OF_AVERAGES.items()
            if (text := _history(source.history(record.id, metric)))
        },
        "right": _packed(source.read(record.id, PREDICTIONS)),
    }


def _history(points: list[tuple[int, float]]) -> str:
    """The values after epochs 1, 2, …; "" where there are not those of all epochs."""
    values = dict(sorted(points))
    return " ".join(f"{value:.8g}" for value in values.values()) if [*values] == [*range(1, len(values) + 1)] else ""


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
        ConfigError: it cannot be read, lacks a column, holds no runs, or has a value that cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.name = self.experiment = str(file)
        try:
            frame = pd.read_csv(file, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise ConfigError("--runs", file, FILE, first_line(error)) from error
        if missing := [column for column in REQUIRED if column not in frame]:
            raise ConfigError("--runs", file, FILE, f"it has no column {', '.join(missing)}")
        if frame.empty:
            raise ConfigError("--runs", file, FILE, "it has no runs")
        self._rows: dict[str, dict[str, str]] = {row["run_id"]: row for row in frame.to_dict("records")}
        try:
            self._records = {run_id: _record(row) for run_id, row in self._rows.items()}
            self._right = {run_id: _unpacked(row.get("right", "")) for run_id, row in self._rows.items()}
        except (ValueError, zlib.error) as error:
            raise ConfigError("--runs", file, FILE, f"a value cannot be read ({first_line(error)})") from error

    def finished_runs(self) -> list[RunRecord]:
        return [record for run_id, record in self._records.items() if self._rows[run_id].get(LISTED) != "False"]

    def get_run(self, run_id: str) -> RunRecord | None:
        return self._records.get(run_id)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        values = self._rows[run_id].get((HISTORIES | OF_AVERAGES).get(metric, ""), "")
        return [(epoch, float(value)) for epoch, value in enumerate(values.split(), start=1)]

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
