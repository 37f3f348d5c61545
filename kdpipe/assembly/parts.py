"""All that a run is made of, checked before it trains."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from kdpipe.assembly.datasets import build_data, build_unlabelled, check_selection, plain
from kdpipe.assembly.networks import build_model
from kdpipe.assembly.teachers import KnownTeachers, build_teacher
from kdpipe.data import ImageDataset
from kdpipe.data.dataset import check_fractions
from kdpipe.losses import CombinedLoss, Loss
from kdpipe.models import Classifier
from kdpipe.models.weights import weights_digest
from kdpipe.settings import config as settings
from kdpipe.settings.errors import ConfigError
from kdpipe.system.hardware import Hardware
from kdpipe.system.randomness import derive_seed
from kdpipe.training.observed import Observed
from kdpipe.training.teacher import Peer, Teacher


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
    for part in loss.components.values():
        for key in ("train.mixup", "train.cutmix", f"dataset.{settings.UNLABELLED}"):
            value = OmegaConf.select(config, key)
            if value is not None and part.one_label:
                method = type(part).__name__
                raise ValueError(f"{key}={value}: {method} needs one label for each image; null is accepted")
    build_optimizer(config, nn.Linear(1, 1), loss, steps_per_epoch=1)
    settings.check_ensemble(config)
    if settings.is_ensemble(config.teacher) and settings.needs_teacher(config) and loss.roles:
        raise ValueError(
            f"model@teacher={config.teacher.name}: it answers with logits alone, and the loss asks for "
            f"{', '.join(loss.roles)}; one teacher is accepted"
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


def build_loss(config: DictConfig) -> Loss:
    """The loss, with the other method's term that is added to it, if any."""
    loss = _build_loss(config, "loss")
    if "also" not in config:
        return loss
    if loss.teacher_learns:
        alone = f"{config.loss._target_} takes no second method"
        raise ValueError(f"also={config.also._target_}: {alone}; another loss is accepted")
    also = _build_loss(config, "also")
    if not also.name or also.teacher_learns:
        raise ValueError(f"also={config.also._target_}: a method of distillation is accepted")
    if also.name == loss.name:
        both = f"its term is called {also.name}, as that of {config.loss._target_}"
        raise ValueError(f"also={config.also._target_}: {both}; another method is accepted")
    return CombinedLoss(loss, also)


def _build_loss(config: DictConfig, key: str) -> Loss:
    try:
        loss = instantiate(config[key])
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__.under(key) from error
        raise
    if not isinstance(loss, Loss):
        raise ConfigError(f"{key}._target_", config[key]._target_, "a subclass of kdpipe.losses.Loss")
    return loss


def check_fit(config: DictConfig, model: Classifier, teacher: Teacher | Peer, data: ImageDataset) -> None:
    """Raise ValueError where the loss cannot compare these two networks: told before anything trains."""
    loss = build_loss(config)
    student = Observed(model, model.network, loss.roles)
    if isinstance(teacher, Teacher):
        teacher.ask_for(loss.roles)
    fit_loss(config, loss, student, teacher, data, torch.device("cpu"))
    student.remove()


def fit_loss(
    config: DictConfig,
    loss: Loss,
    student: Observed,
    teacher: Teacher | Peer,
    data: ImageDataset,
    device: torch.device,
) -> None:
    """Let the loss make its projections for these networks, from random numbers of its own.

    Raises:
        ValueError: the loss cannot compare them, or what it compares stays as it is.
    """
    positions = data.splits["train"].sort().values
    images = data.images[positions[:2]].to(device)
    student.model.eval()
    outputs, targets = student(images), teacher.answer(images)
    if loss.roles and not any(tensor.requires_grad for tensor in outputs.tensors[1:]):
        raise ValueError(
            f"model.freeze={config.model.freeze}: the loss compares {', '.join(loss.roles)}, which stay as they are; "
            "none is accepted"
        )
    loss.adopt(teacher.classifier)
    torch.manual_seed(derive_seed(config.seed, "loss"))
    for key, part in loss.components.items():
        try:
            part.fit_to(outputs, targets, positions, data.labels[positions])
        except ConfigError as error:
            raise error.under(key) from error
    loss.to(device)


def check_sharing(loss: Loss, has_unlabelled: bool, hardware: Hardware) -> None:
    """Raise ValueError for a loss that changes when each process sees only its part of a batch."""
    if hardware.processes == 1:
        return
    for part in loss.components.values():
        if part.compares_images:
            name = f"torchrun: {type(part).__name__}"
            raise ValueError(f"{name} compares the images of a batch, which processes share; expected one process")
    if any(parameter.requires_grad for parameter in loss.parameters()):
        own = f"{type(loss).__name__} has weights of its own, which processes do not share yet"
        raise ValueError(f"torchrun: {own}; expected one process")
    if has_unlabelled:
        raise ValueError("torchrun: processes would weight labelled images differently; expected one process")


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
    try:
        return optimizer, build(optimizer, epochs=config.train.epochs, steps_per_epoch=steps_per_epoch)
    except ConfigError as error:
        raise error.under("scheduler") from error


def inputs_digest(data: ImageDataset, teacher: Teacher | Peer | None, model: Classifier) -> str:
    """What the config only points to: the images, the teacher's weights, the first weights."""
    networks = [model.network] + ([teacher.classifier.network] if teacher else [])
    images = [data.fingerprint, data.unlabelled] if data.unlabelled else [data.fingerprint]
    return "-".join([*images, *(weights_digest(network) for network in networks)])
