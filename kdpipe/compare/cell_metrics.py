"""The metrics of a cell, aggregated over its runs: means, and medians of times."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import fmean, median

from kdpipe.compare.cells import Cell, Key
from kdpipe.runs.names import ONE_THREAD, TIMED_ON
from kdpipe.tracking import RunRecord

QUALITY = ("top5_accuracy", "loss", "brier", "ece", "loss_scaled", "ece_scaled")
COST = ("params", "size_mb", "flops", "activation_mb")
TIMES = tuple(
    f"{name}{threads}" for threads in ("", ONE_THREAD) for name in ("latency_ms", "latency_p95_ms", "images_per_second")
)
SPEEDUPS = tuple(f"speedup/{name}{threads}" for threads in ("", ONE_THREAD) for name in ("latency", "throughput"))
# The columns of CSV and JSON that have the names and units of MLflow.
METRICS = (
    *(f"test/{name}" for name in QUALITY),
    "model/temperature",
    *(f"teacher/{name}" for name in ("accuracy", "top5_accuracy", "loss", "brier", "ece")),
    *(f"teacher/{name}" for name in ("agreement", "agreement_where_wrong", "kl")),
    *(f"{group}/{name}" for group in ("model", "teacher") for name in (*COST, *TIMES)),
    *SPEEDUPS,
)
TIMED = {*SPEEDUPS, *(f"{group}/{name}" for group in ("model", "teacher") for name in TIMES)}
# Settings that leave the architecture, and so the latency, as it is.
NOT_ARCHITECTURE = ("weights", "freeze", "stages", "temperature")


def timed_on(runs: Iterable[RunRecord]) -> str:
    """The hardware on which most of the runs were timed; "" if none was."""
    counted = Counter(run.tags[TIMED_ON] for run in runs if run.tags.get(TIMED_ON))
    return counted.most_common(1)[0][0] if counted else ""


def average(cell: Cell, metric: str) -> float | None:
    """The mean over a cell's runs; for times the median, robust to a busy machine, over the runs timed on the most
    common hardware."""
    values = cell.values(metric)
    if metric in TIMED:
        where = timed_on(cell.runs.values())
        values = {seed: value for seed, value in values.items() if cell.runs[seed].tags.get(TIMED_ON, "") == where}
    if not values:
        return None
    return median(values.values()) if metric in TIMED else fmean(values.values())


def averages(cell: Cell) -> dict[str, float]:
    """All metrics that the cell has."""
    return {metric: value for metric in METRICS if (value := average(cell, metric)) is not None}


def threads_of(cells: Iterable[Cell], where: str) -> str:
    """The suffix of the times to report: one thread if networks were timed that way on this hardware (on a GPU they are
    not)."""
    if not where.startswith("cpu"):
        return ""
    runs = [run for cell in cells for run in cell.runs.values() if run.tags.get(TIMED_ON, "") == where]
    return ONE_THREAD if any(f"model/latency_ms{ONE_THREAD}" in run.metrics for run in runs) else ""


def architecture_of(run: RunRecord, group: str) -> Key:
    """What defines a network, apart from its weights.

    Args:
        group: "model" for the network that the run trained, "teacher" for its teacher.
    """
    settings = {
        key.partition(".")[2]: value
        for key, value in run.params.items()
        if key.startswith(f"{group}.") and not key.startswith(tuple(f"{group}.{name}" for name in NOT_ARCHITECTURE))
    }
    return frozenset({**settings, "dataset": run.params.get("dataset.name", "")}.items())


class Latencies:
    """The latency of each network for one image, in ms. A network is as fast whatever it has learned, so this is the
    median over all runs that timed it on the same hardware.

    Args:
        cells: whose runs timed their networks and their teachers.
        where: the hardware.
    """

    def __init__(self, cells: Iterable[Cell], where: str) -> None:
        cells = list(cells)
        metric = f"latency_ms{threads_of(cells, where)}"
        self._found: defaultdict[tuple[int, Key], list[float]] = defaultdict(list)
        for cell in cells:
            # A teacher's own run ranks last: its students' runs timed it alternating with them.
            for group, rank in (("model", 2 if cell.stage == "teacher" else 0), ("teacher", 1)):
                for run in cell.runs.values():
                    value = run.metrics.get(f"{group}/{metric}")
                    if value is not None and run.tags.get(TIMED_ON, "") == where:
                        self._found[rank, architecture_of(run, group)].append(value)

    def of(self, run: RunRecord, group: str = "model") -> float | None:
        """The latency of the network that a run trained, or of its teacher; None if it was not timed."""
        network = architecture_of(run, group)
        return next((median(self._found[rank, network]) for rank in range(3) if (rank, network) in self._found), None)
