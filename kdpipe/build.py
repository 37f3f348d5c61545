"""From the config to objects: each `build_…` takes a part of it, and names the key where a value will not do."""

import json
import logging
import os
import re
import shlex
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import distributed, nn
from torch.optim.lr_scheduler import LRScheduler

from kdpipe import config as settings
from kdpipe.data import ImageDataset, split
from kdpipe.data.dataset import check_fractions
from kdpipe.data.unlabelled import with_unlabelled
from kdpipe.errors import one_line
from kdpipe.features import Observed
from kdpipe.hardware import Hardware, keep_freed_memory
from kdpipe.identity import canonical
from kdpipe.losses import Mutual
from kdpipe.losses.base import Combined, Distillation, roles_of
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.weights import check_class_names, load_imagenet, load_state, read_weights, weights_digest
from kdpipe.randomness import derive_seed
from kdpipe.store import CONFIG, run_and_file
from kdpipe.targets import check_config, check_yaml
from kdpipe.teacher import Peer, Teacher

log = logging.getLogger("kdpipe")


# Teachers that were built already and where their weights are from, by what the config says of them.
KnownTeachers = dict[str, tuple[Teacher | Peer | None, str]]
_own_gpu: list[FileLock] = []  # held until the process ends


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before any of it moves to a device.

    Attributes:
        teacher_source: the run or file that the teacher's weights are from, several runs with commas between them; ""
            where there is no teacher.
        tags: what a finished run with the same parts is found by.
    """

    data: ImageDataset
    teacher: Teacher | Peer | None
    teacher_source: str
    model: Classifier
    tags: dict[str, str]


def check_values(config: DictConfig) -> None:
    """Raise ValueError for any value that will not do and that can be told before data is read."""
    settings.check(config)
    loss = build_loss(config)
    augment = instantiate(config.augmentation)
    outputs = config.distillation.outputs
    if outputs == "cached" and augment is not None:
        raise ValueError(
            "distillation.outputs=cached: augmentation gives each epoch other views; auto, online, views are accepted"
        )
    if outputs in ("cached", "views") and settings.mixes(config):
        raise ValueError(
            f"distillation.outputs={outputs}: train.mixup and train.cutmix give each epoch other images; auto, online "
            "are accepted"
        )
    if outputs == "views" and augment is None:
        raise ValueError(
            "distillation.outputs=views: without augmentation there is but one view; auto, cached, online are accepted"
        )
    unlabelled = OmegaConf.select(config, f"dataset.{settings.UNLABELLED}")
    if unlabelled is not None and settings.mixes(config):
        raise ValueError(
            f"dataset.{settings.UNLABELLED}={unlabelled}: not with train.mixup or train.cutmix; null is accepted"
        )
    for part in (loss.first, loss.second) if isinstance(loss, Combined) else (loss,):
        for key in ("train.mixup", "train.cutmix", f"dataset.{settings.UNLABELLED}"):
            value = OmegaConf.select(config, key)
            if value is not None and getattr(part, "one_label", False):
                method = type(part).__name__
                raise ValueError(f"{key}={value}: {method} needs one label for each image; null is accepted")
    build_optimizer(config, nn.Linear(1, 1), loss, steps_per_epoch=1)
    settings.check_ensemble(config)
    if settings.is_ensemble(config.teacher) and settings.needs_teacher(config) and roles_of(loss):
        raise ValueError(
            f"model@teacher={config.teacher.name}: it answers with logits alone, and the loss asks for "
            f"{', '.join(roles_of(loss))}; one teacher is accepted"
        )
    dataset = config.dataset
    check_fractions(dataset.train_fraction, dataset.val_fraction, dataset.test_fraction, dataset.split_seed)


def build_parts(config: DictConfig, tracker: Any, known: KnownTeachers) -> Parts:
    """Data, teacher and model; teachers are taken from `known`, and added to it."""
    data = build_data(config.dataset)
    check_selection(config.train, data)
    key = ""
    if settings.teacher_learns(config):  # another one for each run
        known = {}
    elif settings.needs_teacher(config):
        key = json.dumps([plain(config.dataset), plain(config.teacher)])
    if key not in known:
        known[key] = build_teacher(config, data, tracker)
    teacher, teacher_source = known[key]
    if teacher and config.dataset.get(settings.UNLABELLED) is not None:
        data = build_unlabelled(config)
    model = build_model(config, data, tracker)
    if teacher:
        check_fit(config, model, teacher, data)
    tags = {
        "kdpipe.identity": settings.run_identity(config),
        "kdpipe.inputs": inputs_digest(data, teacher, model),
        "kdpipe.stage": settings.stage(config),
    }
    return Parts(data, teacher, teacher_source, model, tags)


def check_device(config: DictConfig) -> None:
    """Raise ValueError for a device that this machine does not have."""
    name, there = str(config.train.device), devices()
    if name not in ("auto", *there, "cuda" if "cuda:0" in there else "cpu"):
        raise ValueError(f"train.device={name}: one of auto, {', '.join(there)} is accepted on this machine")


def devices() -> list[str]:
    """The devices of this machine, the fastest first."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def use_hardware(config: DictConfig) -> Hardware:
    """The device and the precision asked for; under `torchrun` shared with its other processes."""
    check_device(config)
    train = config.train
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    precision = str(train.precision).replace("auto", "float32")
    if distributed.is_torchelastic_launched():
        return _shared_hardware(train, precision)
    name = str(train.device)
    gpus = torch.cuda.device_count()
    if name == "auto" and config.sweep.job and gpus > 1:
        name = devices()[own_gpu(gpus, Path(config.output_dir) / "runs")]
    device = torch.device({"auto": devices()[0], "cuda": "cuda:0"}.get(name, name))
    _set_up(device)
    return Hardware(device, precision)


