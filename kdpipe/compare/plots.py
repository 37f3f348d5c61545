"""Plots of a comparison: the gain by alpha and temperature, validation accuracy by epoch, accuracy against size and
latency.

Blue and orange can be told apart with any kind of colour vision (Okabe & Ito 2008).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from kdpipe.compare.cell_metrics import average
from kdpipe.compare.cells import Cell, differences
from kdpipe.compare.comparison import Comparison, ComparisonRow, uses_final_weights
from kdpipe.compare.statistics import Interval, interval, share_interval, signed
from kdpipe.compare.student_summary import students_of
from kdpipe.settings.metric_names import METRICS, Metric

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
ALONE_NAME = "student alone"
# Of curves, the student alone first (Okabe & Ito, too).
STYLES = (
    *((ALONE, "--"), (DISTILLED, "-"), ("#009E73", "-."), ("#CC79A7", ":")),
    *(("#E69F00", "-"), ("#56B4E9", "-."), (TEACHER, ":")),
)
MAX_GAINS = 60  # more rows than this have no picture of gains
Curves = Mapping[int, Sequence[tuple[int, float]]]  # epochs and validation accuracies by seed
Place = tuple[float, float]  # alpha and temperature


def heatmap(comparison: Comparison) -> Figure | None:
    """The mean gain with its spread by alpha and temperature, on validation images, which decide the best cell, and on
    test images. None if neither varies."""
    best = comparison.best
    if best is None:
        return None
    others = best.cell.settings_without("loss.alpha", "loss.temperature")
    rows = {
        (float(params["loss.alpha"]), float(params["loss.temperature"])): row
        for row in comparison.rows
        if row.cell.stage == "distill" and row.cell.settings_without("loss.alpha", "loss.temperature") == others
        if {"loss.alpha", "loss.temperature"} <= (params := row.cell.first.params).keys()
    }
    if len(rows) < 2:
        return None
    panels = {"test images": {key: row.gain for key, row in rows.items()}}
    if any(row.validation_gain for row in rows.values()):
        panels = {"validation images": {key: row.validation_gain for key, row in rows.items()}, **panels}
    alphas, temperatures = map(len, map(set, zip(*rows, strict=True)))
    size = (1.2 + 1.55 * temperatures * len(panels) + 1.2, max(3.2, 1.7 + 0.85 * alphas))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    means = [100 * gain.mean for gains in panels.values() for gain in gains.values() if gain]
    limit = max(map(abs, means), default=1) or 1
    chosen = next((key for key, row in rows.items() if row is best), None)
    for axis, (images, gains) in zip(axes, panels.items(), strict=True):
        image = _panel(axis, gains, limit, chosen)
        axis.set_title(f"on {images}", fontsize=11)
    axes[0].set_ylabel("alpha")
    figure.colorbar(image, ax=list(axes)).set_label("gain over the student alone, points")
    explained = "mean gain ± half of the 95 % interval (?: one seed, or equal seeds)"
    figure.suptitle(f"{explained};  ∘ the interval includes 0;  frame: best cell", fontsize=10)
    return figure


def _panel(axis: Axes, gains: Mapping[Place, Interval | None], limit: float, chosen: Place | None) -> AxesImage:
    grid = pd.Series({place: 100 * gain.mean if gain else math.nan for place, gain in gains.items()}).unstack()
    for place, gain in gains.items():
        row, column = grid.index.get_loc(place[0]), grid.columns.get_loc(place[1])
        text = "–"
        if gain:
            spread = " ± ?" if gain.low is None else f" ± {100 * gain.half_width:.1f}"
            text = f"{signed(gain.mean)}{spread}{' ∘' if gain.includes_zero else ''}"
        axis.text(column, row, text, ha="center", va="center", fontsize=10)
        if place == chosen:
            axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, linewidth=2.5))
    axis.set_xlabel("temperature")
    axis.set_xticks(range(len(grid.columns)), [f"{temperature:g}" for temperature in grid.columns])
    axis.set_yticks(range(len(grid.index)), [f"{alpha:g}" for alpha in grid.index])
    norm = TwoSlopeNorm(0, -1.8 * limit, 1.8 * limit)
    return axis.imshow(grid, cmap="PuOr", norm=norm, origin="lower", aspect="auto")


def gains(comparison: Comparison) -> Figure | None:
    """The gain of each student over the same one alone, on the test images: its 95 % interval, and thinner the adjusted
    one. None for fewer than two, or more than can be read."""
    rows = [row for row in comparison.rows if row.gain]
    if not 2 <= len(rows) <= MAX_GAINS:
        return None
    names = _names([row.cell for row in rows])
    figure = Figure(figsize=(9, 1.3 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        color, marker, _ = STAGES[row.cell.stage]
        drawn = [(found, width) for found, width in ((row.adjusted_gain, 1), (row.gain, 3)) if found]
        for found, width in drawn:
            low, high = found.ends
            axis.plot([100 * low, 100 * high], [place, place], color=color, linewidth=width, solid_capstyle="butt")
            axis.plot(100 * found.mean, place, color=color, marker=marker, markeredgecolor="white", markersize=8)
    axis.axvline(0, color=FRONT, linewidth=1, zorder=0)
    texts = [f"{name}  {signed(row.gain.mean)}" for name, row in zip(names, rows, strict=True) if row.gain]
    axis.set_yticks(range(len(rows)), texts)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("gain over the student alone on the test images, points")
    thin = "; thin: for all rows at once" if any(row.adjusted_gain for row in rows) else ""
    axis.set_title(f"mean over seeds with its 95 % interval{thin}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def cells_with_curves(comparison: Comparison, decisive: ComparisonRow) -> dict[str, Cell]:
    """The student alone, and all that are compared with it if they can be told apart, else the decisive one."""
    alone = {ALONE_NAME: decisive.control.only(decisive.cell.runs)} if decisive.control else {}
    rivals = [row.cell for row in comparison.rows if row.control and row.control is decisive.control]
    if 2 <= len(rivals) < len(STYLES) and not comparison.confirmed:
        return alone | dict(zip(_names(rivals), rivals, strict=True))
    return alone | {"student distilled": decisive.cell}


def curves(named: Mapping[str, Curves], metric: Metric = "accuracy") -> Figure | None:
    """A validation metric by epoch, and the gain over the first curves, "student alone", paired by seed; means over
    seeds with their 95 % intervals. None for fewer than two epochs."""
    found = {
        name: accuracies
        for name, runs in named.items()
        if len(accuracies := pd.DataFrame({seed: dict(run) for seed, run in runs.items()}).dropna().sort_index()) > 1
    }
    if not found:
        return None
    styles = dict(zip(named, STYLES, strict=False))
    paired = {
        name: differences
        for name, accuracies in list(found.items())[1:]
        if ALONE_NAME in found
        and len(differences := (accuracies - found[ALONE_NAME]).dropna(axis=1, how="all").dropna())
    }
    figure = Figure(figsize=(12 if paired else 7, 4.2 + 0.2 * max(0, len(found) - 4)), layout="constrained")
    axis, *others = figure.subplots(1, 2 if paired else 1, squeeze=False)[0]
    drawn = [mean for name in found for mean in _band(axis, name, found[name], share_interval, styles[name])]
    axis.set_ylabel(f"validation {METRICS[metric]}, %")
    axis.set_ylim(*(100 * limit for limit in _limits(drawn)))
    axis.legend(loc="lower right", frameon=False)
    for other in others:
        for name, differences in paired.items():
            _band(other, name, differences, interval, styles[name])
        other.axhline(0, color=FRONT, linewidth=1, zorder=0)
        other.set_ylabel("gain over the student alone, paired by seed, points")
    for each in (axis, *others):
        each.set_xlabel("epoch")
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle("mean over seeds, 95 % interval shaded (none: one seed, or equal seeds)", fontsize=10)
    return figure


def _band(
    axis: Axes,
    name: str,
    values: pd.DataFrame,
    interval_of: Callable[[list[float]], Interval | None],
    style: tuple[str, str],
) -> list[Interval]:
    """Draw the mean over the columns, one per seed, with its interval."""
    means = [mean for row in values.to_numpy().tolist() if (mean := interval_of(row))]
    middle = np.array([100 * mean.mean for mean in means])
    below, above = 100 * np.transpose([mean.arms for mean in means])
    seeds = f"{values.shape[1]} seed{'s' if values.shape[1] > 1 else ''}"
    color, line = style
    axis.plot(values.index, middle, color=color, linestyle=line, label=f"{name}, {seeds}")
    axis.fill_between(values.index, middle - below, middle + above, color=color, alpha=0.2, linewidth=0)
    return means


@dataclass(frozen=True)
class Point:
    """A network with its cost and accuracy."""

    name: str
    stage: str  # a key of STAGES
    costs: dict[str, float]  # by panel, in MB and ms, if known
    accuracy: Interval  # on the test images, a fraction
    is_decisive: bool = False  # whether the verdict is about it


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
    timings = comparison.timings
    latency = f"latency_ms{timings.threads}"
    points = []
    for cell, name in zip(cells, _names(cells), strict=True):
        if accuracy := share_interval(list(cell.values(f"test/{comparison.metric}").values())):
            costs = _costs(average(cell, "model/size_mb"), timings.of(cell.first, f"model/{latency}"))
            is_decisive = decisive is not None and cell.key == decisive.cell.key
            points.append(Point(name, cell.stage, costs, accuracy, is_decisive))
    has_teacher = any(not cell.run_ids.isdisjoint(taught_by) for cell in cells)
    if decisive and decisive.cell.teacher_run and comparison.teacher_accuracy is not None and not has_teacher:
        run = decisive.cell.first
        costs = _costs(average(decisive.cell, "teacher/size_mb"), timings.of(run, f"teacher/{latency}"))
        accuracy = Interval(comparison.teacher_accuracy, None, None, 1)
        points.append(Point(f"{run.params.get('teacher.name', '')} teacher", "teacher", costs, accuracy))
    return sorted(points, key=lambda point: -point.accuracy.mean)


def _costs(size: float | None, latency: float | None) -> dict[str, float]:
    return {panel: cost for panel, cost in ((SIZE, size), (LATENCY, latency)) if cost}  # a log scale has no place for 0


def _names(cells: Sequence[Cell]) -> list[str]:
    """Titles; cells of one title also say how they differ."""
    titles = Counter(cell.title for cell in cells)
    return [
        f"{cell.title} ({difference if len(difference) < MAX_DIFFERENCE else f'{difference[:MAX_DIFFERENCE]}…'})"
        if titles[cell.title] > 1 and difference
        else cell.title
        for cell, difference in zip(cells, differences(cells), strict=True)
    ]


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
    axes[0].set_ylabel(f"test {METRICS[comparison.metric]}, %")
    if LATENCY in panels:
        timings = comparison.timings
        one = ", one thread" if timings.threads else ""
        timed = f"\ntimed on {timings.where}" if timings.where else ""
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
    lows, highs = zip(*(accuracy.ends for accuracy in accuracies), strict=True)
    most = max(max(means) - min(means), 0.02)
    low, high = max(min(lows), min(means) - most, 0), min(max(highs), max(means) + most, 1)
    margin = 0.08 * (high - low) or 0.01
    return max(low - margin, -0.03), min(high + margin, 1.03)  # a point at 100 % is drawn whole


def pareto_caption(comparison: Comparison) -> str:
    where = comparison.timings.where
    timed = f"; one image at a time, timed on {where}" if where else ""
    return (
        f"Test {METRICS[comparison.metric]} against size and latency, means with 95 % intervals over seeds; "
        f"networks below the line are beaten by one that is no larger, or no slower{timed}. Points of equal size or "
        "latency stand side by side; a network is as fast however it was trained"
    )


def _legend(points: Sequence[Point], is_numbered: bool) -> list[Line2D]:
    """An entry for each point or each stage, and for the front."""
    entries = [
        (f"{number}  {point.name}: {100 * point.accuracy.mean:.2f} %{VERDICT * point.is_decisive}", point)
        for number, point in enumerate(points, start=1)
    ]
    if not is_numbered:
        shown = {point.stage: (STAGES[point.stage][2], replace(point, is_decisive=False)) for point in points}
        decisive = [(VERDICT.removeprefix(", "), point) for point in points if point.is_decisive]
        entries = [*(shown[stage] for stage in STAGES if stage in shown), *decisive]
    bars = "bars: 95 % intervals (none: one seed, or equal seeds)"
    return [
        *(Line2D([], [], label=label, linestyle="none", markersize=9, **_marker(point)) for label, point in entries),
        Line2D([], [], color=FRONT, label="Pareto front: best for its size or latency"),
        Line2D([], [], linestyle="none", label=f"{bars}\nside by side: equal size or latency"),
    ]


def _marker(point: Point, has_edge: bool = True) -> dict[str, Any]:
    color, marker, _ = STAGES[point.stage]
    edge, edge_width = ("black", 2) if point.is_decisive else ("white", 0.7)
    edges = {"markeredgecolor": edge, "markeredgewidth": edge_width} if has_edge else {}
    return {"color": color, "marker": marker, **edges}


def _scatter(axis: Axes, panel: str, points: Mapping[int, Point], is_numbered: bool, width: float) -> None:
    """Draw a panel, roughly `width` typographic points wide; `points` by their number in the plot."""
    costs = {number: point.costs[panel] for number, point in points.items()}
    left, right = min(costs.values()) / 1.5, max(costs.values()) * 1.5
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    numbers = list(points)
    front = [numbers[place] for place in front_of([(costs[number], points[number].accuracy.mean) for number in points])]
    steps = [100 * points[number].accuracy.mean for number in front]
    axis.step([*(costs[number] for number in front), right], [*steps, steps[-1]], where="post", color=FRONT, zorder=1)
    diameter = 15.0 if is_numbered else 7.0 if len(points) <= MAX_BARS else 4.0
    # Placed first, moved least: the front, then the decisive point.
    order = sorted(points, key=lambda number: (number not in front, not points[number].is_decisive, number))
    places = _spread(axis, {number: points[number] for number in order}, panel, width, diameter)
    _draw_points(axis, points, places, diameter)
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 8.5, "fontweight": "bold"}
    for number, point in points.items() if is_numbered else ():
        axis.text(places[number], 100 * point.accuracy.mean, str(number), color="white", zorder=5, **style)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _spread(axis: Axes, points: Mapping[int, Point], panel: str, width: float, diameter: float) -> dict[int, float]:
    """Where on the axis of costs to draw each point, so that none covers another."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    places = []
    for point in points.values():
        mean = point.accuracy.mean
        ends = (mean, mean) if len(points) > MAX_BARS else point.accuracy.ends
        heights = [HEIGHT * (100 * height - bottom) / (top - bottom) for height in (mean, *ends)]
        places.append((width * math.log(point.costs[panel] / left) / math.log(right / left), *heights))
    moved = zip(points.items(), side_by_side(places, diameter), strict=True)
    return {number: point.costs[panel] * (right / left) ** (aside / width) for (number, point), aside in moved}


def _draw_points(axis: Axes, points: Mapping[int, Point], places: Mapping[int, float], diameter: float) -> None:
    for kind in product(STAGES, (False, True)):
        group = {number: point for number, point in points.items() if (point.stage, point.is_decisive) == kind}
        if not group:
            continue
        has_bars = kind[1] or len(points) <= MAX_BARS
        marker = _marker(next(iter(group.values())), has_edge=has_bars)
        axis.errorbar(
            [places[number] for number in group],
            [100 * point.accuracy.mean for point in group.values()],
            # NaN, which is not drawn, for a point without an interval.
            yerr=100 * np.transpose([point.accuracy.arms for point in group.values()]) if has_bars else None,
            **marker,
            markersize=diameter if marker["marker"] == "o" else 0.88 * diameter,
            capsize=3,
            elinewidth=1.2,
            linestyle="none",
            zorder=4 if kind[1] else 3,
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
