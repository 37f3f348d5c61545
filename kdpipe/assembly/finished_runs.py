"""Finished runs, opened again: their networks with their weights, their teachers, the images that they were given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdpipe.assembly.datasets import build_data
from kdpipe.assembly.networks import build_network, load_trained
from kdpipe.assembly.teachers import build_ensemble, build_members, network_of_run
from kdpipe.data import ImageDataset
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.weights import load_state, read_weights, weights_digest
from kdpipe.runs.names import CONFIG, IMAGE_SHAPE
from kdpipe.settings.addresses import WEIGHTS, run_and_file, weights_address
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.saved import read_run_settings
from kdpipe.settings.schema import AnswersSettings, DatasetSettings, EnsembleSettings, Settings, validated
from kdpipe.settings.values import Resize

if TYPE_CHECKING:
    from kdpipe.tracking import RunRecord, RunStore

COUNTED = ("model/params", "model/size_mb", "model/flops", "model/activation_mb")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run whose network can be used.

    Attributes:
        address: of its weights, runs:/<run id> or runs:/<run id>/epoch_<number>.
        classifier: with its weights, in evaluation mode, on the CPU.
        image_shape: (C, H, W) of the raw images that it was given; where photos kept their shape, of the squares that
            stand for them.
    """

    address: str
    record: "RunRecord"
    settings: Settings
    classifier: Classifier
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    @property
    def name(self) -> str:
        return self.settings.model.name

    @property
    def resize(self) -> Resize:
        """How photos become images of that shape."""
        stored = self.settings.dataset.resize
        return self.classifier.resize if stored == "keep" else stored

    @property
    def teacher_weights(self) -> list[str]:
        """The runs or the file that its teacher's weights, or its answers, come from; several for an ensemble."""
        teacher, source = self.settings.teacher, self.record.tags.get("kdpipe.teacher_run", "")
        if not source:
            return []
        if isinstance(teacher, EnsembleSettings):
            return teacher.members
        if isinstance(teacher, AnswersSettings):
            return [teacher.file]
        return [f"runs:/{source}" if teacher.weights == "auto" else str(teacher.weights)]

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of these weights: of those of an earlier epoch, what any weights of the network cost."""
        if run_and_file(self.address)[1] == WEIGHTS:
            return self.record.metrics
        return {name: value for name, value in self.record.metrics.items() if name in COUNTED}


def open_run(address: str, store: "RunStore") -> FinishedRun:
    """A run of the store by its id, with or without runs:/ in front.

    Raises:
        ValueError: no such run, or it is not finished, or it has no weights.
    """
    address = address if address.startswith("runs:/") else f"runs:/{address}"
    run_id, weights = run_and_file(address)
    record, expected = store.get_run(run_id), "the id of a finished run"
    if record is None:
        raise ValueError(f"{address}: no such run in {store.name}; expected {expected}")
    if record.tags.get("kdpipe.stage") == "sweep":
        raise ValueError(f"{address}: this is a sweep; expected the id of one of its runs")
    if record.status != "FINISHED":
        raise ValueError(f"{address}: this run is {record.status}; expected {expected}")
    with store.downloaded(run_id, CONFIG, "run") as file:
        settings = read_run_settings(file)
    with store.downloaded(run_id, weights, "run") as file:
        state, class_names = read_weights("run", file)
    if not class_names:
        raise ValueError(f"{address}: {weights} has no class names; expected a run of kdpipe")
    shape = _image_shape(record, settings)
    classifier = build_network("model", settings.model, blank_images(class_names, shape), freeze="none")
    load_state("run", address, classifier.network, state, settings.model.name, len(class_names))
    used = weights_address(run_id, weights)
    return FinishedRun(used, record, settings, classifier.eval(), tuple(class_names), shape)


def _image_shape(record: "RunRecord", settings: Settings) -> tuple[int, int, int]:
    """(C, H, W) of the images that a run was given; of runs before 0.4.0, which did not log it, its network's."""
    if logged := record.tags.get(IMAGE_SHAPE):
        channels, height, width = map(int, logged.split("x"))
    else:
        size = settings.model.image_size
        channels, height, width = len(settings.model.mean or "RGB"), size or 224, size or 224
    return channels, height, width


def blank_images(class_names: Sequence[str], shape: tuple[int, int, int]) -> ImageDataset:
    """Two black images, for building networks that take images of this shape."""
    labels = torch.zeros(2, dtype=torch.int64)
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    return ImageDataset("blank", images, labels, tuple(class_names), {}, "")


def open_teacher(run: FinishedRun, store: "RunStore") -> tuple[Classifier | Ensemble, str] | None:
    """The network that taught a run, in evaluation mode, and its name; None where none did, or only a file did.

    Raises:
        ConfigError: its weights are gone, or have changed.
    """
    if not run.teacher_weights or isinstance(run.settings.teacher, AnswersSettings):
        return None
    teacher, images = run.settings.teacher, blank_images(run.class_names, run.image_shape)
    if isinstance(teacher, EnsembleSettings):
        network: Classifier | Ensemble = build_ensemble(teacher, build_members(teacher, images, store))
    else:
        if teacher.weights == "auto":
            teacher = network_of_run(teacher, run.record.tags["kdpipe.teacher_run"], store)
        network = build_network("teacher", teacher, images, freeze="none")
        load_trained("teacher.weights", run.teacher_weights[0], teacher.name, network, images, store)
    known = run.record.tags.get("kdpipe.inputs", "").rpartition("-")[2]
    if known and known != weights_digest(network.network):
        raise ConfigError(
            "teacher.weights", teacher.weights, problem="these are no longer the weights that taught the run"
        )
    return network.eval(), teacher.name


def teacher_if_there(run: FinishedRun, store: "RunStore") -> tuple[tuple[Classifier | Ensemble, str] | None, list[str]]:
    """What `open_teacher` returns, and a note where it fails: a student is of use without its teacher."""
    try:
        return open_teacher(run, store), []
    except ValueError as error:
        return None, [f"without its teacher, which cannot be opened: {error}"]


def open_data(run: FinishedRun, root: str | None = None) -> ImageDataset:
    """The images that a run was given, with the same splits.

    Args:
        root: where they are now; None for where they were.

    Raises:
        ValueError: they are missing, or they are others.
    """
    dataset = run.settings.dataset
    if root is not None:
        if "root" not in dataset.arguments:
            raise ConfigError("--root", root, problem=f"{dataset.name} has no folder of its own; leave it out")
        dataset = validated(DatasetSettings, {**dataset.plain, "root": root})
    try:
        data = build_data(dataset)
    except ValueError as error:
        raise ValueError(f"{error}; --root FOLDER says where the run's images are now") from error
    known = run.record.tags.get("kdpipe.data", data.fingerprint)
    if data.fingerprint != known:
        problem = f"these are not the images of run {run.record.id}, or another version ({len(data.labels):,} now)"
        raise ConfigError("dataset.root", dataset.root, problem=f"{problem}; --root FOLDER says where its own are")
    return data
