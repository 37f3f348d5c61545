"""Plots of a comparison: the gain by alpha and temperature, validation accuracy by epoch, accuracy against size and
latency.

Blue and orange can be told apart with any kind of colour vision (Okabe & Ito 2008).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from kdpipe.compare.cell_metrics import Latencies, average, threads_of, timed_on
from kdpipe.compare.cells import Cell, differences
from kdpipe.compare.comparison import Comparison, uses_final_weights
from kdpipe.compare.frames import displayed_rows
from kdpipe.compare.statistics import Interval, interval, signed
from kdpipe.compare.student_summary import students_of

ALONE, DISTILLED, TEACHER, FRONT = "#D55E00", "#0072B2", "#555555", "#999999"
STAGES = {
    "teacher": (TEACHER, "s", "teacher"),
    "student": (ALONE, "o", "student alone"),
    "distill": (DISTILLED, "D", "student distilled"),
}
SIZE, LATENCY = "size", "latency"  # the panels
VERDICT = ", the verdict's student"
MAX_NUMBERED = 12  # more points than this show their stage only
MAX_DIFFERENCE = 50  # characters
MAX_BARS = 60  # more points than this have no error bars
WIDTH, HEIGHT = 660, 230  # of all panels of `pareto`, roughly, in typographic points
LINES = {"student alone": (ALONE, "--"), "student distilled": (DISTILLED, "-")}
Curves = Mapping[int, Sequence[tuple[int, float]]]  # epochs and validation accuracies by seed
Place = tuple[float, float]  # alpha and temperature


def heatmap(comparison: Comparison) -> Figure | None:
    """The mean gain with its spread by alpha and temperature, on validation images, which decide the best cell, and on
    test images. None if neither varies."""
    best = comparison.best
    if best is None:
        return None
    rows = {
        (float(params["loss.alpha"]), float(params["loss.temperature"])): row
        for row in comparison.rows
        if row.cell.stage == "distill" and _other_settings(row.cell) == _other_settings(best.cell)
        if {"loss.alpha", "loss.temperature"} <= (params := row.cell.first.params).keys()
    }
    if len(rows) < 2:
        return None
    panels = {"test images": {key: row.gain for key, row in rows.items()}}
    if any(row.validation_gain for row in rows.values()):
        panels = {"validation images": {key: row.validation_gain for key, row in rows.items()}, **panels}
    alphas, temperatures = (sorted({key[position] for key in rows}) for position in (0, 1))
    size = (1.2 + 1.55 * len(temperatures) * len(panels) + 1.2, max(3.2, 1.7 + 0.85 * len(alphas)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    means = [100 * gain.mean for gains in panels.values() for gain in gains.values() if gain]
    limit = max(map(abs, means), default=1) or 1
    chosen = next((key for key, row in rows.items() if row is best), None)
    for axis, (images, gains) in zip(axes, panels.items(), strict=True):
        image = _panel(axis, gains, limit, chosen)
        axis.set_title(f"on {images}", fontsize=11)
        axis.set_xlabel("temperature")
        axis.set_xticks(range(len(temperatures)), [f"{temperature:g}" for temperature in temperatures])
        axis.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes[0].set_ylabel("alpha")
    figure.colorbar(image, ax=list(axes)).set_label("gain over the student alone, points")
    figure.suptitle("mean gain ± half of the 95 % interval;  ∘ the interval includes 0;  frame: best cell", fontsize=10)
    return figure


def _panel(axis: Axes, gains: Mapping[Place, Interval | None], limit: float, chosen: Place | None) -> AxesImage:
    alphas, temperatures = (sorted({key[position] for key in gains}) for position in (0, 1))
    grid = np.full((len(alphas), len(temperatures)), np.nan)
    for (alpha, temperature), gain in gains.items():
        row, column = alphas.index(alpha), temperatures.index(temperature)
        if gain is None:
            text = "–"
        else:
            grid[row, column] = 100 * gain.mean
            spread = "" if gain.low is None else f" ± {100 * gain.half_width:.1f}"
            text = f"{signed(gain.mean)}{spread}{' ∘' if gain.includes_zero else ''}"
        axis.text(column, row, text, ha="center", va="center", fontsize=10)
        if (alpha, temperature) == chosen:
            axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, linewidth=2.5))
    norm = TwoSlopeNorm(0, -1.8 * limit, 1.8 * limit)
    return axis.imshow(grid, cmap="PuOr", norm=norm, origin="lower", aspect="auto")


def _other_settings(cell: Cell) -> dict[str, str]:
    return {key: value for key, value in cell.settings.items() if key not in ("loss.alpha", "loss.temperature")}


def curves(named: Mapping[str, Curves]) -> Figure | None:
    """Validation accuracy by epoch of "student alone" and "student distilled", the mean over seeds with its 95 %
    interval. None for fewer than two epochs."""
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
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("mean over seeds, 95 % interval shaded", fontsize=10)
    axis.legend(loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


@dataclass(frozen=True)
class Point:
    """A network with its cost and accuracy.

    Attributes:
        stage: a key of `STAGES`.
        costs: by panel, in MB and ms, if known.
        accuracy: on the test images, a fraction.
        is_decisive: whether the verdict is about it.
    """

    name: str
    stage: str
    costs: dict[str, float]
    accuracy: Interval
    is_decisive: bool = False


def points_of(comparison: Comparison) -> list[Point]:
    """Teachers, students alone and distilled students, best first. The decisive student and its student alone count on
    the verdict's seeds; its teacher is included even without a row."""
    decisive = comparison.decisive
    cells = [row.cell for row in comparison.rows]
    taught_by: list[str] = []
    if decisive:
        alone, distilled = students_of(decisive)
        of_the_verdict = {cell.key: cell for cell in (alone, distilled) if cell}
        cells = [of_the_verdict.pop(cell.key, cell) for cell in cells] + list(of_the_verdict.values())
        taught_by = distilled.teacher_runs if uses_final_weights(distilled) else []
    latencies = Latencies(cells, _hardware(comparison))
    points, has_teacher = [], False
    for cell, name in zip(cells, _names(cells), strict=True):
        accuracy = interval(list(cell.values("test/accuracy").values()))
        if accuracy is None:
            continue
        is_decisive = decisive is not None and cell.key == decisive.cell.key
        has_teacher |= any(run.id in taught_by for run in cell.runs.values())
        costs = {SIZE: average(cell, "model/size_mb"), LATENCY: latencies.of(cell.first)}
        points.append(Point(name, cell.stage, _known(costs), accuracy, is_decisive))
    if decisive and decisive.cell.teacher_run and comparison.teacher_accuracy is not None and not has_teacher:
        run = decisive.cell.first
        costs = {SIZE: average(decisive.cell, "teacher/size_mb"), LATENCY: latencies.of(run, "teacher")}
        only = Interval(comparison.teacher_accuracy, None, None, 1)
        points.append(Point(f"{run.params.get('teacher.name', '')} teacher", "teacher", _known(costs), only))
    return sorted(points, key=lambda point: -point.accuracy.mean)


