"""A comparison as a table for terminals, as CSV, as JSON, and as a page to mail."""

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from jinja2 import Environment
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kdpipe.compare.cells import differences
from kdpipe.compare.comparison import Comparison, Row, best_run
from kdpipe.compare.statistics import Interval
from kdpipe.compare.worth import averages, threads_of, timed_on, worth_of
from kdpipe.evaluation.report import render

# Where any row has a published accuracy.
PUBLISHED = ("published", "difference")
COLUMNS = (
    "network",
    "data set",
    "stage",
    "loss",
    "seeds",
    "epochs",
    "val %",
    "test %",
    "gain",
    *PUBLISHED,
    "MB",
    "seconds",
)
RIGHT = ("seeds", "epochs", "val %", "test %", "gain", *PUBLISHED, "MB", "seconds")
WHERE = "where rows differ"


class Picture(NamedTuple):
    """A PNG, and what it shows."""

    content: bytes
    caption: str


def with_interval(value: Interval | None, sign: str = "") -> str:
    """In points: 52.31 [51.40, 53.22], the brackets only where there is an interval."""
    if value is None:
        return "–"
    text = f"{100 * value.mean:{sign}.2f}"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{100 * value.low:{sign}.2f}, {100 * value.high:{sign}.2f}]"


def rows_of(comparison: Comparison) -> list[tuple[Row, str]]:
    """All rows, with a remark on the one that the verdict is on, and on it again on the seeds of the verdict."""
    best = comparison.best
    rivals = [row for row in comparison.rows if best and (row.cell.stage, row.cell.link) == ("distill", best.cell.link)]
    remark = "best" if len(rivals) > 1 else "verdict"  # the last link of a chain need not be better than those before
    rows = [(row, remark if row is best else "") for row in comparison.rows]
    return rows + ([(comparison.confirmed, f"{remark}, on new seeds")] if comparison.confirmed else [])


def columns_of(comparisons: Sequence[Comparison]) -> list[str]:
    """The titles of the columns that there is something to write in."""
    any_published = any(row.published for comparison in comparisons for row, _ in rows_of(comparison))
    return [title for title in (*COLUMNS, WHERE) if any_published or title not in PUBLISHED]


def texts_of(comparison: Comparison) -> list[dict[str, str]]:
    """Each row's texts by the title of the column."""
    rows = rows_of(comparison)
    differing = differences([row.cell for row, _ in rows])
    texts = []
    for (row, remark), where in zip(rows, differing, strict=True):
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
                WHERE: where,
            }
        )
    return texts


def as_table(comparison: Comparison) -> str:
    """For a terminal: the rows, the verdict, and what it rests on."""
    table = Table(box=SIMPLE_HEAD)
    texts = texts_of(comparison)
    titles = [title for title in columns_of([comparison]) if title != WHERE or any(line[WHERE] for line in texts)]
    for title in titles:
        table.add_column(title, justify="right" if title in RIGHT else "left")
    for line in texts:
        table.add_row(*(line[title] for title in titles))
    lines = [render(table)]
    if comparison.best:
        lines += ["", student_and_teacher(comparison), *exchanged(comparison), ""]
    lines += [f"verdict: {comparison.verdict}", *(f"  · {note}" for note in comparison.notes)]
    return "\n".join(lines)


def student_and_teacher(comparison: Comparison) -> str:
    """The decisive student beside the same student alone and its teacher: what it can do, and what it costs."""
    worth = worth_of(comparison)
    assert worth
    table = Table(box=SIMPLE_HEAD)
    for number, title in enumerate(worth.titles):
        table.add_column(title, justify="right" if number else "left")
    for texts in worth.rows:
        table.add_row(*texts)
    return "\n".join([title_of(comparison), render(table), *(f"  {note}" for note in worth.notes)])


def title_of(comparison: Comparison) -> str:
    """The decisive student, and how many seeds it was trained on."""
    decisive = comparison.decisive
    if decisive is None:
        return ""
    number = len(decisive.cell.runs)
    return f"{decisive.cell.title}, {number} seed{'s' if number > 1 else ''}"


def exchanged(comparison: Comparison) -> list[str]:
    """What was gained and lost image by image, as a sentence, where that is known."""
    exchange, decisive = comparison.exchange, comparison.decisive
    if exchange is None or decisive is None:
        return []
    seeds = len(decisive.cell.runs)
    some = f" (on {exchange.gained.number} of {seeds} seeds)" if exchange.gained.number < seeds else ""
    gained, lost = (share(value) for value in (exchange.gained, exchange.lost))
    return [
        f"of the test images the distilled student gets {gained} right that the student alone got wrong, "
        f"and {lost} the other way round{some}"
    ]


