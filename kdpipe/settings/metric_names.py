"""Fractions of predictions that a run may choose and be compared by, with what they are called in texts.

Apart from other values, because commands know them before slow imports."""

from typing import Literal

Metric = Literal["accuracy", "balanced_accuracy", "macro_f1"]
METRICS: dict[str, str] = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
}
