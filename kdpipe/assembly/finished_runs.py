"""Finished runs, opened again: their networks with their weights, their teachers, the images that they were given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from kdpipe.assembly import build_data, build_ensemble, build_network, load_trained, read_config
from kdpipe.data import ImageDataset
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.weights import load_state, read_weights, weights_digest
from kdpipe.runs.names import CONFIG, IMAGE_SHAPE, WEIGHTS, run_and_file, weights_address
from kdpipe.settings.components import guard_hydra
from kdpipe.settings.config import is_ensemble
from kdpipe.settings.hydra_errors import one_line
from kdpipe.tracking import RunRecord, RunStore

guard_hydra()
COUNTED = ("model/params", "model/size_mb", "model/flops", "model/activation_mb")
SECTIONS = ("model", "teacher", "dataset", "loss", "optimizer", "scheduler", "train")  # of a run's composed config
OPTIONAL = ("also", "augmentation", "distillation")  # where it has them, as runs of older versions may not


@dataclass(frozen=True)
class FinishedRun:
    """A finished run whose network can be used.

    Attributes:
        address: of its weights, runs:/<run id> or runs:/<run id>/epoch_<number>.
        config: as it was composed, in `SECTIONS` and `OPTIONAL`.
        classifier: with its weights, in evaluation mode, on the CPU.
        image_shape: (C, H, W) of the raw images that it was given.
    """

    address: str
    record: RunRecord
    config: DictConfig
    classifier: Classifier
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    @property
    def name(self) -> str:
        return str(self.config.model.name)

    @property
    def metrics(self) -> dict[str, float]:
        """What the run knows of these weights: of those of an earlier epoch what any weights of the network cost."""
        if run_and_file(self.address)[1] == WEIGHTS:
            return self.record.metrics
        return {name: value for name, value in self.record.metrics.items() if name in COUNTED}


def open_run(address: str, store: RunStore) -> FinishedRun:
    """A run of the store by its id, with or without runs:/ before it.

    Raises:
        ValueError: there is no such run, it is not finished, or it has no weights.
    """
    address = address if address.startswith("runs:/") else f"runs:/{address}"
    run_id, weights = run_and_file(address)
    record = store.get_run(run_id)
    if record is None:
        raise ValueError(f"{address}: there is no such run in {store.name}; the id of a finished run is accepted")
    if record.tags.get("kdpipe.stage") == "sweep":
        raise ValueError(f"{address}: this is a sweep; the id of one of its runs is accepted")
    if record.status != "FINISHED":
        raise ValueError(f"{address}: this run is {record.status}; the id of a finished run is accepted")
    with store.downloaded(run_id, CONFIG, "run") as file:
        config = read_config(file, SECTIONS, OPTIONAL)
    with store.downloaded(run_id, weights, "run") as file:
        state, class_names = read_weights("run", file)
    if not class_names:
        raise ValueError(f"{address}: {weights} does not say which classes it knows; a run of kdpipe is accepted")
    shape = image_shape_of(record, config)
    images = blank(class_names, shape)
    classifier = build_network("model", config.model, images, freeze="none")
    load_state("run", address, classifier.network, state, config.model.name, len(class_names))
    used = weights_address(run_id, weights)
    return FinishedRun(used, record, config, classifier.eval(), tuple(class_names), shape)


def image_shape_of(record: RunRecord, config: DictConfig) -> tuple[int, int, int]:
    """(C, H, W) of the images that a run was given; runs before 0.4.0 do not tell, and then it is its network's."""
    channels, height, width = (len(config.model.mean or "RGB"), config.model.image_size, config.model.image_size)
    if told := record.tags.get(IMAGE_SHAPE):
        channels, height, width = map(int, told.split("x"))
    return channels, height or 224, width or 224


def blank(class_names: Sequence[str], shape: tuple[int, int, int]) -> ImageDataset:
    """Two black images, for what builds networks for images of this shape."""
    labels = torch.zeros(2, dtype=torch.int64)
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    return ImageDataset("blank", images, labels, tuple(class_names), {}, "")


def open_teacher(run: FinishedRun, store: RunStore) -> tuple[Classifier | Ensemble, str] | None:
    """The network that taught a run, in evaluation mode, and its name; None where none did.

    Raises:
        ValueError: its weights are not there any more, or are others.
    """
    source = run.record.tags.get("kdpipe.teacher_run", "")
    if not source:
        return None
    teacher, images = run.config.teacher, blank(run.class_names, run.image_shape)
    if is_ensemble(teacher):
        network: Classifier | Ensemble = build_ensemble(teacher, images, store)[0].classifier
    else:
        weights = f"runs:/{source}" if teacher.weights == "auto" else str(teacher.weights)
        network = build_network("teacher", teacher, images, freeze="none")
        load_trained("teacher.weights", weights, teacher.name, network, images, store)
    known = run.record.tags.get("kdpipe.inputs", "").rpartition("-")[2]
    if known and known != weights_digest(network.network):
        raise ValueError(f"teacher.weights={teacher.weights}: these are no more the weights that taught the run")
    return network.eval(), str(teacher.name)


def teacher_if_there(run: FinishedRun, store: RunStore) -> tuple[tuple[Classifier | Ensemble, str] | None, list[str]]:
    """What `open_teacher` gives, and why not where it cannot: to a student alone much can be done."""
    try:
        return open_teacher(run, store), []
    except ValueError as error:
        return None, [f"without its teacher, which cannot be opened: {error}"]


def open_data(run: FinishedRun, root: str | None = None) -> ImageDataset:
    """The images that a run was given, split as they were.

    Args:
        root: where they are now; None for where they were.

    Raises:
        ValueError: they are not there, or they are others.
    """
    dataset = run.config.dataset.copy()
    if root is not None:
        if "root" not in dataset:
            raise ValueError(f"--root {root}: {dataset.name} has no folder of its own; leave it out")
        dataset.root = root
    try:
        data = build_data(dataset)
    except (InstantiationException, ValueError) as error:
        raise ValueError(f"{one_line(error)}; --root FOLDER says where the run's images are now") from error
    known = run.record.tags.get("kdpipe.data", data.fingerprint)
    if data.fingerprint != known:
        raise ValueError(
            f"dataset.root={dataset.get('root', dataset.name)}: these are other images than those of run "
            f"{run.record.id}, or another version ({len(data.labels):,} now); --root FOLDER says where its own are"
        )
    return data
