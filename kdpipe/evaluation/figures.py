"""Figures of one run: confusion matrix, reliability diagram, and images on which student and teacher differ.

Blue and orange can be told apart with any colour vision (Okabe & Ito 2008).
"""

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.evaluation.metrics import BINS, Reliability

RIGHT, WRONG, GREY = "#0072B2", "#D55E00", "#555555"
NO_FORMULAS = rc_context({"text.parse_math": False})  # names of classes may have a $
WITH_NUMBERS, WITH_NAMES = 20, 60  # most classes for which a matrix shows them


def as_png(figure: Figure) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in scripts that the font lacks become boxes
        figure.savefig(content, format="png", dpi=150, bbox_inches="tight")
    return content.getvalue()


@NO_FORMULAS
def draw_confusion(counts: NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """A confusion matrix [classes, classes] of `metrics.confusion`, in per cent of each row."""
    number = len(class_names)
    side = min(4 + 0.45 * number, 13)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if number <= WITH_NUMBERS:
        for row, column in np.ndindex(percent.shape):
            value = percent[row, column]
            text = f"{value:.0f}" if round(value) else "·" if counts[row, column] else ""
            axis.text(column, row, text, ha="center", va="center", color="white" if value > 60 else "black", fontsize=9)
    if number <= WITH_NAMES:
        names = [_short(name) for name in class_names]
        size = 10 if number <= WITH_NUMBERS else 7
        axis.set_xticks(range(number), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
        axis.set_yticks(range(number), names, fontsize=size)
    axis.set_xlabel("answer")
    axis.set_ylabel("label")
    axis.set_title(f"test images, % of each class; {100 * np.trace(counts) / counts.sum():.1f} % right", fontsize=10)
    figure.colorbar(image, ax=axis, shrink=0.8, label="%")
    return figure


def draw_reliability(networks: Mapping[str, Reliability]) -> Figure:
    """A reliability diagram per network, by name: accuracy at each confidence, and below the share of images there."""
    figure = Figure(figsize=(0.4 + 3.9 * len(networks), 5), layout="constrained")
    panels = figure.subplots(2, len(networks), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    middles = (np.arange(BINS) + 0.5) / BINS
    for (name, found), above, below in zip(networks.items(), panels[0], panels[1], strict=True):
        accuracy = np.nan_to_num(found.accuracy)
        above.bar(middles, accuracy, width=0.9 / BINS, color=RIGHT, label="accuracy")
        gap = np.nan_to_num(found.confidence - found.accuracy)
        style = {"color": "none", "edgecolor": WRONG, "hatch": "////", "label": "gap to the confidence"}
        above.bar(middles, gap, bottom=accuracy, width=0.9 / BINS, **style)
        above.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="accuracy = confidence")
        above.set_ylim(0, 1)
        mean = float(np.nansum(found.share * found.accuracy))
        confidence = float(np.nansum(found.share * found.confidence))
        title = f"{name}: {100 * mean:.1f} % right, mean confidence {100 * confidence:.1f} %"
        above.set_title(f"{title}\nexpected calibration error {100 * found.error:.1f} %", fontsize=10)
        below.bar(middles, 100 * found.share, width=0.9 / BINS, color=GREY)
        below.set_xlabel("confidence (probability of the answer)")
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(0, 1)
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("% of images")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


@NO_FORMULAS
def draw_differing(images: Sequence[Tensor], captions: Sequence[Sequence[str]]) -> Figure:
    """Images, uint8 [C, H, W], each with its label, the student's prediction and probability, and the teacher's."""
    columns = 4
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.75 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, image, (label, *answers) in zip(axes, images, captions, strict=False):
        pixels = image.permute(1, 2, 0).numpy()
        axis.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=255)
        lines = [(f"it is: {_short(label)}", "black")]
        for who, answer, probability in (("student", *answers[:2]), ("teacher", *answers[2:])):
            mark, color = ("✓", RIGHT) if answer == label else ("✗", WRONG)
            lines.append((f"{mark} {who}: {_short(answer)}, {100 * float(probability):.0f} %", color))
        for number, (text, color) in enumerate(lines):
            axis.text(0, -0.02 - 0.105 * number, text, transform=axis.transAxes, va="top", fontsize=8.5, color=color)
    figure.suptitle("test images on which student and teacher differ most, with their answers", fontsize=11)
    figure.set_layout_engine("constrained", h_pad=0.22)
    return figure


def draw_views(stored: Sequence[Tensor], seen: Sequence[Tensor]) -> Figure:
    """Images as they are stored, uint8 [C, H, W] each, beside what training sees of them."""
    columns = min(4, len(stored))
    rows = -(-len(stored) // columns)
    pairs = [_side_by_side(*pair) for pair in zip(stored, seen, strict=True)]
    height = 2.6 * max(pair.shape[0] / pair.shape[1] for pair in pairs)
    figure = Figure(figsize=(2.8 * columns, (height + 0.2) * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, pair in zip(axes, pairs, strict=False):
        axis.imshow(pair if pair.shape[2] == 3 else pair[:, :, 0], cmap="gray", vmin=0, vmax=255)
    figure.suptitle("the first batch: each image as stored (left) and as epoch 1 sees it (right)", fontsize=11)
    return figure


def _side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two images with white between them, uint8 [H, W, C]."""
    height = max(left.shape[1], right.shape[1])
    gap = left.new_full((left.shape[0], height, max(left.shape[2] // 16, 1)), 255)
    whole = [F.pad(image, (0, 0, 0, height - image.shape[1]), value=255) for image in (left, right)]
    return torch.cat([whole[0], gap, whole[1]], dim=2).permute(1, 2, 0)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
