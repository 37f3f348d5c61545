"""Everything ready for the first step: on the device, the teacher's answers computed where that is possible."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdpipe.assembly.epoch_views import build_mixing, build_views
from kdpipe.assembly.objectives import build_loss, build_optimizer, check_sharing, class_weights, fit_loss
from kdpipe.assembly.parts import Parts
from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import Views
from kdpipe.losses import Loss
from kdpipe.models import Classifier
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Settings
from kdpipe.system.hardware import Hardware
from kdpipe.training.loop import Recipe, batches
from kdpipe.training.observed import Observed
from kdpipe.training.precomputed import OutputRequest, TooLargeError, precomputed_features, precomputed_outputs
from kdpipe.training.state import Training
from kdpipe.training.teacher import FrozenTeacher, Teacher
from kdpipe.training.teacher_check import check_recorded, check_teacher

log = logging.getLogger("kdpipe")


@dataclass(frozen=True)
class Prepared:
    """A training that can begin, or continue.

    Attributes:
        learner: the part of the network that is trained on `data`.
        data: the images, or the features that a frozen backbone makes of them.
    """

    training: Training
    data: ImageDataset
    recipe: Recipe
    learner: nn.Module


def prepare(settings: Settings, parts: Parts, hardware: Hardware, start: dict[str, Any] | None) -> Prepared:
    """From parts to a training.

    Args:
        start: the state to continue from; None for a new training.

    Raises:
        ConfigError: what was asked for is not possible with this loss, teacher or hardware.
    """
    train, device = settings.train, hardware.device
    loss = build_loss(settings)
    loss.components["loss"].class_weights = class_weights(settings, parts.data)
    loss = loss.to(device)
    model = parts.model.to(device)
    teacher = parts.teacher.to(device) if parts.teacher else None
    student = Observed(model, model.network, loss.roles if teacher else ())
    if teacher:
        teacher.observe(loss.roles)
        fit_loss(settings, loss, student, teacher, parts.data, device)
    check_sharing(loss, parts.data.unlabelled != "", hardware)
    views = build_views(settings, parts.data)
    if teacher and not teacher.learns and train.epochs > 0:
        _check_and_ask(settings, teacher, parts.data, views, hardware)
    # A head on a frozen backbone trains on the backbone's features, as if they were the images.
    features = None if views else _build_features(settings, model, loss, teacher, parts.data, hardware)
    learner, data = (model.head, features) if features else (model, parts.data)
    data = data.moved_to(device)
    if teacher:
        teacher.stay_near(device)
    steps_per_epoch = -(-len(batches(data.splits["train"], train.batch_size, hardware.processes)) // train.accumulate)
    optimizer, scheduler = build_optimizer(settings, learner, loss, steps_per_epoch)
    if train.compile not in ("auto", False):
        learner.compile(mode="default" if train.compile is True else train.compile)

    changing = model.head if model.frozen_backbone else model  # with features or without
    student.model = hardware.distribute(learner)
    training = Training(student, loss, optimizer, scheduler, hardware, changing, train.ema)
    if start := hardware.broadcast(start):
        training.restore(start)
        if training.epoch <= train.epochs:
            log.info("continues at epoch %d of %d, step %d", training.epoch, train.epochs, training.steps + 1)
        else:
            log.info("continues after its last epoch")
    recipe = Recipe(
        epochs=train.epochs,
        batch_size=train.batch_size,
        seed=settings.seed,
        teacher=teacher,
        views=views,
        mixing=build_mixing(settings, parts.data),
        balanced=settings.dataset.sampler == "balanced",
        select=train.select,
        metric=train.metric,
        early_stop=train.early_stop,
        test_each_epoch=train.test_each_epoch,
        clip_norm=train.clip_norm,
        accumulate=train.accumulate,
    )
    return Prepared(training, data, recipe, learner)


def _check_and_ask(
    settings: Settings, teacher: Teacher, data: ImageDataset, views: Views | None, hardware: Hardware
) -> None:
    """Check what a teacher that does not learn can teach, and let it answer in advance where that is possible."""
    name, cache = settings.teacher.name, cache_folder(settings, "teacher")
    if isinstance(teacher, FrozenTeacher):
        check_recorded(name, teacher, data, cache, hardware)
    check_teacher(name, teacher, settings.softening, data, cache, hardware)
    if isinstance(teacher, FrozenTeacher):
        _answer_in_advance(settings, teacher, data, views, hardware)


def cache_folder(settings: Settings, kind: str) -> Path:
    """Where what a frozen network computes is kept: a "teacher"'s answers, a backbone's "features"."""
    return Path(settings.output_dir) / "cache" / kind


def _answer_in_advance(
    settings: Settings, teacher: FrozenTeacher, data: ImageDataset, views: Views | None, hardware: Hardware
) -> None:
    """Let the teacher see the training images once, where every epoch sees the same views of them.

    Raises:
        ConfigError: the config insists on it, and the answers are larger than it allows.
    """
    outputs, max_gb = settings.distillation.outputs, settings.distillation.cache_max_gb
    if outputs == "online" or settings.train.mixes or (views and views.number is None):
        return
    positions = data.splits["train"].sort().values
    like = teacher.answer(data.images[positions[:2]].to(hardware.device))
    request = OutputRequest(
        ", ".join(["logits", *teacher.observed]),
        settings.teacher.name,
        teacher.classifier,
        lambda images: teacher.answer(images).pack(),
        data,
        positions,
        views,
        teacher.observed,
    )
    try:
        teacher.remember(precomputed_outputs(request, cache_folder(settings, "teacher"), max_gb, hardware), like)
    except TooLargeError as error:
        if outputs != "auto":
            expected = "more, or distillation.outputs=online"
            raise ConfigError("distillation.cache_max_gb", f"{max_gb:g}", expected, str(error)) from error
        log.info("%s, more than distillation.cache_max_gb=%g: computed anew in each epoch", error, max_gb)


def _build_features(
    settings: Settings,
    model: Classifier,
    loss: Loss,
    teacher: Teacher | None,
    data: ImageDataset,
    hardware: Hardware,
) -> ImageDataset | None:
    """The data set with a frozen backbone's features for images, on which a head trains; None where the images are
    needed: by a backbone that learns, by a teacher, by a loss that compares what is before the head, for mixing, or
    because more comes after the head."""
    needed = not model.frozen_backbone or (teacher and not teacher.remembers) or settings.train.epochs == 0
    if needed or settings.train.mixes or loss.roles:
        return None
    name, max_gb = settings.model.name, settings.distillation.cache_max_gb
    if not model.ends_with_head(data.images[data.splits["train"][:2]].to(hardware.device)):
        log.info("%s: more comes after its head, so its backbone runs in each epoch", name)
        return None
    try:
        return precomputed_features(model, name, data, cache_folder(settings, "features"), max_gb, hardware)
    except TooLargeError as error:
        log.info("%s, more than distillation.cache_max_gb=%g: computed anew in each epoch", error, max_gb)
        return None
