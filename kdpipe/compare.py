"""`python -m kdpipe.compare`: the finished runs of an experiment side by side, and what distillation gained.

A cell is a configuration without its seed; its rows are means over seeds. A distilled student is held against the same
student alone, seed by seed, and against its teacher.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy import stats

from kdpipe.identity import what_matters
from kdpipe.report import render
from kdpipe.store import check_uri, store_uri
from kdpipe.tracking import RunRecord, Tracker

STAGES = ("teacher", "student", "distill")


@dataclass(frozen=True)
class Cell:
    """The finished runs that differ by their seed alone: the newest of each seed."""

    settings: frozenset[tuple[str, str]]
    runs: dict[int, RunRecord]  # by seed

    @property
    def first(self) -> RunRecord:
        return next(iter(self.runs.values()))

    @property
    def stage(self) -> str:
        return self.first.tags["kdpipe.stage"]

    @property
    def loss(self) -> str:
        """The loss and its settings, such as "KD alpha 0.5 temperature 5"."""
        params = self.first.params
        name = params["loss._target_"].rpartition(".")[2]
        values = [
            f"{key.removeprefix('loss.')} {value}" for key, value in sorted(params.items()) if key.startswith("loss.")
        ]
        return " ".join([name, *(value for value in values if not value.startswith("_target_"))])

    def mean(self, metric: str) -> float | None:
        """The mean over seeds, None where a run has no such metric."""
        values = [run.metrics.get(metric) for run in self.runs.values()]
        known = [value for value in values if value is not None]
        return fmean(known) if len(known) == len(values) else None

    def setting_without(self, *groups: str) -> frozenset[tuple[str, str]]:
        """The settings that remain without some config groups: what two cells share."""
        return frozenset((key, value) for key, value in self.settings if key.split(".")[0] not in groups)


def make_cells(records: Iterable[RunRecord]) -> list[Cell]:
    """The cells of finished runs (newest first), teachers before students before distilled students."""
    found: dict[frozenset[tuple[str, str]], dict[int, RunRecord]] = {}
    for record in records:
        settings = what_matters(record.params)
        seed = int(settings.pop("seed"))
        sources = {key: record.tags.get(key, "") for key in ("kdpipe.stage", "kdpipe.data", "kdpipe.teacher_run")}
        found.setdefault(frozenset((settings | sources).items()), {}).setdefault(seed, record)
    cells = [Cell(settings, dict(sorted(runs.items()))) for settings, runs in found.items()]
    return sorted(cells, key=lambda cell: (STAGES.index(cell.stage), cell.first.params["model.name"], cell.loss))


def control_of(cell: Cell, cells: Iterable[Cell]) -> Cell | None:
    """The same student alone: same settings but for the loss and the teacher."""
    groups = ("loss", "teacher", "stage", "kdpipe")

    def shared(one: Cell) -> tuple[frozenset[tuple[str, str]], str]:
        return one.setting_without(*groups), one.first.tags["kdpipe.data"]

    return next((other for other in cells if other.stage == "student" and shared(other) == shared(cell)), None)


def verdict(gains: Sequence[float]) -> str:
    """What gains in accuracy (fractions), one for each seed, say of distillation."""
    if len(gains) < 2:
        number = "one seed shows" if gains else "no seed in common shows"
        return f"cannot tell: {number} nothing; repeat both with seed=1, seed=2, …"
    mean = fmean(gains)
    if max(gains) - min(gains) < 1e-9:
        return f"cannot tell: {100 * mean:+.1f} points for each of {len(gains)} seeds show no spread; repeat with more"
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    word = "distillation helped" if low > 0 else "distillation hurt" if high < 0 else "no evidence"
    return (
        f"{word}: {100 * mean:+.1f} points on the test set "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} over {len(gains)} seeds of the student)"
    )


def differences(cell: Cell, cells: Sequence[Cell]) -> str:
    """The settings, beyond those in the table's own columns, in which a cell differs from others of its stage."""
    own_column = ("model", "loss", "stage", "kdpipe")
    settings = [dict(other.setting_without(*own_column)) for other in cells if other.stage == cell.stage]
    mine = dict(cell.setting_without(*own_column))
    keys = sorted(key for key in {*mine} if any(other.get(key) != mine[key] for other in settings))
    return " ".join(f"{key}={mine[key]}" for key in keys if key not in ("dataset.name", "train.epochs", "teacher.name"))


