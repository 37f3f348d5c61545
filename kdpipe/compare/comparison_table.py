"""Comparisons to read: text for a terminal, an HTML page to share, and Markdown for MLflow."""

import base64
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from jinja2 import Environment, PackageLoader

from kdpipe.compare.comparison import Comparison
from kdpipe.compare.disagreement import Disagreement
from kdpipe.compare.frames import displayed_rows
from kdpipe.compare.statistics import Interval
from kdpipe.compare.student_summary import StudentSummary, summarize_student
from kdpipe.system.tables import markdown_table, text_table

PUBLISHED = ("published", "difference")  # shown if any row has a published accuracy
ADJUSTED = "gain, adjusted"  # shown if several rows are compared with one student alone
WHERE = "where rows differ"
RIGHT = ("seeds", "epochs", "val %", "test %", "gain", ADJUSTED, *PUBLISHED, "MB", "seconds")
COLUMNS = ("network", "data set", "stage", "loss", *RIGHT, WHERE)
# Left out on a narrow terminal, the first one first.
OPTIONAL = ("seconds", "MB", "epochs", "data set", ADJUSTED, "val %", "network", "seeds", WHERE)
SHORT_WORDS = {"alpha ": "α ", "temperature ": "T ", "weight ": "w ", "CrossEntropy": "CE"}


class Picture(NamedTuple):
    """A PNG and its caption."""

    content: bytes
    caption: str


def with_interval(value: Interval | None, sign: str = "") -> str:
    """In points: 52.31 [51.40, 53.22]; 52.31 for one seed, 52.31 [no spread] for seeds that are all equal."""
    return "–" if value is None else _bracketed(value, f"{sign}.2f")


def _bracketed(value: Interval, form: str, unit: str = "") -> str:
    mean, low, high = (f"{100 * number:{form}}" for number in (value.mean, *value.ends))
    if value.low is None:
        return f"{mean}{unit} [no spread]" if value.has_no_spread else f"{mean}{unit}"
    return f"{mean}{unit} [{low}, {high}]"


def row_texts(comparison: Comparison) -> list[dict[str, str]]:
    """The texts of each row by column."""
    texts = []
    for row, remark, difference in displayed_rows(comparison):
        params, runs = row.cell.first.params, row.cell.runs.values()
        published = row.published if comparison.published else None
        texts.append(
            {
                "network": params["model.name"],
                "data set": params["dataset.name"],
                "stage": row.cell.stage,
                "loss": row.cell.loss + (f" ← {remark}" if remark else ""),
                "seeds": str(len(runs)),
                "epochs": params["train.epochs"],
                "val %": with_interval(row.validation),
                "test %": with_interval(row.test),
                "gain": with_interval(row.gain, "+") if row.cell.has_gain else "",
                ADJUSTED: with_interval(row.adjusted_gain, "+") if row.adjusted_gain else "",
                "published": f"{100 * published.accuracy:.2f} {published.epoch}" if published else "",
                "difference": with_interval(published.difference, "+") if published else "",
                "MB": f"{fmean(run.metrics.get('model/size_mb', math.nan) for run in runs):.3f}",
                "seconds": f"{fmean(run.seconds for run in runs):.0f}",
                WHERE: difference,
            }
        )
    return texts


def _table(rows: Sequence[Mapping[str, str]], left_out: Sequence[str]) -> tuple[list[str], list[list[str]], list[int]]:
    """Columns, the texts of the rows in them, and the columns that are aligned to the left."""
    unused = () if any(texts["published"] for texts in rows) else PUBLISHED
    if not any(texts[ADJUSTED] for texts in rows):
        unused = (*unused, ADJUSTED)
    columns = [column for column in COLUMNS if column not in (*left_out, *unused)]
    left = [number for number, column in enumerate(columns) if column not in RIGHT]
    return columns, [[texts[column] for column in columns] for texts in rows], left


def to_text(comparison: Comparison, width: int | None = None) -> str:
    """For a terminal: the rows, the student's summary, the verdict and its notes.

    Args:
        width: of the tables' lines (default: the terminal's).
    """
    rows = row_texts(comparison)
    table = _table(rows, () if any(texts[WHERE] for texts in rows) else (WHERE,))
    # Next to a published accuracy the difference from it counts more than the gain.
    optional = (*OPTIONAL, "gain", PUBLISHED[0]) if PUBLISHED[0] in table[0] else OPTIONAL
    lines = [text_table(*table, width=width, optional=optional, short=SHORT_WORDS)]
    if summary := summarize_student(comparison):
        lines += ["", student_title(comparison), _summary_table(summary, width)]
        lines += [*(f"  {note}" for note in summary.notes), *disagreement_sentence(comparison), ""]
    lines += [f"verdict: {comparison.verdict}", *(f"  · {note}" for note in comparison.notes)]
    return "\n".join(lines)


def _summary_table(summary: StudentSummary, width: int | None) -> str:
    optional = ("loss", "smaller than teacher", "images/s", "MFLOPs", "GFLOPs", "ECE %", "MB")
    return text_table(summary.headings, summary.rows, width=width, optional=optional)


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
    gained, lost = (_bracketed(value, ".1f", " %") for value in (disagreement.gained, disagreement.lost))
    return [
        f"of the test images the distilled student gets {gained} right that the student alone got wrong, "
        f"and {lost} the other way round{some}",
        *(_gain_with_images(disagreement) if comparison.metric == "accuracy" else []),
    ]


def _gain_with_images(disagreement: Disagreement) -> list[str]:
    if disagreement.gain is None:
        return []
    gain, images = _bracketed(disagreement.gain, "+.2f"), f"{disagreement.images:,}"
    return [f"with an interval that also covers the sampling of the {images} test images, the gain is {gain} points"]


def to_html(title: str, comparisons: Sequence[Comparison], pictures: Sequence[Mapping[str, Picture]]) -> str:
    """A self-contained page; `pictures` by file name for each comparison."""
    texts = [row_texts(comparison) for comparison in comparisons]
    columns, _, left = _table([line for lines in texts for line in lines], ())
    parts = [
        {
            "comparison": comparison,
            "student": student_title(comparison),
            "summary": summarize_student(comparison),
            "disagreement": disagreement_sentence(comparison),
            "pictures": [
                (name, found.caption, base64.b64encode(found.content).decode()) for name, found in drawn.items()
            ],
            "rows": [[line[column] for column in columns] for line in lines],
            "best": [number for number, (_, remark, _) in enumerate(displayed_rows(comparison)) if remark],
        }
        for comparison, lines, drawn in zip(comparisons, texts, pictures, strict=True)
    ]
    page = Environment(autoescape=True, loader=PackageLoader("kdpipe.compare", "")).get_template("page.html.j2")
    return page.render(title=title, parts=parts, columns=columns, left=left)


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """For the description of a run in MLflow's UI, which is limited to 8,000 characters."""
    lines = []
    for comparison in comparisons:
        notes = [*disagreement_sentence(comparison), *comparison.notes]
        lines += [f"**{comparison.verdict}**", "", *(f"- {note}" for note in notes), ""]
        if summary := summarize_student(comparison):
            lines += markdown_table(summary.headings, summary.rows).split("\n")
            lines += ["", *(f"- {note}" for note in summary.notes), ""]
        table = _table(row_texts(comparison), ("network", "data set", "epochs", "MB", "seconds", WHERE))
        lines += [*markdown_table(*table).split("\n"), ""]
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
