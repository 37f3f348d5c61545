"""The distilled student next to the same student alone and its teacher: quality, size and speed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdpipe.compare.cell_metrics import average, averages
from kdpipe.compare.cells import Cell
from kdpipe.compare.comparison import Comparison, ComparisonRow
from kdpipe.evaluation.report import BUSY, was_busy


@dataclass(frozen=True)
class StudentSummary:
    """A table of teacher, student alone and distilled student."""

    headings: list[str]  # of the columns that have values; that of the names is empty
    rows: list[list[str]]  # a text for each column
    notes: list[str]  # how to read the columns


def students_of(decisive: ComparisonRow) -> tuple[Cell | None, Cell]:
    """The student alone, on the seeds of the distilled student, and the distilled student."""
    alone = decisive.control.only(decisive.cell.runs) if decisive.control else None
    return alone if alone and alone.runs else None, decisive.cell


def summarize_student(comparison: Comparison) -> StudentSummary | None:
    """Summarize the decisive student; None if no student was distilled. The students' runs measured their teacher. The
    student alone is the same network as the distilled one, so it has its cost and times."""
    if comparison.decisive is None:
        return None
    alone, distilled = students_of(comparison.decisive)
    timings = comparison.timings
    where, threads = timings.where, timings.threads
    costs = ("size_mb", "flops", f"latency_ms{threads}", "images_per_second")
    metrics = averages(distilled, timings)
    validation = metrics.get("teacher/val_accuracy")
    rows: dict[str, list[float | None]] = {}
    if distilled.teacher_run:  # two students that learn from each other have none
        quality = [comparison.teacher_accuracy, metrics.get("teacher/ece"), metrics.get("teacher/loss")]
        values = [*quality, *(metrics.get(f"teacher/{cost}") for cost in costs)]
        if any(value is not None for value in values):  # of answers in a file, nothing may be known
            rows[f"teacher {distilled.first.params.get('teacher.name', '')}"] = values
    for name, cell in (("student alone", alone), ("student distilled", distilled)):
        if cell:
            quality = [average(cell, f"test/{metric}") for metric in (comparison.metric, "ece", "loss")]
            rows[name] = [*quality, *(metrics.get(f"model/{cost}") for cost in costs)]
    columns = _columns(list(rows.values()))
    if distilled.teacher_run:
        ratios = _ratios(metrics, threads)
        columns |= {heading: ["", *[text] * (len(rows) - 1)] for heading, text in ratios.items()}
    lines = [[name, *(column[number] for column in columns.values())] for number, name in enumerate(rows)]
    notes = [] if validation is None else [f"its teacher gets {100 * validation:.2f} % of the validation images right"]
    notes += ["loss and ECE (expected calibration error) on the test images"] if "ECE %" in columns else []
    if "ms" in columns:
        one, several = (" on one thread", " on all") if threads else ("", "")
        here = f", timed on {where}" if where else ""
        notes.append(f"ms for one image{one}, images/s 64 at a time{several}{here}")
        if was_busy(metrics):
            notes.append(BUSY)
    return StudentSummary(["", *columns], lines, notes)


def _columns(rows: Sequence[Sequence[float | None]]) -> dict[str, list[str]]:
    """The texts of the columns that have values, by heading."""
    least_flops = min((row[4] for row in rows if row[4] is not None), default=0)
    flops, unit = ("GFLOPs", 1e9) if least_flops >= 1e9 else ("MFLOPs", 1e6)
    columns: dict[str, Callable[[float], str]] = {
        "test %": lambda value: f"{100 * value:.2f}",
        "ECE %": lambda value: f"{100 * value:.2f}",
        "loss": lambda value: f"{value:.3f}",
        "MB": lambda value: f"{value:.3f}",
        flops: lambda value: f"{value / unit:,.1f}",
        "ms": lambda value: f"{value:.3g}" if value < 1000 else f"{value:,.0f}",
        "images/s": lambda value: f"{value:,.0f}",
    }
    return {
        heading: ["–" if value is None else text(value) for value in values]
        for (heading, text), values in zip(columns.items(), zip(*rows, strict=True), strict=True)
        if any(value is not None for value in values)
    }


def _ratios(metrics: Mapping[str, float], threads: str) -> dict[str, str]:
    """How much smaller and faster the student is than its teacher, by heading."""
    texts = {}
    student, teacher = metrics.get("model/size_mb"), metrics.get("teacher/size_mb")
    if student is not None and teacher is not None:
        smaller = f"{100 * (1 - student / teacher):.1f} %"
        texts["smaller than teacher"] = smaller if student <= teacher else "it is larger"
    if (speedup := metrics.get(f"speedup/latency{threads}")) is not None:
        texts["faster than teacher"] = f"{speedup:.2f} ×" if speedup >= 1 else f"it is slower ({speedup:.2f} ×)"
    return texts
