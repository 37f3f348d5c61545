"""Three pictures of a comparison: where alpha and temperature pay, how validation accuracy grew, accuracy against size.

Blue and orange are the colours that readers with any colour vision tell apart (Okabe & Ito 2008).
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from kdpipe.compare.cells import Cell
from kdpipe.compare.comparison import Comparison, Row
from kdpipe.compare.statistics import Interval, interval, signed

ALONE, DISTILLED, TEACHER = "#D55E00", "#0072B2", "#555555"
LINES = {"student alone": (ALONE, "--"), "student distilled": (DISTILLED, "-")}
Curves = Mapping[int, Sequence[tuple[int, float]]]  # by seed: epochs and validation accuracies


def to_png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, bbox_inches="tight")
    return content.getvalue()


def heatmap(comparison: Comparison) -> Figure | None:
    """Alpha × temperature: the mean gain in each cell with its spread, on validation images, by which the best cell
    was chosen, and on test images. None where neither varies."""
    best = comparison.best
    if best is None:
        return None
    where = {
        (float(params["loss.alpha"]), float(params["loss.temperature"])): row
        for row in comparison.rows
        if row.cell.stage == "distill" and _besides(row.cell) == _besides(best.cell)
        if {"loss.alpha", "loss.temperature"} <= (params := row.cell.first.params).keys()
    }
    if len(where) < 2:
        return None
    alphas, temperatures = (sorted({key[axis] for key in where}) for axis in (0, 1))
    panels = [("test images", "gain")]
    if any(row.validation_gain for row in where.values()):
        panels.insert(0, ("validation images", "validation_gain"))
    size = (1.2 + 1.55 * len(temperatures) * len(panels) + 1.2, max(3.2, 1.7 + 0.85 * len(alphas)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    gains = [100 * gain.mean for row in where.values() for _, name in panels if (gain := getattr(row, name))]
    limit = max(map(abs, gains), default=1) or 1
    images = []
    for axis, (title, name) in zip(axes, panels, strict=True):
        images.append(_panel(axis, where, alphas, temperatures, name, limit, best))
        axis.set_title(f"on {title}", fontsize=11)
        axis.set_xlabel("temperature")
    axes[0].set_ylabel("alpha")
    bar = figure.colorbar(images[0], ax=list(axes))
    bar.set_label("points over the student alone")
    figure.suptitle("mean gain ± half of the 95 % interval;  ∘ the interval includes 0;  framed: chosen", fontsize=10)
    return figure


def _panel(
    axis: Axes,
    where: Mapping[tuple[float, float], Row],
    alphas: Sequence[float],
    temperatures: Sequence[float],
    name: str,
    limit: float,
    best: Row,
) -> matplotlib.image.AxesImage:
    gains: dict[tuple[float, float], Interval | None] = {key: getattr(row, name) for key, row in where.items()}
    grid = np.full((len(alphas), len(temperatures)), np.nan)
    for (alpha, temperature), gain in gains.items():
        if gain:
            grid[alphas.index(alpha), temperatures.index(temperature)] = 100 * gain.mean
    image = axis.imshow(
        grid, cmap="PuOr", norm=TwoSlopeNorm(0, -1.8 * limit, 1.8 * limit), origin="lower", aspect="auto"
    )
    for (alpha, temperature), gain in gains.items():
        row, column = alphas.index(alpha), temperatures.index(temperature)
        if gain is None:
            text = "–"
        elif gain.low is None:
            text = f"{signed(gain.mean)} ∘"
        else:
            text = f"{signed(gain.mean)} ± {100 * gain.half_width:.1f}{' ∘' if gain.includes_zero else ''}"
        axis.text(column, row, text, ha="center", va="center", fontsize=10)
        if where[alpha, temperature] is best:
            frame = matplotlib.patches.Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, linewidth=2.5)
            axis.add_patch(frame)
    axis.set_xticks(range(len(temperatures)), [f"{temperature:g}" for temperature in temperatures])
    axis.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    return image


def _besides(cell: Cell) -> dict[str, str]:
    """The settings of a cell beside alpha and temperature."""
    return {key: value for key, value in cell.settings if key not in ("loss.alpha", "loss.temperature")}


def curves(named: Mapping[str, Curves]) -> Figure | None:
    """Validation accuracy by epoch of "student alone" and "student distilled": the mean over seeds with its 95 %
    interval. None where there is no second epoch."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, runs in named.items():
        color, style = LINES[name]
        epochs = sorted(set.intersection(*(({epoch for epoch, _ in run}) for run in runs.values())) if runs else set())
        if len(epochs) < 2:
            continue
        means = [interval([dict(run)[epoch] for run in runs.values()]) for epoch in epochs]
        middle = [100 * mean.mean for mean in means if mean]
        low = [100 * (mean.mean if mean.low is None else mean.low) for mean in means if mean]
        high = [100 * (mean.mean if mean.high is None else mean.high) for mean in means if mean]
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        axis.plot(epochs, middle, color=color, linestyle=style, label=f"{name}, {seeds}")
        axis.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    if not axis.lines:
        return None
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation accuracy, %")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axis.set_title("mean over seeds, 95 % interval shaded", fontsize=10)
    axis.legend(loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def sizes(comparison: Comparison) -> Figure | None:
    """Test accuracy against size: teacher, student alone, distilled student."""
    best = comparison.best
    if best is None:
        return None
    decisive = comparison.confirmed or best
    points: list[tuple[str, float, Interval, str, str]] = []
    metrics = decisive.cell.first.metrics
    if comparison.teacher_accuracy is not None:
        name = f"teacher {decisive.cell.first.params.get('teacher.name', '')}"
        only = Interval(comparison.teacher_accuracy, None, None, 1)
        points.append((name, metrics["teacher/size_mb"], only, TEACHER, "s"))
    alone = decisive.control.only(decisive.cell.runs) if decisive.control else None
    for name, cell, color, marker in (
        ("student alone", alone, ALONE, "o"),
        ("student distilled", decisive.cell, DISTILLED, "D"),
    ):
        accuracy = interval(list(cell.values("test/accuracy").values())) if cell else None
        if cell and accuracy:
            points.append((name, cell.first.metrics["model/size_mb"], accuracy, color, marker))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, megabytes, accuracy, color, marker in points:
        error = 100 * accuracy.half_width if accuracy.low is not None else None
        label = f"{name}  {100 * accuracy.mean:.1f} %, {megabytes:.3g} MB"
        # Students of one size stand side by side, that their bars can be told apart.
        beside = {ALONE: 0.97, DISTILLED: 1.03}.get(color, 1)
        axis.errorbar(
            beside * megabytes,
            100 * accuracy.mean,
            yerr=error,
            label=label,
            color=color,
            marker=marker,
            markersize=8,
            capsize=4,
            linestyle="none",
        )
    axis.set_xscale("log")
    smallest, largest = (pick(point[1] for point in points) for pick in (min, max))
    axis.set_xlim(smallest / 1.6, largest * 1.6)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.tick_params(axis="x", which="both", length=4, pad=4)
    axis.set_xlabel("size, MB (log scale)")
    axis.set_ylabel("test accuracy, %")
    axis.margins(y=0.15)
    axis.grid(alpha=0.3)
    axis.legend(loc="best", frameon=True)
    axis.set_title("bars: 95 % interval over seeds", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