def cells_table(cells: Sequence[Cell]) -> Table:
    """One row for each cell."""
    table = Table(box=SIMPLE_HEAD)
    for title in ("network", "data set", "stage", "loss", "seeds"):
        table.add_column(title)
    for title in ("epochs", "val %", "test %", "MB", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("where rows differ")
    for cell in cells:
        params = cell.first.params
        table.add_row(
            params["model.name"],
            params["dataset.name"],
            cell.stage,
            cell.loss,
            ",".join(map(str, cell.runs)),
            params["train.epochs"],
            _percent(cell.mean("selected/accuracy")),
            _percent(cell.mean("test/accuracy")),
            f"{cell.mean('model/size_mb') or 0:.3f}",
            f"{fmean(run.seconds for run in cell.runs.values()):.0f}",
            differences(cell, cells),
        )
    return table


def gains_table(cell: Cell, control: Cell, teacher: RunRecord | None) -> tuple[Table, list[float]]:
    """A distilled student beside the same student alone and its teacher, over the seeds that both students have; and
    its gains, seed by seed."""
    seeds = [seed for seed in cell.runs if seed in control.runs]
    gains = [cell.runs[seed].metrics["test/accuracy"] - control.runs[seed].metrics["test/accuracy"] for seed in seeds]
    table = Table(box=SIMPLE_HEAD)
    table.add_column(f"seeds {','.join(map(str, seeds)) or 'in common: none'}")
    for title in ("test %", "MB", "smaller than teacher"):
        table.add_column(title, justify="right")
    teacher_mb = cell.mean("teacher/size_mb")
    name = f"teacher {cell.first.params['teacher.name']}"
    table.add_row(
        name, _percent(teacher.metrics.get("test/accuracy") if teacher else None), f"{teacher_mb or 0:.3f}", ""
    )
    for title, student in (("student alone", control), ("student distilled", cell)):
        accuracy = fmean(student.runs[seed].metrics["test/accuracy"] for seed in seeds) if seeds else None
        megabytes = student.mean("model/size_mb") or 0
        smaller = f"{100 * (1 - megabytes / teacher_mb):.1f} %" if teacher_mb else ""
        table.add_row(title, _percent(accuracy), f"{megabytes:.3f}", smaller)
    return table, gains


def compare(tracker: Tracker) -> str:
    """The whole comparison as text.

    Raises:
        ValueError: no finished run in the experiment.
    """
    cells = make_cells(tracker.finished_runs())
    if not cells:
        raise ValueError(
            f"tracking.experiment={tracker.experiment}: no finished run yet in {tracker.uri}; make demo trains three"
        )
    parts = [render(cells_table(cells))]
    for cell in cells:
        if cell.stage != "distill":
            continue
        title = f"{cell.first.params['model.name']} distilled with {cell.loss} {differences(cell, cells)}"
        parts.append(f"\n{title.strip()}:")
        control = control_of(cell, cells)
        if control is None:
            parts.append("verdict: cannot tell: the same student alone has not been trained (experiment=student)")
            continue
        teacher = tracker.get_run(cell.first.tags["kdpipe.teacher_run"])
        table, gains = gains_table(cell, control, teacher)
        parts += [render(table), f"verdict: {verdict(gains)}"]
    return "\n".join(parts)


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.2f}"


def cli() -> None:
    """`kdpipe-compare` and `python -m kdpipe.compare`."""
    parser = argparse.ArgumentParser(prog="kdpipe-compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--experiment", default="kdpipe", help="MLflow experiment (default: %(default)s)")
    parser.add_argument(
        "--uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in the output folder)"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="default: %(default)s")
    arguments = parser.parse_args()
    uri = store_uri(arguments.uri, arguments.output_dir)
    local = Path(uri.removeprefix("sqlite:///"))
    try:
        check_uri(uri)
        if uri.startswith("sqlite:///") and not local.is_file():
            raise ValueError(f"{local}: there is no such MLflow store; make demo, or any run, makes one")
        print(compare(Tracker(uri, arguments.experiment, arguments.output_dir / "mlartifacts", create=False)))
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"kdpipe-compare: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli()
