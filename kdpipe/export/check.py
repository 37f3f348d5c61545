"""Exported files held against the PyTorch network that they are of: the same answers, how fast, how large."""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kdpipe.evaluation.costs import BATCH
from kdpipe.evaluation.report import BUSY, render, was_busy
from kdpipe.export.deployed import Answer
from kdpipe.runs.names import ONE_THREAD
from kdpipe.system.timing import median_ratio, percentile_95, threads, time_in_turn

Logits = NDArray[np.float32]
TOLERANCE = 1e-3  # of a difference between logits, times the largest of them where that is above 1
LEAST_ROUNDS = 5
TEACHER, STUDENT = "teacher", "student"


@dataclass
class Row:
    """What is known of one network in one format.

    Attributes:
        name: "teacher", "student", "student ONNX", …
        megabytes: of 2²⁰ bytes; of PyTorch's networks parameters and buffers, of files all of them.
        accuracy: on the checked images, a fraction.
        same: share of the images that get the student's answer; None of teacher and student.
        difference: the largest between its logits and the student's; None likewise.
        seconds: that each call took: of one image on one thread, of one on all threads, of 64 on all.
    """

    name: str
    megabytes: float
    accuracy: float
    same: float | None = None
    difference: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)


def evenly(positions: torch.Tensor, count: int) -> torch.Tensor:
    """So many of these positions, evenly spaced; all where there are fewer."""
    if len(positions) <= count:
        return positions
    return positions[torch.linspace(0, len(positions) - 1, count).round().long()]


def compare(name: str, megabytes: float, logits: Logits, labels: NDArray[np.int64], expected: Logits) -> Row:
    """A file's row, by its logits [N, classes] and PyTorch's."""
    return Row(
        name,
        megabytes,
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
        same=float((logits.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        difference=float(np.abs(logits - expected).max()),
    )


def problem_of_float(logits: Logits, expected: Logits) -> str | None:
    """Why a file in float is not the network that it should be, None where it is."""
    if problem := problem_of_shape(logits, expected):
        return problem
    accepted = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(logits - expected).max())
    if difference > accepted:
        return f"its logits differ from PyTorch's by up to {difference:.3g}, {accepted:.3g} is accepted"
    return None


def problem_of_int8(logits: Logits, expected: Logits, labels: NDArray[np.int64], most: float) -> str | None:
    """Why a quantised file is too bad, None where it is not.

    Args:
        most: points of accuracy that it may lose.
    """
    if problem := problem_of_shape(logits, expected):
        return problem
    accuracy, before = (float(100 * (answer.argmax(axis=1) == labels).mean()) for answer in (logits, expected))
    if round(before - accuracy, 6) > most:
        lost = f"it has {accuracy:.2f} % on {len(labels):,} test images, PyTorch {before:.2f} %"
        return f"{lost}: a loss of {before - accuracy:.2f} points, --max-loss {most:g} is accepted"
    return None


def problem_of_shape(logits: Logits, expected: Logits) -> str | None:
    if logits.shape != expected.shape:
        return f"it gives logits {list(logits.shape)} instead of {list(expected.shape)}"
    if not np.isfinite(logits).all():
        return "some of its logits are no finite numbers"
    return None


@dataclass(frozen=True)
class Timed:
    """How a network is asked in a measurement: on one thread and on all."""

    one: Answer
    all: Answer
    is_torch: bool


def time_rows(rows: Sequence[Row], works: Mapping[str, Timed], images: NDArray[np.uint8], seconds: float) -> None:
    """Write into each row how long its network takes, all in turns.

    Args:
        works: by the rows' names.
        images: uint8 [N, C, H, W], any; repeated where they are fewer than a batch.
        seconds: for how long, in all.
    """
    batch = np.ascontiguousarray(np.resize(images, (BATCH, *images.shape[1:])))
    cores = torch.get_num_threads()

    def call(work: Timed, answer: Answer, count: int, number: int) -> Callable[[], object]:
        asked = batch[:count]

        def once() -> object:
            with threads(number) if work.is_torch and number != cores else nullcontext():
                return answer(asked)

        return once

    measurements = {"one": (1, 1), "all": (1, cores), "batch": (BATCH, cores)}
    for key, (count, number) in measurements.items():
        calls = {
            row.name: call(works[row.name], works[row.name].one if number == 1 else works[row.name].all, count, number)
            for row in rows
        }
        for row, taken in zip(
            rows, time_in_turn(calls, seconds / len(measurements), LEAST_ROUNDS).values(), strict=True
        ):
            row.seconds[key] = taken


HEADINGS = (
    *("", "MB", "accuracy %", "same %", "difference"),
    *("ms, 1 thread", "95 %", "ms, all threads", "95 %", "images/s", "times faster"),
)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table's, in the order of `HEADINGS`; times are medians, faster than the first row on one thread."""
    lines = []
    for row in rows:
        one, several, batch = (row.seconds[key] for key in ("one", "all", "batch"))
        lines.append(
            [
                row.name,
                f"{row.megabytes:.3f}",
                f"{100 * row.accuracy:.2f}",
                "" if row.same is None else f"{100 * row.same:.1f}",
                "" if row.difference is None else f"{row.difference:.2g}",
                *(f"{1000 * number:.2f}" for number in (median(one), percentile_95(one))),
                *(f"{1000 * number:.2f}" for number in (median(several), percentile_95(several))),
                f"{BATCH / median(batch):,.0f}",
                f"{median_ratio(rows[0].seconds['one'], one):.2f}",
            ]
        )
    return lines


def as_table(rows: Sequence[Row]) -> str:
    table = Table(box=SIMPLE_HEAD)
    for number, heading in enumerate(headings(rows)):
        table.add_column(heading, justify="right" if number else "left")
    for line in cells(rows):
        table.add_row(*line)
    return render(table)


def as_markdown(rows: Sequence[Row]) -> str:
    lines = [headings(rows), ["---"] + ["---:"] * (len(HEADINGS) - 1), *cells(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headings(rows: Sequence[Row]) -> list[str]:
    return [*HEADINGS[:-1], f"× {rows[0].name}"]


def legend(rows: Sequence[Row], checked: int, cores: int) -> str:
    """What the columns mean."""
    versions = f"PyTorch {torch.__version__}"
    if find_spec("onnxruntime"):
        versions += f", onnxruntime {version('onnxruntime')}"
    lines = [
        f"checked on {checked:,} test images; same, difference: answers like those of the student in PyTorch, and the "
        "largest difference of logits",
        f"ms: of one image, median and 95th percentile, on one thread and on all ({cores}); images/s: in batches of "
        f"{BATCH} on all; timed on {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}) with {versions}",
    ]
    return "\n".join([*lines, *([BUSY] if were_busy(rows) else [])])


def were_busy(rows: Sequence[Row]) -> bool:
    """Whether other work has disturbed the timing, as `report.was_busy` has it."""
    times = {}
    for row in rows:
        for key, suffix in (("one", ONE_THREAD), ("all", "")):
            times[f"{row.name}/latency_ms{suffix}"] = median(row.seconds[key])
            times[f"{row.name}/latency_p95_ms{suffix}"] = percentile_95(row.seconds[key])
    return was_busy(times)
