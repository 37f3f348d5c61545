"""Means with their intervals, and what they allow to say."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit  # Student's t; scipy.stats has it too, and takes a second to import

HELPED, HURT, NO_EVIDENCE, CANNOT_TELL = "distillation helped", "distillation hurt", "no evidence", "cannot tell"


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval (Student's t); no bounds for one seed, or where seeds do not differ.

    All are fractions.
    """

    mean: float
    low: float | None
    high: float | None
    number: int

    @property
    def half_width(self) -> float:
        """Half of the interval: a mean nearer to 0 than this cannot be told from it."""
        return (self.high - self.low) / 2 if self.low is not None and self.high is not None else float("nan")

    @property
    def includes_zero(self) -> bool:
        """Whether 0 is inside, or no bounds say that it is not."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def interval(values: Sequence[float]) -> Interval | None:
    """The interval of values, one for each seed; None where there are none."""
    if not values:
        return None
    if len(values) < 2 or max(values) - min(values) < 1e-9:
        return Interval(fmean(values), None, None, len(values))
    mean = fmean(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, len(values))


def verdict(gain: Interval | None) -> str:
    """What the gain in test accuracy of a student over the same student alone, paired by seed, says of distillation."""
    if gain is None:
        return f"{CANNOT_TELL}: no seed in common with the student alone"
    points = f"{signed(gain.mean)} points on the test set"
    if gain.number < 2:
        return f"{CANNOT_TELL}: one seed shows nothing ({points}); repeat both with seed=1, seed=2, …"
    if gain.low is None or gain.high is None:
        return f"{CANNOT_TELL}: {points} for each of {gain.number} seeds show no spread; repeat with more"
    word = HELPED if gain.low > 0 else HURT if gain.high < 0 else NO_EVIDENCE
    text = f"{word}: {points} (95 % interval {plain(gain.low)} to {plain(gain.high)}, {gain.number} seeds)"
    if word == NO_EVIDENCE:
        least = 100 * gain.half_width
        text += f"; with {gain.number} seeds that vary so much, a mean gain counts from {least:.1f} points on"
    return text


def signed(fraction: float) -> str:
    """+2.9 or −0.4, in points."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def plain(fraction: float) -> str:
    """2.9 or −0.4, in points."""
    return f"{100 * fraction:.1f}".replace("-", "−")