def share(value: Interval) -> str:
    """8.1 % [7.2, 9.0], the brackets only where there is an interval."""
    text = f"{100 * value.mean:.1f} %"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{100 * max(value.low, 0):.1f}, {100 * min(value.high, 1):.1f}]"


def as_records(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows as plain values; accuracies and gains are fractions. Metrics have the names and units that they have in
    MLflow: means over seeds, times medians."""
    records = []
    rows = rows_of(comparison)
    for (row, remark), where in zip(rows, differences([row.cell for row, _ in rows]), strict=True):
        params = row.cell.first.params
        record: dict[str, Any] = {
            "model": params["model.name"],
            "dataset": params["dataset.name"],
            "stage": row.cell.stage,
            **{key: _number(value) for key, value in sorted(params.items()) if key.startswith(("loss.", "also."))},
            "teacher": params.get("teacher.name"),
            "teacher_run": row.cell.teacher_run or None,
            "epochs": int(params["train.epochs"]),
            "seeds": list(row.cell.runs),
            "remark": remark,
            "where_rows_differ": where,
            "size_mb": row.cell.first.metrics.get("model/size_mb"),
            "seconds": fmean(run.seconds for run in row.cell.runs.values()),
        }
        for name, value in (
            ("validation_accuracy", row.validation),
            ("test_accuracy", row.test),
            ("validation_gain", row.validation_gain),
            ("test_gain", row.gain),
        ):
            record |= _bounds(name, value)
        record |= averages(row.cell)
        if where := timed_on(row.cell.runs.values()):
            record["timed_on"] = where
        records.append(record | (_published(row) if comparison.published else {}))
    return records


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """One line a row; the seeds are separated by spaces."""
    records = [record for comparison in comparisons for record in as_records(comparison)]
    for record in records:
        record["seeds"] = " ".join(map(str, record["seeds"]))
    keys = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().rstrip("\n")


def as_json(comparisons: Sequence[Comparison]) -> str:
    """A list, one object for each comparison: verdict, what it rests on, rows."""
    return json.dumps(
        [
            {
                "verdict": comparison.verdict.split(":")[0],
                "sentence": comparison.verdict,
                "notes": comparison.notes,
                "run": best_run(comparison.decisive.cell)[1].id if comparison.decisive else None,
                "confirmed_on": list(comparison.confirmed.cell.runs) if comparison.confirmed else [],
                **_bounds("gain", decisive.gain if (decisive := comparison.decisive) else None),
                **_bounds("gained_images", exchange.gained if (exchange := comparison.exchange) else None),
                **_bounds("lost_images", exchange.lost if exchange else None),
                "rows": as_records(comparison),
            }
            for comparison in comparisons
        ],
        indent=2,
        ensure_ascii=False,
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 85rem; margin: 2rem auto; padding: 0 1rem }
.verdict { font-size: 1.25rem; border-left: .3rem solid #0072b2; padding-left: 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .5rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
th.right, td.right { text-align: right }
tr.best { background: #e6f1f8; font-weight: 600 }
figure { margin: 1.5rem 0 }
img { max-width: 100%; height: auto; display: block }
figcaption, .note { color: #555; font-size: .85rem }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for part in parts %}
<p class="verdict">{{ part.verdict }}</p>
<ul>{% for note in part.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% if part.worth %}
<h2>{{ part.title }}</h2>
<div class="wide"><table>
<tr>{% for title in part.worth.titles -%}
<th{% if loop.index0 %} class="right"{% endif %}>{{ title }}</th>{% endfor %}</tr>
{% for texts in part.worth.rows %}
<tr>{% for text in texts %}<td{% if loop.index0 %} class="right"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for note in part.worth.notes %}<p class="note">{{ note }}</p>
{% endfor %}
{% endif %}
{% for sentence in part.exchanged %}<p>{{ sentence }}</p>
{% endfor %}
{% for name, caption, picture in part.pictures %}
<figure>
<img alt="{{ name }}" src="data:image/png;base64,{{ picture }}">
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
<div class="wide"><table>
<tr>{% for column in columns %}<th{% if column in right %} class="right"{% endif %}>{{ column }}</th>{% endfor %}</tr>
{% for best, texts in part.rows %}
<tr{% if best %} class="best"{% endif %}>{% for text in texts -%}
<td{% if columns[loop.index0] in right %} class="right"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
<p>Accuracies in per cent, gains in points over the same student alone, paired by seed; 95 % intervals over seeds.</p>
</body>
</html>
"""


def as_html(title: str, comparisons: Sequence[Comparison], pictures: Sequence[Mapping[str, Picture]]) -> str:
    """One page with everything inside; `pictures` are by file name, for each comparison."""
    titles = columns_of(comparisons)
    parts = [
        {
            "verdict": comparison.verdict,
            "notes": comparison.notes,
            "title": title_of(comparison),
            "worth": worth_of(comparison),
            "exchanged": exchanged(comparison),
            "pictures": [
                (name, picture.caption, base64.b64encode(picture.content).decode()) for name, picture in found.items()
            ],
            "rows": [
                (bool(remark), [texts[title] for title in titles])
                for (_, remark), texts in zip(rows_of(comparison), texts_of(comparison), strict=True)
            ],
        }
        for comparison, found in zip(comparisons, pictures, strict=True)
    ]
    page = Environment(autoescape=True).from_string(PAGE)
    return page.render(title=title, parts=parts, columns=titles, right=RIGHT)


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """For the description of a run in MLflow's UI, which keeps 8,000 characters."""
    left_out = ("network", "data set", "epochs", "MB", "seconds", WHERE)
    titles = [title for title in columns_of(comparisons) if title not in left_out]
    lines = []
    for comparison in comparisons:
        said = [*exchanged(comparison), *comparison.notes]
        lines += [f"**{comparison.verdict}**", "", *(f"- {sentence}" for sentence in said), ""]
        if worth := worth_of(comparison):
            lines += [_markdown_row(texts) for texts in (worth.titles, ["---"] * len(worth.titles), *worth.rows)]
            lines += ["", *(f"- {note}" for note in worth.notes), ""]
        lines += [_markdown_row(titles), _markdown_row(["---"] * len(titles))]
        for texts in texts_of(comparison):
            lines.append(_markdown_row([texts[title] for title in titles]))
        lines.append("")
    while len("\n".join(lines)) > 7800:
        lines = [*lines[:-2], "the rest is in comparison.txt among the artifacts"]
    return "\n".join(lines)


def numbered(pictures: Sequence[Mapping[str, Picture]]) -> dict[str, bytes]:
    """The pictures of all comparisons by file name: heatmap.png, or 1_heatmap.png where there are several."""
    return {
        f"{number}_{name}" if len(pictures) > 1 else name: picture.content
        for number, drawn in enumerate(pictures, start=1)
        for name, picture in drawn.items()
    }


def _markdown_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def best_metrics(comparison: Comparison) -> dict[str, float]:
    """The best cell's figures as metrics of a sweep's parent run, fractions."""
    best, decisive = comparison.best, comparison.decisive
    if best is None or decisive is None:
        return {}
    metrics, exchange = averages(decisive.cell), comparison.exchange
    values: dict[str, float | None] = {
        "best/val_accuracy": best.validation.mean if best.validation else None,
        "best/test_accuracy": decisive.test.mean if decisive.test else None,
        "best/gained_images": exchange.gained.mean if exchange else None,
        "best/lost_images": exchange.lost.mean if exchange else None,
    }
    for name in ("test/loss", "test/ece", "teacher/agreement", "model/size_mb", "model/flops"):
        values[f"best/{name.partition('/')[2]}"] = metrics.get(name)
    threads = threads_of([decisive.cell], timed_on(decisive.cell.runs.values()))
    values["best/latency_ms"] = metrics.get(f"model/latency_ms{threads}")
    if decisive.cell.teacher_run:  # two students have none
        values["best/speedup"] = metrics.get(f"speedup/latency{threads}")
    for name, part in (("best/gain", "mean"), ("best/gain_low", "low"), ("best/gain_high", "high")):
        values[name] = getattr(decisive.gain, part, None)
    for axis in ("alpha", "temperature"):
        if (setting := best.cell.first.params.get(f"loss.{axis}")) is not None:
            values[f"best/{axis}"] = float(setting)
    return {name: value for name, value in values.items() if value is not None}


def _published(row: Row) -> dict[str, Any]:
    published = row.published
    otherwise = (
        [f"{key}={value} instead of {theirs}" for key, value, theirs in published.otherwise] if published else []
    )
    return {
        "published_accuracy": published.accuracy if published else None,
        "published_epoch": published.epoch if published else None,
        "published_source": published.source if published else None,
        "trained_otherwise": ", ".join(otherwise),
        **_bounds("difference", published.difference if published else None),
    }


def _bounds(name: str, value: Interval | None) -> dict[str, float | None]:
    if value is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
