"""Comparisons as data: a pandas frame, CSV, JSON, and the metrics of a sweep. Accuracies and gains are fractions."""

import json
from collections.abc import Sequence
from contextlib import suppress
from statistics import fmean

import pandas as pd

from kdpipe.compare.cell_metrics import Timings, averages
from kdpipe.compare.cells import differences
from kdpipe.compare.comparison import Comparison, ComparisonRow, best_run
from kdpipe.compare.published import Published
from kdpipe.compare.statistics import Interval

Record = dict[str, str | float | list[int] | None]


def displayed_rows(comparison: Comparison) -> list[tuple[ComparisonRow, str, str]]:
    """All rows; a remark for the one that the verdict is about, which is repeated on the confirmation seeds if any; and
    the settings in which rows differ."""
    best, confirmed = comparison.best, comparison.confirmed
    rivals = [row for row in comparison.rows if best and (row.cell.stage, row.cell.link) == ("distill", best.cell.link)]
    remark = "best" if len(rivals) > 1 else "verdict"  # a chain's last link may be worse than those before it
    rows = [*comparison.rows, *([confirmed] if confirmed else [])]
    remarks = [remark if row is best else f"{remark}, on new seeds" if row is confirmed else "" for row in rows]
    return list(zip(rows, remarks, differences([row.cell for row in rows]), strict=True))


def to_frame(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """A row for each cell; `seeds` is a list. Metrics have the names and units that they have in MLflow: means over
    seeds, medians of times."""
    return pd.DataFrame([record for comparison in comparisons for record in _records(comparison)])


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """A line for each cell; seeds are separated by spaces."""
    frame = to_frame(comparisons)
    if "seeds" in frame:
        frame["seeds"] = [" ".join(map(str, seeds)) for seeds in frame["seeds"]]
    return frame.to_csv(index=False, lineterminator="\n").rstrip("\n")


def to_json(comparisons: Sequence[Comparison]) -> str:
    """A list with an object for each comparison: verdict, notes, rows."""
    described = [
        {
            "verdict": comparison.verdict.split(":")[0],
            "sentence": comparison.verdict,
            "notes": comparison.notes,
            "run": best_run(decisive)[1].id if (decisive := comparison.decisive) else None,
            "confirmed_on": list(comparison.confirmed.cell.runs) if comparison.confirmed else [],
            **_bounds("gain", decisive.gain if decisive else None),
            **_bounds("gained_images", found.gained if (found := comparison.disagreement) else None),
            **_bounds("lost_images", found.lost if found else None),
            "rows": _records(comparison),
        }
        for comparison in comparisons
    ]
    return json.dumps(described, indent=2, ensure_ascii=False)


def best_metrics(comparison: Comparison) -> dict[str, float]:
    """The best cell's results as metrics of a sweep's parent run, fractions."""
    best, decisive = comparison.best, comparison.decisive
    if best is None or decisive is None:
        return {}
    record = _record(decisive, comparison.timings) | _bounds(f"validation_{best.metric}", best.validation)
    if found := comparison.disagreement:
        record |= {"gained_images": found.gained.mean, "lost_images": found.lost.mean}
    threads = comparison.timings.threads
    sources = {
        **{f"val_{best.metric}": f"validation_{best.metric}", f"test_{best.metric}": f"test_{best.metric}"},
        **{"gain": "test_gain", "gain_low": "test_gain_low", "gain_high": "test_gain_high"},
        **{"gained_images": "gained_images", "lost_images": "lost_images"},
        **{"loss": "test/loss", "ece": "test/ece", "agreement": "teacher/agreement"},
        **{"size_mb": "model/size_mb", "flops": "model/flops", "latency_ms": f"model/latency_ms{threads}"},
        **{"alpha": "loss.alpha", "temperature": "loss.temperature"},
    }
    if decisive.cell.teacher_run:  # two students that learn from each other have none
        sources["speedup"] = f"speedup/latency{threads}"
    return {f"best/{name}": value for name, key in sources.items() if isinstance(value := record.get(key), float)}


def _records(comparison: Comparison) -> list[Record]:
    return [
        _record(row, comparison.timings_for(row.cell), *texts)
        | (_published(row.published) if comparison.published else {})
        for row, *texts in displayed_rows(comparison)
    ]


def _record(row: ComparisonRow, timings: Timings, remark: str = "", difference: str = "") -> Record:
    """A row's values; a metric that was not measured has no key."""
    params, runs = row.cell.first.params, row.cell.runs
    measured = averages(row.cell, timings)
    is_timed = any("latency" in metric for metric in measured)
    return {
        "model": params["model.name"],
        "dataset": params["dataset.name"],
        "stage": row.cell.stage,
        **{key: _number(value) for key, value in sorted(params.items()) if key.startswith(("loss.", "also."))},
        "teacher": params.get("teacher.name"),
        "teacher_run": row.cell.teacher_run or None,
        "epochs": int(params["train.epochs"]),
        "seeds": list(runs),
        "remark": remark,
        "where_rows_differ": difference,
        "size_mb": row.cell.first.metrics.get("model/size_mb"),
        "seconds": fmean(run.seconds for run in runs.values()),
        **_bounds(f"validation_{row.metric}", row.validation),
        **_bounds(f"test_{row.metric}", row.test),
        **_bounds("validation_gain", row.validation_gain),
        **_bounds("test_gain", row.gain),
        **_adjusted(row.adjusted_gain),
        **measured,
        **({"timed_on": timings.where} if is_timed and timings.where else {}),
    }


def _adjusted(gain: Interval | None) -> Record:
    """The bounds for all arms of a control at once; nothing where it has one arm only."""
    return {"test_gain_adjusted_low": gain.low, "test_gain_adjusted_high": gain.high} if gain else {}


def _published(found: Published | None) -> Record:
    deviations = found.deviations if found else ()
    return {
        "published_accuracy": found.accuracy if found else None,
        "published_epoch": found.epoch if found else None,
        "published_source": found.source if found else None,
        "trained_otherwise": ", ".join(f"{key}={value} instead of {theirs}" for key, value, theirs in deviations),
        **_bounds("difference", found.difference if found else None),
    }


def _bounds(name: str, value: Interval | None) -> dict[str, float | None]:
    numbers = (value.mean, value.low, value.high) if value else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), numbers, strict=True))


def _number(text: str) -> float | str:
    with suppress(ValueError):
        return float(text)
    return text