def _shared_hardware(train: DictConfig, precision: str) -> Hardware:
    has_gpu = torch.cuda.device_count() > 0 and train.device != "cpu"
    if train.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"train.device={train.device}: torchrun gives each process its own; auto, cpu, cuda are accepted"
        )
    processes = int(os.environ["WORLD_SIZE"])
    if train.batch_size < processes:
        accepted = f"{processes} processes share it, from {processes} is accepted"
        raise ValueError(f"train.batch_size={train.batch_size}: {accepted}")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if has_gpu else "cpu")
    _set_up(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if has_gpu else "gloo")
    return Hardware(device, precision, distributed.get_rank(), processes)


def _set_up(device: torch.device) -> None:
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches but the last have one shape


def own_gpu(number_of_gpus: int, folder: Path) -> int:
    """The number of a GPU that no other process of the sweep has, while there is one; it is this process's own until
    it ends."""
    if not _own_gpu:
        for number in range(number_of_gpus):
            lock = FileLock(folder / f".{socket.gethostname()}-cuda-{number}")
            with suppress(Timeout):
                lock.acquire(timeout=0)
                _own_gpu.append(lock)
                return number
        return os.getpid() % number_of_gpus
    return int(Path(_own_gpu[0].lock_file).name.rpartition("-")[2])


def build_loss(config: DictConfig) -> nn.Module:
    """The loss, with the other method's term that is added to it, if any."""
    loss: nn.Module = instantiate(config.loss)
    if "also" not in config:
        return loss
    if getattr(loss, "teacher_learns", False):
        alone = f"{config.loss._target_} takes no second method"
        raise ValueError(f"also={config.also._target_}: {alone}; another loss is accepted")
    try:
        also = instantiate(config.also)
    except InstantiationException as error:  # losses speak of themselves as the loss
        raise ValueError(re.sub(r"^loss\.", "also.", one_line(error))) from error
    if not isinstance(also, Distillation) or also.teacher_learns:
        raise ValueError(f"also={config.also._target_}: a method of distillation is accepted")
    if also.name == getattr(loss, "name", None):
        both = f"its term is called {also.name}, as that of {config.loss._target_}"
        raise ValueError(f"also={config.also._target_}: {both}; another method is accepted")
    return Combined(loss, also)


def check_fit(config: DictConfig, model: Classifier, teacher: Teacher | Peer, data: ImageDataset) -> None:
    """Raise ValueError where the loss cannot compare these two networks: told before anything trains."""
    loss = build_loss(config)
    student = Observed(model, model.network, roles_of(loss))
    if isinstance(teacher, Teacher):
        teacher.ask_for(roles_of(loss))
    fit_loss(config, loss, student, teacher, data, torch.device("cpu"))
    student.remove()


