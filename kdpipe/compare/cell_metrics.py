"""The metrics of a cell, aggregated over its runs: means, and medians of times."""

from collections import Counter
from collections.abc import Iterable
from statistics import fmean, median

from kdpipe.compare.cells import Cell, Key
from kdpipe.runs.names import ONE_THREAD, TIMED_ON
from kdpipe.tracking import RunRecord

QUALITY = ("balanced_accuracy", "macro_f1", "top5_accuracy", "loss", "brier", "ece")
COST = (
    *("params", "size_mb", "flops", "activation_mb"),
    *("latency_ms", "latency_p95_ms", "images_per_second"),
    *(f"{name}{ONE_THREAD}" for name in ("latency_ms", "latency_p95_ms", "images_per_second")),
)
# The columns of CSV and JSON that have the names and units of MLflow.
METRICS = (
    *(f"test/{name}" for name in (*QUALITY, "loss_scaled", "ece_scaled")),
    "model/temperature",
    *(f"teacher/{name}" for name in ("accuracy", "val_accuracy", *QUALITY)),
    *(f"teacher/{name}" for name in ("agreement", "agreement_where_wrong", "kl")),
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
    """The mean over a cell's runs."""
    values = cell.values(metric)
    return fmean(values.values()) if values else None


def averages(cell: Cell, timings: "Timings") -> dict[str, float]:
    """All metrics that the cell has: means over its runs, and the times of its networks."""
    found = {
        metric: timings.of(cell.first, metric) if _is_time(metric) else average(cell, metric) for metric in METRICS
    }
    return {metric: value for metric, value in found.items() if value is not None}


def _is_time(metric: str) -> bool:
    return metric.partition("/")[2].startswith(TIMES)


def _measured(run: RunRecord, metric: str) -> tuple[object, ...]:
    """What a metric of time measures, whichever run did: its name without the network's place, and the network; for
    `speedup/…` the two networks."""
    group, _, name = metric.partition("/")
    if group == "speedup":
        return name, _architecture(run, "model"), _architecture(run, "teacher")
    return name, _architecture(run, group)


def _architecture(run: RunRecord, group: str) -> Key:
    """What defines the network that a run trained ("model") or its "teacher", apart from its weights."""
    hidden = tuple(f"{group}.{name}" for name in NOT_ARCHITECTURE)
    keys = [key for key in run.params if key.startswith(f"{group}.") and not key.startswith(hidden)]
    settings = {key.partition(".")[2]: run.params[key] for key in keys}
    return frozenset({**settings, "dataset": run.params.get("dataset.name", "")}.items())


class Timings:
    """How fast each network is: one figure, wherever it is shown. A network is as fast whatever it has learned, so this
    is the median over all runs of some cells that timed it on the same hardware. Runs that timed it alternating with
    its teacher or student come first: only these compare the two.

    Args:
        where: the hardware; times on others are left out.

    Attributes:
        threads: the suffix of the metrics to show: one thread if networks were timed that way (on a GPU they are not).
    """

    def __init__(self, cells: Iterable[Cell], where: str) -> None:
        self.where = where
        runs = [run for cell in cells for run in cell.runs.values() if run.tags.get(TIMED_ON, "") == where]
        on_one = any(f"model/latency_ms{ONE_THREAD}" in run.metrics for run in runs)
        self.threads = ONE_THREAD if where.startswith("cpu") and on_one else ""
        self._found: dict[tuple[object, ...], dict[int, list[float]]] = {}  # by metric and networks, then by rank
        for run in runs:
            for metric in (metric for metric in METRICS if metric in run.metrics and _is_time(metric)):
                together = metric.replace("model/", "teacher/") in run.metrics
                # A teacher's own run comes last: its students do not take their time from there.
                rank = 0 if together else 2 if run.tags["kdpipe.stage"] == "teacher" else 1
                ranks = self._found.setdefault(_measured(run, metric), {})
                ranks.setdefault(rank, []).append(run.metrics[metric])

    def of(self, run: RunRecord, metric: str) -> float | None:
        """A time of the network that a run trained (`model/…`), of its teacher (`teacher/…`), or how many times faster
        the one is than the other (`speedup/…`); None if it was not timed."""
        ranks = self._found.get(_measured(run, metric))
        return median(ranks[min(ranks)]) if ranks else None
