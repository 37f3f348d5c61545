"""The table of an export: size, accuracy, agreement and speed of each network in each format."""

import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
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
        one_thread, all_threads: what is timed.
        is_torch: it uses PyTorch's threads, whose number has to be set for each call.
        agreement: the share of images with the student's prediction; None for teacher and student.
        difference: the largest difference from the student's logits; None likewise.
        seconds: of each timed call: one image on one thread, one on all, a batch on all.
    """

    name: str
    megabytes: float
    accuracy: float
    one_thread: Forward
    all_threads: Forward
    is_torch: bool
    agreement: float | None = None
    difference: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)


def time_measurements(measurements: Sequence[Measurement], images: NDArray[np.uint8], seconds: float) -> None:
    """Time the networks, taking turns, and store the results in their measurements.

    Args:
        images: uint8 [N, C, H, W]; repeated if they are fewer than a batch.
        seconds: in all.
    """
    batch = np.ascontiguousarray(np.resize(images, (BATCH, *images.shape[1:])))
    cores = torch.get_num_threads()

    def call(measurement: Measurement, count: int, number: int) -> Callable[[], object]:
        forward = measurement.one_thread if number == 1 else measurement.all_threads
        inputs = batch[:count]

        def once() -> object:
            with threads(number) if measurement.is_torch and number != cores else nullcontext():
                return forward(inputs)

        return once

    timings = {"one": (1, 1), "all": (1, cores), "batch": (BATCH, cores)}
    for key, (count, number) in timings.items():
        calls = {measurement.name: call(measurement, count, number) for measurement in measurements}
        taken = time_interleaved(calls, seconds / len(timings), LEAST_ROUNDS)
        for measurement in measurements:
            measurement.seconds[key] = taken[measurement.name]


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
                *(f"{1000 * number:.2f}" for number in (median(one), percentile_95(one))),
                *(f"{1000 * number:.2f}" for number in (median(several), percentile_95(several))),
                f"{BATCH / median(batch):,.0f}",
                f"{median_ratio(measurements[0].seconds['one'], one):.2f}",
            ]
        )
    return headings, rows


def legend(measurements: Sequence[Measurement], checked: int, cores: int) -> str:
    """What the columns mean.

    Args:
        checked: the number of images.
        cores: the number of threads that "all" means.
    """
    versions = f"PyTorch {torch.__version__}"
    if find_spec("onnxruntime"):
        versions += f", onnxruntime {version('onnxruntime')}"
    lines = [
        f"checked on {checked:,} test images; same: predictions that match the student's in PyTorch; difference: the "
        "largest between its logits and the file's",
        f"ms: for one image, median and 95th percentile, on one thread and on all ({cores}); images/s: in batches of "
        f"{BATCH} on all; timed on {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}) with {versions}",
    ]
    return "\n".join([*lines, *([BUSY] if were_busy(measurements) else [])])


def were_busy(measurements: Sequence[Measurement]) -> bool:
    """Whether other work disturbed the timing, by the rule of `was_busy`."""
    times = {}
    for measured in measurements:
        for key, suffix in (("one", ONE_THREAD), ("all", "")):
            times[f"{measured.name}/latency_ms{suffix}"] = median(measured.seconds[key])
            times[f"{measured.name}/latency_p95_ms{suffix}"] = percentile_95(measured.seconds[key])
    return was_busy(times)
