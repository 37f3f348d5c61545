"""One export: write, check, time, describe."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe import __version__
from kdpipe.assembly.finished_runs import FinishedRun, open_data, open_run, teacher_if_there
from kdpipe.data import ImageDataset
from kdpipe.export.card import Taught, card
from kdpipe.export.check import (
    STUDENT,
    TEACHER,
    Row,
    Timed,
    compare,
    evenly,
    legend,
    problem_of_float,
    problem_of_int8,
    time_rows,
)
from kdpipe.export.deployed import (
    BATCH,
    INT8,
    ONNX,
    PROGRAM,
    WEIGHTS,
    Deployed,
    about,
    answers_of,
    of_run,
    open_onnx,
    open_program,
    open_weights,
    temperature_of,
)
from kdpipe.export.formats import config_of, quiet, traced, write_onnx, write_program, write_weights
from kdpipe.export.int8 import CALIBRATION, write_int8
from kdpipe.models import Classifier, Ensemble, size_mb
from kdpipe.runs.names import CLASSES, CONFIG
from kdpipe.system.hardware import prepare
from kdpipe.system.progress import progress
from kdpipe.tracking import RunStore

ROWS = {ONNX: "student ONNX", INT8: "student int8", PROGRAM: "student torch.export"}
CARD = "README.md"
MAX_TAG_LENGTH = 100_000  # that MLflow takes for a model's version


@dataclass(frozen=True)
class Sources:
    """What an export is made from."""

    run: FinishedRun
    data: ImageDataset
    teacher: tuple[Classifier | Ensemble, str] | None
    notes: list[str]  # what is left out, and why
    by_class: dict[str, float]  # accuracy on the run's test images; empty where the run has not kept it

    @property
    def example(self) -> NDArray[np.uint8]:
        """Two black images, uint8 [2, C, H, W]."""
        return np.zeros((2, *self.run.image_shape), np.uint8)


@dataclass
class Made:
    """What came of an export.

    Attributes:
        refused: files that could not be made or failed their check, and why; they are not in the folder.
    """

    run: FinishedRun
    files: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tags(self, name: str) -> dict[str, str]:
        """What the registry is told of one of the files."""
        (row,) = (row for row in self.rows if row.name == ROWS[name])
        tags = {
            "kdpipe.run": self.run.record.id,
            "kdpipe.weights": self.run.address,
            "kdpipe.version": __version__,
            "int8": str(name == INT8).lower(),
            "temperature": f"{temperature_of(self.run):.6g}",
            "checked_accuracy": f"{row.accuracy:.6g}",
        }
        if "test/accuracy" in self.run.metrics:
            tags["test_accuracy"] = f"{self.run.metrics['test/accuracy']:.6g}"
        names = json.dumps(self.run.class_names, ensure_ascii=False)
        if len(names) <= MAX_TAG_LENGTH:
            tags["class_names"] = names
        return tags


def open_sources(address: str, store: RunStore, root: str | None) -> Sources:
    """The run with its images and its teacher.

    Raises:
        ValueError: no such run, no weights, or other images than its own.
    """
    run = open_run(address, store)
    data = open_data(run, root)
    channels, height, width = data.images.shape[1:]
    run = replace(run, image_shape=(channels, height, width))  # runs before 0.4.0 do not tell
    return Sources(run, data, *teacher_if_there(run, store), accuracy_by_class(run, store))


def accuracy_by_class(run: FinishedRun, store: RunStore) -> dict[str, float]:
    """As the run measured it, of the weights at its end; without classes that had no test image."""
    content = store.read(run.record.id, CLASSES) if "test/accuracy" in run.metrics else None
    lines = csv.DictReader(io.StringIO((content or b"").decode(), newline=""))
    return {line["class"]: float(line["accuracy"]) for line in lines if line["accuracy"]}


def make(
    sources: Sources,
    folder: Path,
    formats: Sequence[str],
    *,
    images: int,
    max_loss: float,
    seconds: float,
    license: str | None,
) -> Made:
    """Write a run's network into `folder`: write → check → time → describe. What is refused is not left there."""
    run, data = sources.run, sources.data
    prepare(torch.device("cpu"))
    made = Made(run, notes=list(sources.notes))
    said = about(run, __version__)
    positions = evenly(data.splits["test"], images)
    checked, labels = images_at(data, positions), data.labels[positions].numpy()
    expected = of_run(run).logits(checked)
    works: dict[str, Timed] = {}

    def add_network(name: str, network: Classifier | Ensemble, logits: NDArray[np.float32]) -> None:
        accuracy = float((logits.argmax(axis=1) == labels).mean())
        made.rows.append(Row(name, size_mb(network.network), accuracy))
        works[name] = Timed(answers_of(network), answers_of(network), is_torch=True)

    @contextmanager
    def refusing(*names: str) -> Iterator[None]:
        """What is raised in here refuses these files; the others are made all the same."""
        try:
            yield
        except Exception as error:  # exporters and runtimes have many of their own
            for name in names:
                made.refused[name] = reason_of(error, folder)
                (folder / name).unlink(missing_ok=True)  # half of it may be there

    def check(name: str, opened: Deployed, problem: Callable[[NDArray[np.float32]], str | None]) -> None:
        """Raise ValueError for a file that is not as it should be."""
        logits = opened.logits(checked)
        if reason := problem(logits):
            raise ValueError(reason)
        if name != WEIGHTS:  # the same network as the student's
            megabytes = (folder / name).stat().st_size / 2**20
            made.rows.append(compare(ROWS[name], megabytes, logits, labels, expected))
        made.files.append(name)

    def as_pytorch(logits: NDArray[np.float32]) -> str | None:
        return problem_of_float(logits, expected)

    if sources.teacher is not None:
        add_network(TEACHER, sources.teacher[0], answered("teacher's answers", sources.teacher[0], checked))
    add_network(STUDENT, run.classifier, expected)
    by_format = ((ONNX, "onnx"), (INT8, "onnx"), (PROGRAM, "torch_export"))
    graphs = [name for name, form in by_format if form in formats]
    program = None
    if graphs:
        with refusing(*graphs):
            program = traced(run.classifier, run.image_shape)
    if program is not None and ONNX in graphs:
        calibration = images_at(data, evenly(data.splits["train"].sort().values, CALIBRATION))
        with refusing(ONNX, INT8):
            write_onnx(program, folder / ONNX, said)
        if ONNX not in made.refused:
            with refusing(INT8):
                write_int8(folder / ONNX, folder / INT8, calibration, said)
        for name in (ONNX, INT8):
            if name in made.refused:
                continue
            with refusing(name):
                one, several = (open_onnx(folder / name, threads) for threads in (1, torch.get_num_threads()))
                check(name, several, as_pytorch if name == ONNX else int8_check(expected, labels, max_loss))
                works[ROWS[name]] = Timed(one.answer, several.answer, is_torch=False)
    if program is not None and PROGRAM in graphs:
        with refusing(PROGRAM):
            write_program(program, folder / PROGRAM, said)
            with quiet():
                opened = open_program(folder / PROGRAM, trust=True)
            check(PROGRAM, opened, as_pytorch)
            works[ROWS[PROGRAM]] = Timed(opened.answer, opened.answer, is_torch=True)
    if "safetensors" in formats:
        with refusing(WEIGHTS):
            write_weights(run, folder / WEIGHTS, said)
            (folder / CONFIG).write_text(config_of(run))
            check(WEIGHTS, open_weights(folder / WEIGHTS), as_pytorch)
            made.files.append(CONFIG)
        if WEIGHTS in made.refused:
            (folder / CONFIG).unlink(missing_ok=True)
    if not made.files:
        return made
    if sys.stdout.isatty():
        print(f"timing for {seconds:g} seconds", flush=True)
    time_rows(made.rows, works, checked, seconds)
    taught = None
    if sources.teacher is not None:
        taught = Taught(sources.teacher[1], made.rows[0].accuracy)
    elif run.record.tags.get("kdpipe.teacher_run"):
        taught = Taught(str(run.config.teacher.name), None)
    cores = torch.get_num_threads()
    text = card(run, data, taught, made.rows, made.files, license, len(positions), cores, sources.by_class)
    (folder / CARD).write_text(text)
    made.files.append(CARD)
    made.notes.insert(0, legend(made.rows, len(positions), cores))
    return made


def reason_of(error: Exception, folder: Path) -> str:
    """A line without the folder, which has another name, or none, when it is read."""
    text = " ".join(str(error).replace(f"{folder}{os.sep}", "").split())[:300]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def int8_check(
    expected: NDArray[np.float32], labels: NDArray[np.int64], max_loss: float
) -> Callable[[NDArray[np.float32]], str | None]:
    return lambda logits: problem_of_int8(logits, expected, labels, max_loss)


def images_at(data: ImageDataset, positions: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 [n, C, H, W] in memory."""
    images: NDArray[np.uint8] = data.images[positions].contiguous().numpy()
    return images


def answered(words: str, network: Classifier | Ensemble, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits of a large network, with a bar on a terminal."""
    answer = answers_of(network)
    parts = []
    with progress(words, len(images)) as bar:
        for first in range(0, len(images), BATCH):
            parts.append(answer(images[first : first + BATCH]))
            bar.advance(len(parts[-1]))
    return np.concatenate(parts)
