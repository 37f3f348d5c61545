"""Export a run: write its files, check them against PyTorch, time them, and describe them in the model card."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.assembly.networks import images_for
from kdpipe.data.dataset import subsample
from kdpipe.export.card import model_card
from kdpipe.export.formats import CARD, FORMATS, INT8, LABELS, ONNX, PROGRAM
from kdpipe.export.measurements import Measurement, legend, on_one_thread, time_measurements
from kdpipe.export.predictor import BATCH, Forward, model_metadata, numpy_forward, open_onnx, open_program, open_weights
from kdpipe.export.quantize import CALIBRATION_IMAGES, write_int8
from kdpipe.export.sources import Sources, fitted_temperature
from kdpipe.export.verification import (
    check_int8_accuracy,
    check_same_logits,
    largest_difference,
    top1_accuracy,
)
from kdpipe.export.writers import portable_config, trace_classifier, write_onnx, write_program, write_weights
from kdpipe.models import Classifier, Ensemble, size_mb
from kdpipe.runs.names import CONFIG
from kdpipe.settings.addresses import WEIGHTS
from kdpipe.settings.errors import flat
from kdpipe.system.hardware import prepare_device
from kdpipe.system.optional import optional
from kdpipe.system.progress import progress
from kdpipe.system.silence import quiet

MAX_TAG_LENGTH = 100_000  # MLflow's limit for tags of model versions


@dataclass
class Export:
    """An export, as far as it has come.

    Attributes:
        files: in the folder, or about to be.
        images: from the test split, to check the files on; uint8 [N, C, H, W].
        labels: theirs, [N].
        logits: the student's in PyTorch, [N, classes].
        measurements: of the teacher, if there is one, the student, and each checked file but the weights.
        refused: files that could not be written or failed their check, and why; they are deleted.
        notes: lines for the user.
    """

    sources: Sources
    folder: Path
    files: list[str]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    measurements: list[Measurement]
    notes: list[str]
    refused: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def refusing(self, *names: str) -> Iterator[None]:
        """Refuse these files if anything goes wrong, and continue with the others."""
        try:
            yield
        except Exception as error:  # exporters and runtimes have many of their own
            reason = flat(str(error).replace(f"{self.folder}{os.sep}", ""), 300)  # the folder is a temporary one
            if not reason or not isinstance(error, ValueError):
                reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
            for name in names:
                self.refused[name] = reason
                self.files.remove(name)
                (self.folder / name).unlink(missing_ok=True)  # it may be half written
            if WEIGHTS in names:
                (self.folder / CONFIG).unlink(missing_ok=True)

    def registry_tags(self, name: str) -> dict[str, str]:
        """The tags of one of the files in MLflow's registry."""
        run, metadata = self.sources.run, model_metadata(self.sources.run)
        (measured,) = (measured for measured in self.measurements if measured.name == LABELS[name])
        tags = {key: text for key, text in metadata.items() if key.startswith("kdpipe.")} | {
            "int8": str(name == INT8).lower(),
            "temperature": f"{fitted_temperature(run):.6g}",
            "checked_accuracy": f"{measured.accuracy:.6g}",
        }
        if "test/accuracy" in run.metrics:
            tags["test_accuracy"] = f"{run.metrics['test/accuracy']:.6g}"
        if len(metadata["class_names"]) <= MAX_TAG_LENGTH:
            tags["class_names"] = metadata["class_names"]
        return tags


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
    export = _started_export(sources, folder, formats, images)
    _write_files(export)
    for name in tuple(export.files):
        with export.refusing(name):
            _check_file(export, name, max_loss)
    if export.files:
        if sys.stdout.isatty():
            print(f"timing for {seconds:g} seconds", flush=True)
        time_measurements(export.measurements, export.images, seconds)
        text = legend(export.measurements, len(export.images), torch.get_num_threads())
        files = list(export.files)
        export.files += [CONFIG] if WEIGHTS in files else []
        with optional(CARD):
            (folder / CARD).write_text(model_card(sources, files, export.measurements, text, license))
            export.files.append(CARD)
        export.notes.insert(0, text)
    return export


