"""Fractions of predictions that a run may choose and be compared by, with what they are called in texts, and the
weights that they may be of.

Apart from other values, because commands know them before slow imports."""

from typing import Literal

Metric = Literal["accuracy", "balanced_accuracy", "macro_f1"]
METRICS: dict[str, str] = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
}
# Which weights: those after the last epoch, the best by validation, or their average over the steps (`train.ema`).
Select = Literal["last", "best", "ema"]
OF_AVERAGE = "_ema"  # ends the names of metrics that the averaged weights have after each epoch
LAST_EPOCH = "train/last_epoch"  # where a training that may stop early has ended


def ending(select: str) -> str:
    """What the names of an epoch's metrics end with, where they are those of the weights that decide."""
    return OF_AVERAGE if select == "ema" else ""
