"""Means over seeds with their intervals, and the verdict that they support.

Differences between accuracies (gains) have Student's t interval. An accuracy has it on the logit scale: near 0 or 1, or
with two seeds, the plain one reaches beyond what an accuracy can be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

# scipy.stats has these, too, and takes a second to import.
from scipy.special import expit, logit, nctdtr, stdtrit

POWER = 0.8  # the share of such experiments in which a true gain of the stated size would be found
MOST_SEEDS = 1000
REPLICATES = 4000

HELPED, HURT, NO_EVIDENCE, CANNOT_TELL = "distillation helped", "distillation hurt", "no evidence", "cannot tell"


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval, as fractions. There are no bounds for a single seed, nor if all seeds
    are equal: that they agree to the last image does not say how far the next one may be off."""

    mean: float
    low: float | None
    high: float | None
    number: int

    @property
    def has_no_spread(self) -> bool:
        """Whether several seeds are all equal."""
        return self.number > 1 and self.low is None

    @property
    def ends(self) -> tuple[float, float]:
        """The bounds; twice the mean without bounds."""
        return (self.mean, self.mean) if self.low is None or self.high is None else (self.low, self.high)

    @property
    def half_width(self) -> float:
        """How far the interval reaches: a mean closer to 0 cannot be told from 0. NaN without bounds."""
        return max(self.arms)

    @property
    def arms(self) -> tuple[float, float]:
        """From the mean down to the lower and up to the upper bound; NaN without bounds."""
        if self.low is None or self.high is None:
            return math.nan, math.nan
        return self.mean - self.low, self.high - self.mean

    @property
    def includes_zero(self) -> bool:
        """Whether 0 is possible; True without bounds."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def interval(differences: Sequence[float], comparisons: int = 1) -> Interval | None:
    """Student's t interval of the mean of differences between two shares, one per seed, within −1 and 1; None for no
    values.

    Args:
        comparisons: how many such intervals, of several arms against one control, have to hold at once. They are
            widened by Bonferroni's rule. Dunnett's test would be sharper for independent groups, but drops the pairing
            by seed, which takes away most of the variance here; Holm's rule has no intervals.
    """
    if not differences:
        return None
    mean, half = fmean(differences), _half_width(differences, 0.05 / comparisons)
    if half is None:
        return Interval(mean, None, None, len(differences))
    return Interval(mean, max(mean - half, -1.0), min(mean + half, 1.0), len(differences))


def share_interval(shares: Sequence[float]) -> Interval | None:
    """The interval of the mean of shares, such as accuracies, one per seed; None for no values.

    It is the t interval of the mean, carried to the logit scale by the delta method and back (`xlogit` of svyciprop in
    R's survey package). So it lies within 0 and 1, contains the mean, is the plain t interval for seeds that hardly
    differ, and is defined when a seed gets every image right. In simulations of 3 and 5 seeds around 99.3 %, it covers
    the truth in 99 and 95 % of cases, the plain interval cut at 1 in 92 and 93 %. With two seeds it is wide.
    """
    if not shares:
        return None
    mean, half = fmean(shares), _half_width(shares)
    if half is None:
        return Interval(mean, None, None, len(shares))
    reach = half / (mean * (1 - mean))  # half the width on the logit scale, whose slope this is
    low, high = (float(expit(logit(mean) + side * reach)) for side in (-1, 1))
    return Interval(mean, low, high, len(shares))


def shifted(value: Interval, by: float) -> Interval:
    """The interval of shares minus a constant."""
    low, high = (None if bound is None else bound - by for bound in (value.low, value.high))
    return replace(value, mean=value.mean - by, low=low, high=high)


def interval_with_images(differences: NDArray[np.int8], seed: int = 0) -> Interval | None:
    """The interval of a gain that covers the sample of test images, too; None for one seed, and for seeds with the same
    gain.

    A paired bootstrap: in each replicate the images are drawn anew, for all seeds alike, and the mean over seeds varies
    as Student's t says. With no doubt about the images it is `interval`'s.

    Args:
        differences: 1 where only the student in question is right, −1 where only the other one is, else 0;
            [seeds, images].
        seed: of the random numbers.
    """
    seeds, images = differences.shape
    gains = differences.mean(axis=1)
    half = _half_width(gains.tolist())
    if half is None:
        return None
    draw = np.random.default_rng(seed)
    # Images with the same mean over seeds are alike, so it is enough to draw how many of each kind there are.
    kinds, counts = np.unique(differences.sum(axis=0), return_counts=True)
    resampled = draw.multinomial(images, counts / images, REPLICATES) @ kinds / (images * seeds)
    standard_error = gains.std(ddof=1) / seeds**0.5
    low, high = np.quantile(resampled + standard_error * draw.standard_t(seeds - 1, REPLICATES), [0.025, 0.975])
    return Interval(float(gains.mean()), float(low), float(high), seeds)


def seeds_needed(gain: Interval, size: float) -> int | None:
    """How many seeds would show a true gain of this size in four of five experiments, if seeds vary as they do here;
    None for more than a thousand, or where their spread is not known: of an interval that is cut at ±1, it is not."""
    if gain.low is None or gain.high is None or gain.low == -1 or gain.high == 1:
        return None
    deviation = (gain.high - gain.low) / 2 * gain.number**0.5 / float(stdtrit(gain.number - 1, 0.975))
    for number in range(2, MOST_SEEDS + 1):
        threshold = float(stdtrit(number - 1, 0.975))
        if nctdtr(number - 1, size / deviation * number**0.5, threshold) <= 1 - POWER:
            return number
    return None


def _half_width(values: Sequence[float], error: float = 0.05) -> float | None:
    """Half of the width of Student's t interval of a mean; None for one value, and for equal ones."""
    if len(values) < 2 or max(values) - min(values) < 1e-9:
        return None
    return float(stdtrit(len(values) - 1, 1 - error / 2)) * stdev(values) / len(values) ** 0.5


def verdict(gain: Interval | None, metric: str = "accuracy") -> str:
    """What a gain in test accuracy, or another metric, over the same student alone, paired by seed, says about
    distillation."""
    if gain is None:
        return f"{CANNOT_TELL}: no seed in common with the student alone"
    of_what = "" if metric == "accuracy" else f" of {metric}"
    points = f"{signed(gain.mean)} points{of_what} on the test set"
    if gain.number < 2:
        return f"{CANNOT_TELL}: one seed shows nothing ({points}); repeat both with seed=1, seed=2, …"
    if gain.low is None or gain.high is None:
        return f"{CANNOT_TELL}: {points} for each of {gain.number} seeds show no spread; repeat with more"
    word = HELPED if gain.low > 0 else HURT if gain.high < 0 else NO_EVIDENCE
    low, high = (signed(bound).removeprefix("+") for bound in (gain.low, gain.high))
    text = f"{word}: {points} (95 % interval {low} to {high}, {gain.number} seeds)"
    if word != NO_EVIDENCE:
        return text
    least = f"{100 * gain.half_width:.1f}"
    return (
        f"{text}; with {gain.number} seeds that vary so much, a mean gain counts from {least} points on{_power(gain)}"
    )


def _power(gain: Interval) -> str:
    """How many seeds gains of one point and of half a point would take; "" where it would be thousands."""
    needed = {text: seeds_needed(gain, size) for text, size in (("1 point", 0.01), ("0.5", 0.005))}
    known = [f"{seeds} for a gain of {text}" for text, seeds in needed.items() if seeds]
    return f"; seeds needed: {', '.join(known)}" if known else ""


def signed(fraction: float) -> str:
    """+2.9 or −0.4, in points."""
    return f"{100 * fraction:+.1f}".replace("-", "−")
