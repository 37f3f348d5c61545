"""Export a run: write its files, check them against PyTorch, time them, and describe them in the model card."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe import __version__
from kdpipe.data import ImageDataset
from kdpipe.export.card import model_card
from kdpipe.export.formats import CARD, FORMATS, INT8, ONNX, PROGRAM
from kdpipe.export.measurements import Measurement, legend, time_measurements
from kdpipe.export.predictor import (
    BATCH,
    Predictor,
    model_metadata,
    numpy_forward,
    open_onnx,
    open_program,
    open_weights,
    predictor_of,
)
from kdpipe.export.quantize import CALIBRATION_IMAGES, write_int8
from kdpipe.export.sources import Sources, fitted_temperature
from kdpipe.export.verification import (
    check_int8_accuracy,
    check_same_logits,
    largest_difference,
    subsample,
    top1_accuracy,
)
from kdpipe.export.writers import portable_config, quiet, trace_classifier, write_onnx, write_program, write_weights
from kdpipe.models import Classifier, Ensemble, size_mb
from kdpipe.runs.names import CONFIG
from kdpipe.settings.addresses import WEIGHTS
from kdpipe.settings.errors import flat
from kdpipe.system.hardware import prepare_device
from kdpipe.system.progress import progress

NAMES = {ONNX: "student ONNX", INT8: "student int8", PROGRAM: "student torch.export"}  # in the table
MAX_TAG_LENGTH = 100_000  # MLflow's limit for tags of model versions


@dataclass
class Export:
    """An export, as far as it has come.

    Attributes:
        files: in the folder, or about to be.
        refused: files that could not be written or failed their check, and why; they are deleted.
        measurements: of the teacher, if there is one, the student, and each checked file but the weights.
        notes: lines for the user.
    """

    sources: Sources
    folder: Path
    files: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def refusing(self, *names: str) -> Iterator[None]:
        """Refuse these files if anything goes wrong, and continue with the others."""
        try:
            yield
        except Exception as error:  # exporters and runtimes have many of their own
            for name in names:
                self.refused[name] = refusal_reason(error, self.folder)
                self.files.remove(name)
                (self.folder / name).unlink(missing_ok=True)  # it may be half written
            if WEIGHTS in names:
                (self.folder / CONFIG).unlink(missing_ok=True)

    def registry_tags(self, name: str) -> dict[str, str]:
        """The tags of one of the files in MLflow's registry."""
        run = self.sources.run
        (measured,) = (measured for measured in self.measurements if measured.name == NAMES[name])
        tags = {
            "kdpipe.run": run.record.id,
            "kdpipe.weights": run.address,
            "kdpipe.version": __version__,
            "int8": str(name == INT8).lower(),
            "temperature": f"{fitted_temperature(run):.6g}",
            "checked_accuracy": f"{measured.accuracy:.6g}",
        }
        if "test/accuracy" in run.metrics:
            tags["test_accuracy"] = f"{run.metrics['test/accuracy']:.6g}"
        class_names = json.dumps(run.class_names, ensure_ascii=False)
        if len(class_names) <= MAX_TAG_LENGTH:
            tags["class_names"] = class_names
        return tags


