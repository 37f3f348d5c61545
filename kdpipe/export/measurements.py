"""The table of an export: size, accuracy, agreement and speed of each network in each format."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.evaluation.costs import BATCH
from kdpipe.evaluation.report import BUSY, was_busy
from kdpipe.export.predictor import Forward
from kdpipe.runs.names import ONE_THREAD
from kdpipe.system.timing import median_ratio, percentile_95, threads, time_interleaved

LEAST_ROUNDS = 5


@dataclass
class Measurement:
    """One network in one format.

    Attributes:
        name: "teacher", "student", "student ONNX", …
        megabytes: of 2²⁰ bytes; parameters and buffers of a PyTorch network, the size of a file.
        accuracy: on the checked images, a fraction.
        one_thread, all_threads: the network, limited to one thread and with all.
        agreement: the share of images with the student's prediction; None for teacher and student.
        difference: the largest difference from the student's logits; None likewise.
        seconds: of each timed call: one image on one thread, one on all, a batch on all.
    """

    name: str
    megabytes: float
    accuracy: float
    one_thread: Forward
    all_threads: Forward
    agreement: float | None = None
    difference: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)


def on_one_thread(forward: Forward) -> Forward:
    """The same, limited to one of PyTorch's threads, whose number has to be set for each call."""

    def limited(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with threads(1):
            return forward(images)

    return limited


def time_measurements(measurements: Sequence[Measurement], images: NDArray[np.uint8], seconds: float) -> None:
    """Time the networks alternately, and store the results in their measurements.

    Args:
        images: uint8 [N, C, H, W]; repeated if they are fewer than a batch.
        seconds: in all.
    """
    batch = np.ascontiguousarray(np.resize(images, (BATCH, *images.shape[1:])))
    single = {measured.name: partial(measured.one_thread, batch[:1]) for measured in measurements}
    several = {measured.name: partial(measured.all_threads, batch[:1]) for measured in measurements}
    batches = {measured.name: partial(measured.all_threads, batch) for measured in measurements}
    for key, calls in {"one": single, "all": several, "batch": batches}.items():
        taken = time_interleaved(calls, seconds / 3, LEAST_ROUNDS)
        for measured in measurements:
            measured.seconds[key] = taken[measured.name]


def table_of(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; times are medians, the speedup is over the first row, one image on one thread."""
    headings = ["", "MB", "accuracy %", "same %", "difference", "ms, 1 thread", "95 %", "ms, all threads", "95 %"]
    headings += ["images/s", f"× {measurements[0].name}"]
    rows = []
    for measured in measurements:
        one, several, batch = (measured.seconds[key] for key in ("one", "all", "batch"))
        rows.append(
            [
                measured.name,
                f"{measured.megabytes:.3f}",
                f"{100 * measured.accuracy:.2f}",
                "" if measured.agreement is None else f"{100 * measured.agreement:.1f}",
                "" if measured.difference is None else f"{measured.difference:.2g}",
                *(f"{1000 * time(taken):.2f}" for taken in (one, several) for time in (median, percentile_95)),
                f"{BATCH / median(batch):,.0f}",
                f"{median_ratio(measurements[0].seconds['one'], one):.2f}",
            ]
        )
    return headings, rows


def legend(measurements: Sequence[Measurement], checked: int, cores: int) -> str:
    """What the columns mean, for this number of images and of threads; and a warning if the machine was busy."""
    versions = f"PyTorch {torch.__version__}"
    if find_spec("onnxruntime"):
        versions += f", onnxruntime {version('onnxruntime')}"
    lines = [
        f"checked on {checked:,} test images; same: predictions that match the student's in PyTorch; difference: the "
        "largest between its logits and the file's",
        f"ms: for one image, median and 95th percentile, on one thread and on all ({cores}); images/s: in batches of "
        f"{BATCH} on all; timed on {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}) with {versions}",
    ]
    times = {}
    for measured in measurements:
        for key, suffix in (("one", ONE_THREAD), ("all", "")):
            times[f"{measured.name}/latency_ms{suffix}"] = median(measured.seconds[key])
            times[f"{measured.name}/latency_p95_ms{suffix}"] = percentile_95(measured.seconds[key])
    return "\n".join([*lines, *([BUSY] if was_busy(times) else [])])