def fit_loss(
    config: DictConfig,
    loss: nn.Module,
    student: Observed,
    teacher: Teacher | Peer,
    data: ImageDataset,
    device: torch.device,
) -> None:
    """Let the loss make its projections for these networks, from random numbers of its own.

    Raises:
        ValueError: the loss cannot compare them, or what it compares stays as it is.
    """
    if not isinstance(loss, Distillation | Combined):
        return
    positions = data.splits["train"].sort().values
    images = data.images[positions[:2]].to(device)
    student.model.eval()
    outputs, targets = student(images), teacher.answer(images)
    if loss.roles and not any(tensor.requires_grad for tensor in outputs.tensors[1:]):
        raise ValueError(
            f"model.freeze={config.model.freeze}: the loss compares {', '.join(loss.roles)}, which stay as they are; "
            "none is accepted"
        )
    if isinstance(loss, Mutual):
        loss.peer = teacher.classifier
    torch.manual_seed(derive_seed(config.seed, "loss"))
    loss.fit_to(outputs, targets, positions, data.labels[positions])
    loss.to(device)


def build_optimizer(
    config: DictConfig, model: nn.Module, loss: nn.Module, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Optimizer and schedule for what can be trained in the model and the loss."""
    parameters = [parameter for part in (model, loss) for parameter in part.parameters() if parameter.requires_grad]
    try:
        optimizer = instantiate(config.optimizer)(parameters)
    except ValueError as error:
        raise ValueError(f"optimizer={config.optimizer._target_}: {error}") from error
    build = instantiate(config.scheduler)
    return optimizer, build(optimizer, epochs=config.train.epochs, steps_per_epoch=steps_per_epoch)


def build_data(dataset: DictConfig) -> ImageDataset:
    """The data set that the config names, split; the runs of a sweep in one process share it."""
    return _read_data(json.dumps(plain(dataset)))


@lru_cache(maxsize=1)
def _read_data(described: str) -> ImageDataset:
    dataset = json.loads(described)
    log.info("data set %s", dataset["name"])
    arguments = {key: value for key, value in dataset.items() if key not in (*settings.SPLITTING, settings.UNLABELLED)}
    if "root" in arguments:
        if arguments["root"] in (None, ""):
            raise ValueError(f"dataset.root={arguments['root'] or ''}: a folder is accepted")
        arguments["root"] = str(Path(str(arguments["root"])).expanduser())
    data = split(instantiate(arguments), **{key: dataset[key] for key in settings.SPLITTING})
    sizes = ", ".join(f"{len(positions):,} {name}" for name, positions in data.splits.items())
    _, channels, height, width = data.images.shape
    classes = ", ".join(data.class_names[:10]) + (", …" if data.num_classes > 10 else "")
    log.info("%d classes (%s); images of %d×%d×%d: %s", data.num_classes, classes, width, height, channels, sizes)
    return data


def build_unlabelled(config: DictConfig) -> ImageDataset:
    """The data set with the images that have no label; the runs of a sweep in one process share it."""
    cache = Path(config.output_dir) / "cache" / "images"
    return _read_unlabelled(json.dumps(plain(config.dataset)), config.dataset.get("cache_dir", str(cache)))


@lru_cache(maxsize=1)
def _read_unlabelled(described: str, cache: str) -> ImageDataset:
    dataset, data = json.loads(described), _read_data(described)
    data = with_unlabelled(data, str(dataset[settings.UNLABELLED]), dataset.get("on_bad_image", "stop"), cache)
    log.info("images without a label: %s", f"{int((data.labels < 0).sum()):,}")
    return data


def forget_data() -> None:
    """Read the images anew: a new command may find others."""
    _read_data.cache_clear()
    _read_unlabelled.cache_clear()


def check_selection(train: DictConfig, data: ImageDataset) -> None:
    """Raise ValueError where weights are to be chosen and there is nothing to choose them on."""
    if train.select == "best" and "validation" not in data.splits:
        raise ValueError("train.select=best: chosen on validation images, so dataset.val_fraction above 0 is accepted")


def build_network(key: str, model: DictConfig, data: ImageDataset, freeze: str) -> Classifier:
    """The network that stands under `key`, without weights."""
    architecture = {name: value for name, value in model.items() if name not in settings.NOT_ARCHITECTURE}
    try:
        network = instantiate(architecture, num_classes=data.num_classes)
    except InstantiationException as error:  # networks speak of themselves as the model
        raise ValueError(re.sub(r"^model\.", f"{key}.", one_line(error))) from error
    # A network of a library knows what its pretrained weights expect.
    own = getattr(network, "preprocessing", {})
    preprocessing: dict[str, Any] = {
        name: own.get(name) if model[name] is None else model[name] for name in settings.PREPROCESSING
    }
    classifier = Classifier(network, **preprocessing, freeze=freeze, key=key)
    check_output(key, model, classifier, data)
    return classifier


@torch.no_grad()
def check_output(key: str, model: DictConfig, classifier: Classifier, data: ImageDataset) -> None:
    """Raise ValueError where a network gets from images to no logits: two images tell before training."""
    images = data.images[:2]
    try:
        logits = classifier.eval()(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{key}.image_size={model.image_size}: {model.name} cannot take images of this size ({reason})"
        ) from error
    if logits.shape != (len(images), data.num_classes):
        raise ValueError(f"{key}.name={model.name}: logits [N, {data.num_classes}] are expected, not {[*logits.shape]}")


def build_model(config: DictConfig, data: ImageDataset, tracker: Any) -> Classifier:
    """What is trained: seeded first weights, or those that the config names."""
    torch.manual_seed(derive_seed(config.seed, "student"))
    model = build_network("model", config.model, data, config.model.freeze)
    load_weights("model", config.model, model, data, tracker)
    return model


def build_teacher(config: DictConfig, data: ImageDataset, tracker: Any) -> tuple[Teacher | Peer | None, str]:
    """The frozen teacher, and where its weights are from; None where the loss needs none.

    Raises:
        ValueError: no teacher found, or weights that do not fit.
    """
    if not settings.needs_teacher(config):
        return None, ""
    if settings.teacher_learns(config):
        torch.manual_seed(derive_seed(config.seed, "peer"))
        classifier = build_network("teacher", config.teacher, data, freeze="none")
        if config.teacher.weights != "auto":
            load_weights("teacher", config.teacher, classifier, data, tracker)
        return Peer(classifier), ""
    if settings.is_ensemble(config.teacher):
        return build_ensemble(config.teacher, data, tracker)
    classifier = build_network("teacher", config.teacher, data, freeze="none")
    if config.teacher.weights == "auto":
        network = {
            f"model.{key}": value
            for key, value in plain(config.teacher).items()
            if key not in ("weights", "freeze", "stages")
        }
        # A teacher with another test split would have been trained on images that the student is tested on.
        images = {f"dataset.{key}": config.dataset[key] for key in ("name", "test_fraction", "split_seed")}
        if config.sweep.job and config.sweep.job.teacher:  # all runs of a sweep have the one that was there at first
            found = tracker.get_run(config.sweep.job.teacher)
        else:
            found = tracker.find_teacher(canonical(network | images), data.fingerprint)
        if found is None:
            raise ValueError(
                f"teacher.weights=auto: no finished teacher run of {config.teacher.name} on these images and split "
                f"in {tracker.uri}; this trains one: {teacher_command(config)}"
            )
        source = found.id
        load_trained("teacher.weights", f"runs:/{source}", config.teacher.name, classifier, data, tracker)
        log.info(
            "teacher: run %s (%s), test accuracy %.1f %%",
            found.id,
            found.name,
            100 * found.metrics["test/accuracy"],
        )
    else:
        weights = str(config.teacher.weights)
        source = run_and_file(weights)[0] if weights.startswith("runs:/") else weights
        load_weights("teacher", config.teacher, classifier, data, tracker)
        log.info("teacher: %s with the weights of %s", config.teacher.name, weights)
    return Teacher(classifier), source


def build_ensemble(teacher: DictConfig, data: ImageDataset, tracker: Any) -> tuple[Teacher, str]:
    """Several teachers as one, and the runs that they are from.

    Raises:
        ValueError: a run that is not there or not finished, or whose network or classes do not fit.
    """
    members = [build_member(address, data, tracker) for address in teacher.members]
    ensemble = Ensemble(members, teacher.shares or [1] * len(members), teacher.temperature)
    shares = ", ".join(f"{share:.3g}" for share in ensemble.shares.tolist())
    log.info("teacher: the mean of their soft targets at T %g, shares %s", teacher.temperature, shares)
    return Teacher(ensemble), ",".join(dict.fromkeys(run_and_file(address)[0] for address in teacher.members))


def build_member(address: str, data: ImageDataset, tracker: Any) -> Classifier:
    """The network of a run, as the run's own config describes it, with the run's weights."""
    key = "teacher.members"
    file = tracker.download(run_and_file(address)[0], CONFIG, key)
    try:
        model = read_model(file)
        classifier = build_network("model", model, data, freeze="none")
    except ValueError as error:  # which speaks of the model of that config
        raise ValueError(f"{key}={address}: {error}") from error
    load_trained(key, address, model.name, classifier, data, tracker)
    log.info("teacher: %s with the weights of %s", model.name, address)
    return classifier


def read_model(file: Path) -> DictConfig:
    """What a run's composed config says of its network.

    Raises:
        ValueError: it says no such thing, or names what is not accepted.
    """
    return read_config(file, ["model"]).model


def read_config(file: Path, sections: Sequence[str]) -> DictConfig:
    """These sections of a run's composed config.

    Raises:
        ValueError: it lacks them, or names what is not accepted: it may be somebody else's.
    """
    check_yaml(file)
    composed = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(composed, dict)
    found = {name: composed[name] for name in sections if isinstance(composed.get(name), dict)}
    needed = ("_target_", "name", *settings.PREPROCESSING)
    if len(found) < len(sections) or not all(key in found["model"] for key in needed) or "${" in str(found):
        raise ValueError(f"{file}: the composed config of a run is accepted, with its model's {', '.join(needed)}")
    config = OmegaConf.create(found)
    check_config(config)
    return config


def teacher_command(config: DictConfig) -> str:
    """The command that trains the teacher that the present command asks for."""
    overrides = []
    experiment, choices = "teacher", HydraConfig.get().runtime.choices
    if str(choices.get("experiment")).startswith("benchmark/"):  # whose pairs name the teacher themselves
        experiment = "benchmark/teacher"
        overrides.append(f"model={choices['model@teacher']}")
        if "shortcut" in config.teacher:
            overrides.append(f"model.shortcut={config.teacher.shortcut}")
    for override in HydraConfig.get().overrides.task:
        key, _, value = override.partition("=")
        if key == "model@teacher":
            overrides.append(f"model={value}")
        elif key.startswith("teacher.") and key != "teacher.weights":
            overrides.append(f"model.{key.removeprefix('teacher.')}={value}")
        elif key == "dataset" or key.startswith(("dataset.", "tracking.", "output_dir")):
            overrides.append(override)
    sources = HydraConfig.get().runtime.config_sources
    folders = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    return shlex.join(["python", "-m", "kdpipe", *folders, f"experiment={experiment}", *overrides])


def load_weights(key: str, model: DictConfig, classifier: Classifier, data: ImageDataset, tracker: Any) -> None:
    """Put the weights that the config names into a network: none, ImageNet's, a run's or a file's."""
    if model.weights == "imagenet":
        load_imagenet(f"{key}.weights", classifier.network, model.name)
    elif model.weights is not None:
        load_trained(f"{key}.weights", str(model.weights), model.name, classifier, data, tracker)


def load_trained(key: str, weights: str, name: str, classifier: Classifier, data: ImageDataset, tracker: Any) -> None:
    """Put the weights of a run or a file into a network."""
    of_run = weights.startswith("runs:/")
    path = tracker.download(*run_and_file(weights), key) if of_run else Path(weights).expanduser()
    state, class_names = read_weights(key, path)
    check_class_names(key, weights, class_names, data.class_names)
    load_state(key, weights, classifier.network, state, name, data.num_classes)


def inputs_digest(data: ImageDataset, teacher: Teacher | Peer | None, model: Classifier) -> str:
    """What the config only points to: the images, the teacher's weights, the first weights."""
    networks = [model.network] + ([teacher.classifier.network] if teacher else [])
    images = [data.fingerprint, data.unlabelled] if data.unlabelled else [data.fingerprint]
    return "-".join([*images, *(weights_digest(network) for network in networks)])


def plain(part: DictConfig) -> dict[str, Any]:
    """A part of the config as plain values."""
    return {str(key): value for key, value in OmegaConf.to_container(part, resolve=True).items()}  # type: ignore[union-attr]