def _started_export(sources: Sources, folder: Path, formats: Sequence[str], images: int) -> Export:
    """An export without files, with measurements of the teacher, if there is one, and the student in PyTorch."""
    files = [name for key, names in FORMATS.items() if key in formats for name in names]
    positions = subsample(sources.data.splits["test"], images)
    data, student = sources.data, sources.run.classifier
    checked, labels = images_for(student, data, positions).numpy(), data.labels[positions].numpy()
    networks: dict[str, Classifier | Ensemble] = {"teacher": sources.teacher[0]} if sources.teacher else {}
    measurements = []
    for name, network in [*networks.items(), ("student", student)]:
        forward = numpy_forward(network)
        if network is student:
            batches = (checked[first : first + BATCH] for first in range(0, len(checked), BATCH))
        else:  # photos that keep their shape become other squares for it
            batches = (data.images[some].contiguous().numpy() for some in positions.split(BATCH))
        logits = _logits(name, forward, batches, len(labels))
        size, accuracy = size_mb(network.network), top1_accuracy(logits, labels)
        measurements.append(Measurement(name, size, accuracy, on_one_thread(forward), forward))
    return Export(sources, folder, files, checked, labels, logits, measurements, list(sources.notes))


def _write_files(export: Export) -> None:
    """Write all files but the card; those that cannot be written are refused."""
    run, folder = export.sources.run, export.folder
    metadata = model_metadata(run)
    if graphs := [name for name in export.files if name in LABELS]:
        with export.refusing(*graphs):
            program = trace_classifier(run.classifier, run.image_shape)
    if ONNX in export.files:
        with export.refusing(ONNX, INT8):
            write_onnx(program, folder / ONNX, metadata)
    if INT8 in export.files:
        with export.refusing(INT8):
            positions = subsample(export.sources.data.splits["train"], CALIBRATION_IMAGES)
            write_int8(
                folder / ONNX,
                folder / INT8,
                images_for(run.classifier, export.sources.data, positions).numpy(),
                metadata,
            )
    if PROGRAM in export.files:
        with export.refusing(PROGRAM):
            write_program(program, folder / PROGRAM, metadata)
    if WEIGHTS in export.files:
        with export.refusing(WEIGHTS):
            write_weights(run, folder / WEIGHTS, metadata)
            (folder / CONFIG).write_text(portable_config(run))


def _check_file(export: Export, name: str, max_loss: float) -> None:
    """Open a file, compare it with PyTorch, and add its measurement; ValueError if it computes something else."""
    file = export.folder / name
    if name in (ONNX, INT8):
        one_thread, opened = open_onnx(file, 1).forward, open_onnx(file, torch.get_num_threads())
    else:
        with quiet():
            opened = open_weights(file) if name == WEIGHTS else open_program(file, trust=True)
        one_thread = on_one_thread(opened.forward)
    logits = opened.logits(export.images)
    if name == INT8:
        check_int8_accuracy(logits, export.logits, export.labels, max_loss)
    else:
        check_same_logits(logits, export.logits)
    if name != WEIGHTS:  # once opened, they are the student in PyTorch
        size, accuracy = file.stat().st_size / 2**20, top1_accuracy(logits, export.labels)
        agreement = top1_accuracy(logits, export.logits.argmax(axis=1))
        difference = largest_difference(logits, export.logits)
        export.measurements.append(
            Measurement(LABELS[name], size, accuracy, one_thread, opened.forward, agreement, difference)
        )


def _logits(name: str, forward: Forward, batches: Iterable[NDArray[np.uint8]], count: int) -> NDArray[np.float32]:
    """Logits [count, classes] of images, batch by batch, with a progress bar, since teachers may be slow."""
    parts = []
    with progress(f"{name}'s logits", count) as bar:
        for images in batches:
            parts.append(forward(images))
            bar.advance(len(images))
    return np.concatenate(parts)
