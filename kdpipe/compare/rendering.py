"""Comparisons to read: text for a terminal, an HTML page to share, and Markdown for MLflow."""

import base64
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from jinja2 import Environment, PackageLoader

from kdpipe.compare.cells import differences
from kdpipe.compare.comparison import Comparison
from kdpipe.compare.frames import displayed_rows
from kdpipe.compare.statistics import Interval
from kdpipe.compare.student_summary import summarize_student
from kdpipe.system.tables import markdown_table, text_table

PUBLISHED = ("published", "difference")  # shown if any row has a published accuracy
WHERE = "where rows differ"
RIGHT = ("seeds", "epochs", "val %", "test %", "gain", *PUBLISHED, "MB", "seconds")
COLUMNS = ("network", "data set", "stage", "loss", *RIGHT, WHERE)


class Picture(NamedTuple):
    """A PNG and its caption."""

    content: bytes
    caption: str


def with_interval(value: Interval | None, sign: str = "") -> str:
    """In points: 52.31 [51.40, 53.22], without brackets if there is no interval."""
    if value is None:
        return "–"
    text = f"{100 * value.mean:{sign}.2f}"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{100 * value.low:{sign}.2f}, {100 * value.high:{sign}.2f}]"


def row_texts(comparison: Comparison) -> list[dict[str, str]]:
    """The texts of each row by column."""
    rows = displayed_rows(comparison)
    texts = []
    for (row, remark), difference in zip(rows, differences([row.cell for row, _ in rows]), strict=True):
        params = row.cell.first.params
        runs = row.cell.runs.values()
        published = row.published
        texts.append(
            {
                "network": params["model.name"],
                "data set": params["dataset.name"],
                "stage": row.cell.stage,
                "loss": row.cell.loss + (f" ← {remark}" if remark else ""),
                "seeds": str(len(row.cell.runs)),
                "epochs": params["train.epochs"],
                "val %": with_interval(row.validation),
                "test %": with_interval(row.test),
                "gain": with_interval(row.gain, "+") if row.cell.has_gain else "",
                "published": f"{100 * published.accuracy:.2f} {published.epoch}" if published else "",
                "difference": with_interval(published.difference, "+") if published else "",
                "MB": f"{fmean(run.metrics.get('model/size_mb', math.nan) for run in runs):.3f}",
                "seconds": f"{fmean(run.seconds for run in runs):.0f}",
                WHERE: difference,
            }
        )
    return texts


def _columns(rows: Sequence[Mapping[str, str]], left_out: Sequence[str] = ()) -> list[str]:
    unused = () if any(texts["published"] for texts in rows) else PUBLISHED
    return [column for column in COLUMNS if column not in (*left_out, *unused)]


def _cut(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[list[str]]:
    return [[texts[column] for column in columns] for texts in rows]


def _left(columns: Sequence[str]) -> list[int]:
    return [number for number, column in enumerate(columns) if column not in RIGHT]


def to_text(comparison: Comparison) -> str:
    """For a terminal: the rows, the student's summary, the verdict and its notes."""
    rows = row_texts(comparison)
    columns = _columns(rows, () if any(texts[WHERE] for texts in rows) else (WHERE,))
    lines = [text_table(columns, _cut(rows, columns), _left(columns))]
    if summary := summarize_student(comparison):
        lines += ["", student_title(comparison), text_table(summary.headings, summary.rows)]
        lines += [*(f"  {note}" for note in summary.notes), *disagreement_sentence(comparison), ""]
    lines += [f"verdict: {comparison.verdict}", *(f"  · {note}" for note in comparison.notes)]
    return "\n".join(lines)


def student_title(comparison: Comparison) -> str:
    """The decisive student and the number of its seeds; "" without one."""
    if comparison.decisive is None:
        return ""
    cell = comparison.decisive.cell
    return f"{cell.title}, {len(cell.runs)} seed{'s' if len(cell.runs) > 1 else ''}"


def disagreement_sentence(comparison: Comparison) -> list[str]:
    """The images gained and lost as a sentence; empty if unknown."""
    disagreement, decisive = comparison.disagreement, comparison.decisive
    if disagreement is None or decisive is None:
        return []
    seeds = len(decisive.cell.runs)
    some = f" (on {disagreement.gained.number} of {seeds} seeds)" if disagreement.gained.number < seeds else ""
    gained, lost = (_percent(value) for value in (disagreement.gained, disagreement.lost))
    return [
        f"of the test images the distilled student gets {gained} right that the student alone got wrong, "
        f"and {lost} the other way round{some}"
    ]


def _percent(value: Interval) -> str:
    """8.1 % [7.2, 9.0], without brackets if there is no interval."""
    text = f"{100 * value.mean:.1f} %"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{100 * max(value.low, 0):.1f}, {100 * min(value.high, 1):.1f}]"


def to_html(title: str, comparisons: Sequence[Comparison], pictures: Sequence[Mapping[str, Picture]]) -> str:
    """A self-contained page; `pictures` by file name for each comparison."""
    texts = [row_texts(comparison) for comparison in comparisons]
    columns = _columns([row for rows in texts for row in rows])
    parts = [
        {
            "verdict": comparison.verdict,
            "notes": comparison.notes,
            "student": student_title(comparison),
            "summary": summarize_student(comparison),
            "disagreement": disagreement_sentence(comparison),
            "pictures": [
                (name, picture.caption, base64.b64encode(picture.content).decode()) for name, picture in found.items()
            ],
            "rows": _cut(rows, columns),
            "best": [number for number, (_, remark) in enumerate(displayed_rows(comparison)) if remark],
        }
        for comparison, rows, found in zip(comparisons, texts, pictures, strict=True)
    ]
    page = Environment(autoescape=True, loader=PackageLoader("kdpipe.compare", "")).get_template("page.html.j2")
    return page.render(title=title, parts=parts, columns=columns, left=_left(columns))


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """For the description of a run in MLflow's UI, which is limited to 8,000 characters."""
    lines = []
    for comparison in comparisons:
        notes = [*disagreement_sentence(comparison), *comparison.notes]
        lines += [f"**{comparison.verdict}**", "", *(f"- {note}" for note in notes), ""]
        if summary := summarize_student(comparison):
            lines += markdown_table(summary.headings, summary.rows).split("\n")
            lines += ["", *(f"- {note}" for note in summary.notes), ""]
        rows = row_texts(comparison)
        columns = _columns(rows, ("network", "data set", "epochs", "MB", "seconds", WHERE))
        lines += [*markdown_table(columns, _cut(rows, columns), _left(columns)).split("\n"), ""]
    while len("\n".join(lines)) > 7800:
        lines = [*lines[:-2], "the rest is in comparison.txt among the artifacts"]
    return "\n".join(lines)


def picture_files(pictures: Sequence[Mapping[str, Picture]]) -> dict[str, bytes]:
    """The pictures of all comparisons by file name: heatmap.png, or 1_heatmap.png for several comparisons."""
    return {
        f"{number}_{name}" if len(pictures) > 1 else name: picture.content
        for number, drawn in enumerate(pictures, start=1)
        for name, picture in drawn.items()
    }