def _names(cells: Sequence[Cell]) -> list[str]:
    """Titles; cells of one title also say how they differ."""
    titles = Counter(cell.title for cell in cells)
    return [
        f"{cell.title} ({difference if len(difference) < MAX_DIFFERENCE else f'{difference[:MAX_DIFFERENCE]}…'})"
        if titles[cell.title] > 1 and difference
        else cell.title
        for cell, difference in zip(cells, differences(cells), strict=True)
    ]


def _known(costs: Mapping[str, float | None]) -> dict[str, float]:
    return {panel: cost for panel, cost in costs.items() if cost}  # 0 has no place on a log scale


def _hardware(comparison: Comparison) -> str:
    """The hardware of the latencies shown, that of the decisive student: those of others are not comparable."""
    decisive = comparison.decisive
    cells = [decisive.cell] if decisive else [row.cell for row in comparison.rows]
    return timed_on(run for cell in cells for run in cell.runs.values())


def front_of(places: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front: the indices of the costs and accuracies that no others beat in both, cheapest first."""
    front: list[int] = []
    for number in sorted(range(len(places)), key=lambda number: (places[number][0], -places[number][1])):
        if not front or places[number][1] > places[front[-1]][1]:
            front.append(number)
    return front


def pareto(comparison: Comparison) -> Figure | None:
    """Test accuracy against size and against latency, a point for each network, with the Pareto front. Panels with
    fewer than two points are left out; None if no panel is left."""
    points = points_of(comparison)
    panels = [panel for panel in (SIZE, LATENCY) if sum(panel in point.costs for point in points) > 1]
    if not panels:
        return None
    points = [point for point in points if any(panel in point.costs for panel in panels)]
    is_numbered = len(points) <= MAX_NUMBERED
    figure = Figure(figsize=(10, 4.4 + (0.23 * len(points) if is_numbered else 0.5)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    low, high = _limits([point.accuracy for point in points])
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_ylim(100 * low, 100 * high)
        shown = {number: point for number, point in enumerate(points, start=1) if panel in point.costs}
        _scatter(axis, panel, shown, is_numbered, width=WIDTH / len(panels))
    axes[0].set_ylabel("test accuracy, %")
    if LATENCY in panels:
        where = _hardware(comparison)
        one = ", one thread" if threads_of([row.cell for row, _ in displayed_rows(comparison)], where) else ""
        timed = f"\ntimed on {where}" if where else ""
        axes[-1].set_xlabel(f"latency, ms (one image{one}; log scale){timed}")
    if SIZE in panels:
        axes[0].set_xlabel("size, MB (log scale)")
    wide = max(len(point.name) for point in points) >= 45
    columns = (1 if wide else 2) if is_numbered else 3
    figure.legend(handles=_legend(points, is_numbered), loc="outside lower left", frameon=False, ncols=columns)
    return figure


def _limits(accuracies: Sequence[Interval]) -> tuple[float, float]:
    """Limits of the axis. They cut error bars much longer than the range of accuracies, as two seeds can give."""
    means = [accuracy.mean for accuracy in accuracies]
    most = max(max(means) - min(means), 0.02)
    low = min(_ends(accuracy)[0] for accuracy in accuracies)
    high = max(_ends(accuracy)[1] for accuracy in accuracies)
    low, high = max(low, min(means) - most, 0), min(high, max(means) + most, 1)
    margin = 0.08 * (high - low) or 0.01
    return low - margin, high + margin


def _ends(accuracy: Interval) -> tuple[float, float]:
    """Ends of the error bar, fractions."""
    if accuracy.low is None or accuracy.high is None:
        return accuracy.mean, accuracy.mean
    return accuracy.low, accuracy.high


def pareto_caption(comparison: Comparison) -> str:
    where = _hardware(comparison)
    timed = f"; one image at a time, timed on {where}" if where else ""
    return (
        "Test accuracy against size and latency, means with 95 % intervals over seeds; networks below the line are "
        f"beaten by one that is no larger, or no slower{timed}. Points of equal size or latency stand side by side; a "
        "network is as fast however it was trained"
    )


def _legend(points: Sequence[Point], is_numbered: bool) -> list[Line2D]:
    """An entry for each point or each stage, and for the front."""

    def line(label: str, stage: str, is_decisive: bool = False) -> Line2D:
        color, marker, _ = STAGES[stage]
        return Line2D(
            [], [], color=color, marker=marker, linestyle="none", markersize=9, label=label, **_edge(is_decisive)
        )

    front = Line2D([], [], color=FRONT, label="Pareto front: best for its size or latency")
    aside = Line2D([], [], linestyle="none", label="bars: 95 % intervals; side by side: equal size or latency")
    if is_numbered:
        lines = [
            line(
                f"{number}  {point.name}: {100 * point.accuracy.mean:.2f} %{VERDICT * point.is_decisive}",
                point.stage,
                point.is_decisive,
            )
            for number, point in enumerate(points, start=1)
        ]
        return [*lines, front, aside]
    stages = [stage for stage in STAGES if any(point.stage == stage for point in points)]
    lines = [line(STAGES[stage][2], stage) for stage in stages]
    if any(point.is_decisive for point in points):
        lines.append(line(VERDICT.removeprefix(", "), "distill", is_decisive=True))
    return [*lines, front, aside]


def _edge(is_decisive: bool) -> dict[str, Any]:
    return {"markeredgecolor": "black" if is_decisive else "white", "markeredgewidth": 2 if is_decisive else 0.7}


def _scatter(axis: Axes, panel: str, points: Mapping[int, Point], is_numbered: bool, width: float) -> None:
    """Draw one panel.

    Args:
        points: by their number in the plot.
        width: of the panel, roughly, in typographic points.
    """
    costs = {number: point.costs[panel] for number, point in points.items()}
    left, right = min(costs.values()) / 1.5, max(costs.values()) * 1.5
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    numbers = list(points)
    front = [numbers[place] for place in front_of([(costs[number], points[number].accuracy.mean) for number in points])]
    steps = [100 * points[number].accuracy.mean for number in front]
    axis.step([*(costs[number] for number in front), right], [*steps, steps[-1]], where="post", color=FRONT, zorder=1)
    is_crowded = len(points) > MAX_BARS
    diameter = 15.0 if is_numbered else 4.0 if is_crowded else 7.0
    places = _spread(axis, points, panel, front, width, diameter)
    _draw_points(axis, points, places, diameter)
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 8.5, "fontweight": "bold"}
    for number, point in points.items() if is_numbered else ():
        axis.text(places[number], 100 * point.accuracy.mean, str(number), color="white", zorder=5, **style)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _spread(
    axis: Axes, points: Mapping[int, Point], panel: str, front: Sequence[int], width: float, diameter: float
) -> dict[int, float]:
    """Where on the axis of costs to draw each point, so that none covers another."""
    costs = {number: point.costs[panel] for number, point in points.items()}
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    # Placed first, moved least: the front, then the decisive point.
    order = sorted(points, key=lambda number: (number not in front, not points[number].is_decisive, number))
    places = []
    for number in order:
        accuracy = points[number].accuracy
        bar = (accuracy.mean, accuracy.mean) if len(points) > MAX_BARS else _ends(accuracy)
        heights = [HEIGHT * (100 * end - bottom) / (top - bottom) for end in (accuracy.mean, *bar)]
        places.append((width * math.log(costs[number] / left) / math.log(right / left), *heights))
    moved = zip(order, side_by_side(places, diameter), strict=True)
    return {number: costs[number] * (right / left) ** (aside / width) for number, aside in moved}


def _draw_points(axis: Axes, points: Mapping[int, Point], places: Mapping[int, float], diameter: float) -> None:
    is_crowded = len(points) > MAX_BARS
    for stage, (color, marker, _) in STAGES.items():
        for is_decisive in (False, True):
            group = [n for n, point in points.items() if (point.stage, point.is_decisive) == (stage, is_decisive)]
            if not group:
                continue
            accuracies = [points[number].accuracy for number in group]
            has_bars = is_decisive or not is_crowded
            axis.errorbar(
                [places[number] for number in group],
                [100 * accuracy.mean for accuracy in accuracies],
                # NaN, which is not drawn, for a point without an interval.
                yerr=[100 * accuracy.half_width for accuracy in accuracies] if has_bars else None,
                color=color,
                marker=marker,
                markersize=diameter if marker == "o" else 0.88 * diameter,
                capsize=3,
                elinewidth=1.2,
                linestyle="none",
                zorder=4 if is_decisive else 3,
                **(_edge(is_decisive) if has_bars else {}),
            )


def side_by_side(places: Sequence[Sequence[float]], diameter: float) -> list[float]:
    """How far each point has to move to the right (or left, if negative) to touch none of those before it: the nearest
    free place within eight diameters. Error bars may come closer to each other than points.

    Args:
        places: for each point x, y, and the ends of its error bar; all in one unit.
    """
    taken = np.empty((len(places), 4))
    moved = []
    for number, (x, y, low, high) in enumerate(places):
        others = taken[:number]
        # How close each of the others may come.
        near = np.where(np.abs(others[:, 1] - y) < diameter, diameter, 0)
        near = np.where((others[:, 2] < high) & (others[:, 3] > low), np.maximum(near, diameter / 2), near)
        steps = (diameter * half / 2 * sign for half in range(17) for sign in (1, -1))
        aside = next((step for step in steps if not (np.abs(others[:, 0] - x - step) < near).any()), 0.0)
        taken[number] = x + aside, y, low, high
        moved.append(aside)
    return moved
