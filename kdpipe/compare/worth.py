"""What a student is worth beside its teacher: quality, size and speed, each a figure over the runs of a cell."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median

from kdpipe.compare.cells import Cell
from kdpipe.compare.comparison import Comparison, Row
from kdpipe.evaluation.report import BUSY, was_busy
from kdpipe.runs.names import ONE_THREAD, TIMED_ON
from kdpipe.tracking import RunRecord

QUALITY = ("top5_accuracy", "loss", "brier", "ece", "loss_scaled", "ece_scaled")
COST = ("params", "size_mb", "flops", "activation_mb")
TIMES = tuple(
    f"{name}{threads}" for threads in ("", ONE_THREAD) for name in ("latency_ms", "latency_p95_ms", "images_per_second")
)
SPEEDUPS = tuple(f"speedup/{name}{threads}" for threads in ("", ONE_THREAD) for name in ("latency", "throughput"))
# What programs are told of each row beside accuracy and size, by the metrics' names.
METRICS = (
    *(f"test/{name}" for name in QUALITY),
    "model/temperature",
    *(f"teacher/{name}" for name in ("accuracy", "top5_accuracy", "loss", "brier", "ece")),
    *(f"teacher/{name}" for name in ("agreement", "agreement_where_wrong", "kl")),
    *(f"{group}/{name}" for group in ("model", "teacher") for name in (*COST, *TIMES)),
    *SPEEDUPS,
)
TIMED = {*SPEEDUPS, *(f"{group}/{name}" for group in ("model", "teacher") for name in TIMES)}
# Of a network, whatever weights it has.
NO_OTHER_NETWORK = ("weights", "freeze", "stages", "temperature")


@dataclass(frozen=True)
class Worth:
    """Teacher, student alone and distilled student side by side, as texts.

    Attributes:
        titles: of the columns that there are values for; the first, of the names, is empty.
        rows: a text for each column.
        notes: what has to be known of the columns.
    """

    titles: list[str]
    rows: list[list[str]]
    notes: list[str]


def timed_on(runs: Iterable[RunRecord]) -> str:
    """The hardware that most of the runs were timed on; "" where none was."""
    counted = Counter(run.tags[TIMED_ON] for run in runs if run.tags.get(TIMED_ON))
    return counted.most_common(1)[0][0] if counted else ""


def average(cell: Cell, metric: str) -> float | None:
    """The mean over a cell's runs. Of times it is the median, over the runs that were timed where most of them were:
    what disturbs a machine makes outliers."""
    values = cell.values(metric)
    if metric in TIMED:
        where = timed_on(cell.runs.values())
        values = {seed: value for seed, value in values.items() if cell.runs[seed].tags.get(TIMED_ON, "") == where}
    if not values:
        return None
    return median(values.values()) if metric in TIMED else fmean(values.values())


def averages(cell: Cell) -> dict[str, float]:
    """The metrics that a cell has values of."""
    return {metric: value for metric in METRICS if (value := average(cell, metric)) is not None}


def threads_of(cells: Iterable[Cell], where: str) -> str:
    """The suffix of the times to look at: on one thread, where networks were timed so on this hardware (on a GPU they
    are not)."""
    if not where.startswith("cpu"):
        return ""
    runs = [run for cell in cells for run in cell.runs.values() if run.tags.get(TIMED_ON, "") == where]
    return ONE_THREAD if any(f"model/latency_ms{ONE_THREAD}" in run.metrics for run in runs) else ""


def network_of(run: RunRecord, group: str) -> frozenset[tuple[str, str]]:
    """What makes a network, apart from its weights.

    Args:
        group: "model" for what the run trained, "teacher" for what taught it.
    """
    settings = {
        key.partition(".")[2]: value
        for key, value in run.params.items()
        if key.startswith(f"{group}.") and not key.startswith(tuple(f"{group}.{name}" for name in NO_OTHER_NETWORK))
    }
    return frozenset({**settings, "dataset": run.params.get("dataset.name", "")}.items())


class Latencies:
    """How long networks take for one image, in ms: one figure for each, because the same network takes the same time
    whatever it has learnt. It is the median over all runs that were timed on one hardware.

    Args:
        cells: whose runs timed their networks and their teachers.
        where: the hardware.
    """

    def __init__(self, cells: Iterable[Cell], where: str) -> None:
        cells = list(cells)
        metric = f"latency_ms{threads_of(cells, where)}"
        # A teacher's own run comes last: its students' runs timed it in turns with them.
        self._found: list[dict[frozenset[tuple[str, str]], list[float]]] = [{}, {}, {}]
        for cell in cells:
            for run in cell.runs.values():
                if run.tags.get(TIMED_ON, "") != where:
                    continue
                for group, found in (
                    ("model", self._found[2 * (cell.stage == "teacher")]),
                    ("teacher", self._found[1]),
                ):
                    if (value := run.metrics.get(f"{group}/{metric}")) is not None:
                        found.setdefault(network_of(run, group), []).append(value)

    def of(self, run: RunRecord, group: str = "model") -> float | None:
        """Of what a run trained, or of what taught it; None where that was not timed."""
        network = network_of(run, group)
        return next((median(found[network]) for found in self._found if network in found), None)


def students_of(decisive: Row) -> tuple[Cell | None, Cell]:
    """The student alone, on the seeds of the distilled one, and the distilled one."""
    alone = decisive.control.only(decisive.cell.runs) if decisive.control else None
    return alone if alone and alone.runs else None, decisive.cell


def worth_of(comparison: Comparison) -> Worth | None:
    """The decisive student beside the same student alone and its teacher; None where there is no distilled student.

    What a teacher costs and how good it is was measured in its students' runs. The student alone is the same network as
    the distilled one, and so has its costs and times.
    """
    decisive = comparison.decisive
    if decisive is None:
        return None
    alone, distilled = students_of(decisive)
    where = timed_on(distilled.runs.values())
    threads = threads_of([distilled], where)
    costs = ("size_mb", "flops", f"latency_ms{threads}", "images_per_second")
    metrics = averages(distilled)
    rows: list[tuple[str, list[float | None]]] = []
    has_teacher = bool(distilled.teacher_run)  # two students have none
    if has_teacher:
        name = f"teacher {distilled.first.params.get('teacher.name', '')}"
        quality = [comparison.teacher_accuracy, metrics.get("teacher/ece"), metrics.get("teacher/loss")]
        rows.append((name, [*quality, *(metrics.get(f"teacher/{cost}") for cost in costs)]))
    for name, cell in (("student alone", alone), ("student distilled", distilled)):
        if cell:
            quality = [average(cell, f"test/{metric}") for metric in ("accuracy", "ece", "loss")]
            rows.append((name, [*quality, *(metrics.get(f"model/{cost}") for cost in costs)]))
    unit, size_of_unit = _unit([values[4] for _, values in rows])
    columns = [
        ("test %", lambda value: f"{100 * value:.2f}"),
        ("ECE %", lambda value: f"{100 * value:.2f}"),
        ("loss", lambda value: f"{value:.3f}"),
        ("MB", lambda value: f"{value:.3f}"),
        (unit, lambda value: f"{value / size_of_unit:,.1f}"),
        ("ms", lambda value: f"{value:.3g}" if value < 1000 else f"{value:,.0f}"),
        ("images/s", lambda value: f"{value:,.0f}"),
    ]
    texts = {
        title: ["–" if values[number] is None else text(values[number]) for _, values in rows]
        for number, (title, text) in enumerate(columns)
        if any(values[number] is not None for _, values in rows)
    }
    if has_teacher:
        ratios = {
            "smaller than teacher": _smaller(metrics),
            "faster than teacher": _faster(metrics.get(f"speedup/latency{threads}")),
        }
        texts |= {title: ["", *[text] * (len(rows) - 1)] for title, text in ratios.items() if text}
    notes = ["loss and ECE (expected calibration error) on the test images"] if "ECE %" in texts else []
    if "ms" in texts:
        one, several = (" on one thread", " on all") if threads else ("", "")
        here = f", timed on {where}" if where else ""
        notes.append(f"ms for one image{one}, images/s 64 at a time{several}{here}")
        if was_busy(metrics):
            notes.append(BUSY)
    lines = [[name, *(column[number] for column in texts.values())] for number, (name, _) in enumerate(rows)]
    return Worth(["", *texts], lines, notes)


def _unit(flops: Iterable[float | None]) -> tuple[str, float]:
    least = min((value for value in flops if value is not None), default=0)
    return ("GFLOPs", 1e9) if least >= 1e9 else ("MFLOPs", 1e6)


def _smaller(metrics: dict[str, float]) -> str:
    if not {"model/size_mb", "teacher/size_mb"} <= metrics.keys():
        return ""
    mine, teacher = metrics["model/size_mb"], metrics["teacher/size_mb"]
    return f"{100 * (1 - mine / teacher):.1f} %" if mine <= teacher else "it is larger"


def _faster(speedup: float | None) -> str:
    if speedup is None:
        return ""
    return f"{speedup:.2f} ×" if speedup >= 1 else f"it is slower ({speedup:.2f} ×)"
