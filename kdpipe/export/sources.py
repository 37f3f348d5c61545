"""What an export is made from: a finished run, its images and its teacher."""

import csv
import io
from dataclasses import dataclass, replace
from typing import Any

from kdpipe.assembly.finished_runs import FinishedRun, open_data, open_run, teacher_if_there
from kdpipe.data import ImageDataset
from kdpipe.models import Classifier, Ensemble
from kdpipe.runs.names import CLASSES
from kdpipe.settings.identity import canonical
from kdpipe.tracking import RunStore

SECTIONS = (
    *("model", "teacher", "dataset", "loss", "also", "optimizer", "scheduler", "augmentation"),
    *("train", "distillation"),
)


@dataclass(frozen=True)
class Sources:
    """What an export is made from.

    Attributes:
        teacher: the network and its name; None without one, or where it cannot be opened.
        notes: what is left out, and why.
        class_accuracy: on the run's test images, by class; empty where the run has not stored it.
    """

    run: FinishedRun
    data: ImageDataset
    teacher: tuple[Classifier | Ensemble, str] | None
    notes: list[str]
    class_accuracy: dict[str, float]


def open_sources(address: str, store: RunStore, root: str | None) -> Sources:
    """Open a run with its images and its teacher.

    Raises:
        ValueError: the run or its weights are missing, or the images are not those that it was trained on.
    """
    run = open_run(address, store)
    data = open_data(run, root)
    channels, height, width = data.image_shape
    run = replace(run, image_shape=(channels, height, width))  # runs before 0.4.0 do not store it
    return Sources(run, data, *teacher_if_there(run, store), _accuracy_by_class(run, store))


def _accuracy_by_class(run: FinishedRun, store: RunStore) -> dict[str, float]:
    """The test accuracy of each class that has test images, as the run measured it with its last weights."""
    content = store.read(run.record.id, CLASSES) if "test/accuracy" in run.metrics else None
    lines = csv.DictReader(io.StringIO((content or b"").decode(), newline=""))
    return {line["class"]: float(line["accuracy"]) for line in lines if line["accuracy"]}


def public_settings(run: FinishedRun) -> dict[str, Any]:
    """The settings of the model and its training, as plain values; not the store, whose URI may contain a password."""
    settings = canonical(run.settings.plain)
    return {section: settings[section] for section in SECTIONS if section in settings}


def fitted_temperature(run: FinishedRun) -> float:
    """The temperature fitted on the run's validation images; 1 without one."""
    temperature = run.metrics.get("model/temperature", 1.0)
    return temperature if 0 < temperature < float("inf") else 1.0