@dataclass(frozen=True)
class Reference:
    """What files are checked against: uint8 images [N, C, H, W], their labels [N], PyTorch's logits [N, classes]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]


def export_run(
    sources: Sources,
    folder: Path,
    formats: Sequence[str],
    *,
    images: int,
    max_loss: float,
    seconds: float,
    license: str | None,
) -> Export:
    """Write a run's network into `folder`, in these of `FORMATS`.

    Args:
        images: the number of test images that files are checked on.
        max_loss: points of accuracy that the int8 file may lose.
        seconds: of timing, in all.
        license: of the weights; None if unknown.
    """
    prepare_device(torch.device("cpu"))
    files = [name for key, names in FORMATS.items() if key in formats for name in names]
    export = Export(sources, folder, files, notes=list(sources.notes))
    reference = reference_for(sources, images)
    measure_networks(export, reference)
    write_formats(export)
    for name in tuple(export.files):
        with export.refusing(name):
            check_file(export, name, reference, max_loss)
    if export.files:
        if sys.stdout.isatty():
            print(f"timing for {seconds:g} seconds", flush=True)
        time_measurements(export.measurements, reference.images, seconds)
        write_card(export, len(reference.images), license)
    return export


def reference_for(sources: Sources, images: int) -> Reference:
    positions = subsample(sources.data.splits["test"], images)
    checked = images_at(sources.data, positions)
    logits = predictor_of(sources.run).logits(checked)
    return Reference(checked, sources.data.labels[positions].numpy(), logits)


def measure_networks(export: Export, reference: Reference) -> None:
    """Measure the teacher, if there is one, and the student in PyTorch."""

    def measure(name: str, network: Classifier | Ensemble, logits: NDArray[np.float32]) -> None:
        forward, accuracy = numpy_forward(network), top1_accuracy(logits, reference.labels)
        export.measurements.append(Measurement(name, size_mb(network.network), accuracy, forward, forward, True))

    if export.sources.teacher is not None:
        measure("teacher", export.sources.teacher[0], teacher_logits(export.sources.teacher[0], reference.images))
    measure("student", export.sources.run.classifier, reference.logits)


def write_formats(export: Export) -> None:
    """Write all files but the card; those that cannot be written are refused."""
    run, folder = export.sources.run, export.folder
    metadata = model_metadata(run)
    if graphs := [name for name in export.files if name in NAMES]:
        with export.refusing(*graphs):
            program = trace_classifier(run.classifier, run.image_shape)
    if ONNX in export.files:
        with export.refusing(ONNX, INT8):
            write_onnx(program, folder / ONNX, metadata)
    if INT8 in export.files:
        with export.refusing(INT8):
            positions = subsample(export.sources.data.splits["train"].sort().values, CALIBRATION_IMAGES)
            write_int8(folder / ONNX, folder / INT8, images_at(export.sources.data, positions), metadata)
    if PROGRAM in export.files:
        with export.refusing(PROGRAM):
            write_program(program, folder / PROGRAM, metadata)
    if WEIGHTS in export.files:
        with export.refusing(WEIGHTS):
            write_weights(run, folder / WEIGHTS, metadata)
            (folder / CONFIG).write_text(portable_config(run))


def check_file(export: Export, name: str, reference: Reference, max_loss: float) -> None:
    """Open a file, compare it with PyTorch, and add its measurement.

    Raises:
        ValueError: it does not compute what it should.
    """
    one_thread, all_threads = open_file(export.folder / name)
    logits = all_threads.logits(reference.images)
    if name == INT8:
        check_int8_accuracy(logits, reference.logits, reference.labels, max_loss)
    else:
        check_same_logits(logits, reference.logits)
    if name == WEIGHTS:  # once opened, they are the student in PyTorch
        return
    export.measurements.append(
        Measurement(
            NAMES[name],
            (export.folder / name).stat().st_size / 2**20,
            top1_accuracy(logits, reference.labels),
            one_thread.forward,
            all_threads.forward,
            is_torch=name == PROGRAM,
            agreement=top1_accuracy(logits, reference.logits.argmax(axis=1)),
            difference=largest_difference(logits, reference.logits),
        )
    )


def open_file(file: Path) -> tuple[Predictor, Predictor]:
    """An exported file, for one thread and for all."""
    if file.name in (ONNX, INT8):
        return open_onnx(file, 1), open_onnx(file, torch.get_num_threads())
    with quiet():
        predictor = open_weights(file) if file.name == WEIGHTS else open_program(file, trust=True)
    return predictor, predictor


def write_card(export: Export, checked: int, license: str | None) -> None:
    text = legend(export.measurements, checked, torch.get_num_threads())
    card = model_card(export.sources, export.files, export.measurements, text, license)
    (export.folder / CARD).write_text(card)
    export.files += [*([CONFIG] if WEIGHTS in export.files else []), CARD]
    export.notes.insert(0, text)


def refusal_reason(error: Exception, folder: Path) -> str:
    """The error on one line, without the folder, which is renamed or deleted afterwards."""
    text = flat(str(error).replace(f"{folder}{os.sep}", ""), 300)
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def images_at(data: ImageDataset, positions: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 [N, C, H, W] in memory."""
    images: NDArray[np.uint8] = data.images[positions].contiguous().numpy()
    return images


def teacher_logits(teacher: Classifier | Ensemble, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits [N, classes], with a progress bar, since teachers may be slow."""
    forward = numpy_forward(teacher)
    parts = []
    with progress("teacher's logits", len(images)) as bar:
        for first in range(0, len(images), BATCH):
            parts.append(forward(images[first : first + BATCH]))
            bar.advance(len(parts[-1]))
    return np.concatenate(parts)
