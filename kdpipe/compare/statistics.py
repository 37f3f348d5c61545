"""Means over seeds with their intervals, and the verdict that they support."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit  # Student's t; scipy.stats has it too, and takes a second to import

HELPED, HURT, NO_EVIDENCE, CANNOT_TELL = "distillation helped", "distillation hurt", "no evidence", "cannot tell"


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t), as fractions; no bounds for a single seed, or if seeds do
    not differ."""

    mean: float
    low: float | None
    high: float | None
    number: int

    @property
    def ends(self) -> tuple[float, float]:
        """The bounds; twice the mean without bounds."""
        return (self.mean, self.mean) if self.low is None or self.high is None else (self.low, self.high)

    @property
    def half_width(self) -> float:
        """Half of the interval: a mean closer to 0 cannot be told from 0. NaN without bounds."""
        return float("nan") if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def includes_zero(self) -> bool:
        """Whether 0 is possible; True without bounds."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def interval(values: Sequence[float]) -> Interval | None:
    """The interval of some values, one per seed; None for no values."""
    if not values:
        return None
    mean = fmean(values)
    if len(values) < 2 or max(values) - min(values) < 1e-9:
        return Interval(mean, None, None, len(values))
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, len(values))


def verdict(gain: Interval | None) -> str:
    """What a gain in test accuracy over the same student alone, paired by seed, says about distillation."""
    if gain is None:
        return f"{CANNOT_TELL}: no seed in common with the student alone"
    points = f"{signed(gain.mean)} points on the test set"
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
    return f"{text}; with {gain.number} seeds that vary so much, a mean gain counts from {least} points on"


def signed(fraction: float) -> str:
    """+2.9 or −0.4, in points."""
    return f"{100 * fraction:+.1f}".replace("-", "−")
