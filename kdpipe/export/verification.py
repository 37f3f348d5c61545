"""Does an exported file compute what the PyTorch network computes?"""

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
TOLERANCE = 1e-3  # of a difference between logits, relative to the largest logit if that is above 1


def top1_accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """The share of images whose largest logit is that of their label."""
    return float((logits.argmax(axis=1) == labels).mean())


def largest_difference(logits: Logits, expected: Logits) -> float:
    return float(np.abs(logits - expected).max())


def check_same_logits(logits: Logits, expected: Logits) -> None:
    """Raise ValueError if the logits [N, classes] of a float file differ from PyTorch's by more than rounding."""
    _check_shape_and_values(logits, expected)
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    difference = largest_difference(logits, expected)
    if difference > tolerance:
        raise ValueError(f"its logits differ from PyTorch's by up to {difference:.3g}, more than {tolerance:.3g}")


def check_int8_accuracy(logits: Logits, expected: Logits, labels: NDArray[np.int64], max_loss: float) -> None:
    """Raise ValueError if a quantized file loses more than `max_loss` points of accuracy."""
    _check_shape_and_values(logits, expected)
    accuracy, before = (100 * top1_accuracy(each, labels) for each in (logits, expected))
    if round(before - accuracy, 6) > max_loss:
        raise ValueError(
            f"its accuracy on {len(labels):,} test images is {accuracy:.2f} %, PyTorch's {before:.2f} %: a loss of "
            f"{before - accuracy:.2f} points, more than --max-loss {max_loss:g}"
        )


def _check_shape_and_values(logits: Logits, expected: Logits) -> None:
    """Raise ValueError for logits of another shape, and for NaN and infinity."""
    if logits.shape != expected.shape:
        raise ValueError(f"its logits have shape {list(logits.shape)}, expected {list(expected.shape)}")
    if not np.isfinite(logits).all():
        raise ValueError("some of its logits are not finite")
