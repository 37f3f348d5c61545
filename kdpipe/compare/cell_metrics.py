"""The metrics of a cell, aggregated over its runs: means, and medians of times."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, median

from kdpipe.compare.cells import Cell, Key
from kdpipe.runs.names import ONE_THREAD, TIMED_ON
from kdpipe.tracking import RunRecord

QUALITY = ("top5_accuracy", "loss", "brier", "ece")
COST = (
    *("params", "size_mb", "flops", "activation_mb"),
    *("latency_ms", "latency_p95_ms", "images_per_second"),
    *(f"{name}{ONE_THREAD}" for name in ("latency_ms", "latency_p95_ms", "images_per_second")),
)
# The columns of CSV and JSON that have the names and units of MLflow.
METRICS = (
    *(f"test/{name}" for name in (*QUALITY, "loss_scaled", "ece_scaled")),
    "model/temperature",
    *(f"teacher/{name}" for name in ("accuracy", *QUALITY, "agreement", "agreement_where_wrong", "kl")),
    *(f"{group}/{name}" for group in ("model", "teacher") for name in COST),
    *(f"speedup/{name}{threads}" for threads in ("", ONE_THREAD) for name in ("latency", "throughput")),
)
TIMES = ("latency", "images_per_second", "throughput")
# Settings that leave the architecture, and so the latency, as it is.
NOT_ARCHITECTURE = ("weights", "freeze", "stages", "temperature")


def timed_on(cells: Iterable[Cell]) -> str:
    """The hardware on which most of the runs were timed; "" if none was."""
    counted = Counter(filter(None, (run.tags.get(TIMED_ON) for cell in cells for run in cell.runs.values())))
    return counted.most_common(1)[0][0] if counted else ""


def average(cell: Cell, metric: str) -> float | None:
    """The mean over a cell's runs; for times the median, robust to a busy machine, over the runs timed on the most
    common hardware."""
    values = cell.values(metric)
    if not metric.partition("/")[2].startswith(TIMES):
        return fmean(values.values()) if values else None
    where = timed_on([cell])
    times = [value for seed, value in values.items() if cell.runs[seed].tags.get(TIMED_ON, "") == where]
    return median(times) if times else None


def averages(cell: Cell) -> dict[str, float]:
    """All metrics that the cell has."""
    return {metric: value for metric in METRICS if (value := average(cell, metric)) is not None}


def threads_of(cells: Iterable[Cell], where: str) -> str:
    """The suffix of the times to report: one thread if networks were timed that way on this hardware (on a GPU they are
    not)."""
    runs = [run for cell in cells for run in cell.runs.values() if run.tags.get(TIMED_ON, "") == where]
    on_one = where.startswith("cpu") and any(f"model/latency_ms{ONE_THREAD}" in run.metrics for run in runs)
    return ONE_THREAD if on_one else ""


def _architecture(run: RunRecord, group: str) -> Key:
    """What defines the network that a run trained ("model") or its "teacher", apart from its weights."""
    hidden = tuple(f"{group}.{name}" for name in NOT_ARCHITECTURE)
    keys = [key for key in run.params if key.startswith(f"{group}.") and not key.startswith(hidden)]
    settings = {key.partition(".")[2]: run.params[key] for key in keys}
    return frozenset({**settings, "dataset": run.params.get("dataset.name", "")}.items())


class Latencies:
    """The latency of each network for one image, in ms. A network is as fast whatever it has learned, so this is the
    median over all runs of some cells that timed it on the same hardware."""

    def __init__(self, cells: Sequence[Cell], where: str) -> None:
        metric = f"latency_ms{threads_of(cells, where)}"
        self._found: dict[Key, dict[int, list[float]]] = {}  # by network and rank
        for cell in cells:
            # A teacher's own run ranks last: its students' runs timed it alternating with them.
            for group, rank in (("model", 2 if cell.stage == "teacher" else 0), ("teacher", 1)):
                for run in cell.runs.values():
                    if f"{group}/{metric}" in run.metrics and run.tags.get(TIMED_ON, "") == where:
                        ranks = self._found.setdefault(_architecture(run, group), {})
                        ranks.setdefault(rank, []).append(run.metrics[f"{group}/{metric}"])

    def of(self, run: RunRecord, group: str = "model") -> float | None:
        """The latency of the network that a run trained, or of its teacher; None if it was not timed."""
        ranks = self._found.get(_architecture(run, group))
        return median(ranks[min(ranks)]) if ranks else None
