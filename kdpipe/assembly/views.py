"""What need not be worked out in every epoch, as the config asks for it."""

import logging
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import Views
from kdpipe.data.mixing import Mixing
from kdpipe.losses import Loss
from kdpipe.models import Classifier
from kdpipe.settings.config import mixes
from kdpipe.settings.identity import canonical
from kdpipe.system.hardware import Hardware
from kdpipe.training.precomputed import OutputRequest, TooLargeError, precomputed_features, precomputed_outputs
from kdpipe.training.teacher import Peer, Teacher

log = logging.getLogger("kdpipe")


def build_views(config: DictConfig, data: ImageDataset, is_taught: bool) -> Views | None:
    """What each epoch sees; None for the images as they are stored."""
    augment = instantiate(config.augmentation)
    if augment is None:
        return None
    described = repr(sorted((str(key), canonical(value)) for key, value in config.augmentation.items()))
    number = config.distillation.views if is_taught and config.distillation.outputs == "views" else None
    return Views(augment, described, len(data.labels), config.seed, number)


def build_mixing(config: DictConfig, data: ImageDataset) -> Mixing | None:
    """What mixes the images of each batch; None where nothing does."""
    return Mixing(config.train.mixup, config.train.cutmix, data.num_classes, config.seed) if mixes(config) else None


def answer_in_advance(
    config: DictConfig, teacher: Teacher, data: ImageDataset, views: Views | None, hardware: Hardware
) -> None:
    """Let the teacher look at the training images once, where every epoch sees the same views of them.

    Raises:
        ValueError: the config insists on it, and the answers are larger than it allows.
    """
    outputs, max_gb = config.distillation.outputs, config.distillation.cache_max_gb
    if outputs == "online" or mixes(config) or (views and views.number is None):
        return
    positions = data.splits["train"].sort().values
    like = teacher.answer(data.images[positions[:2]].to(hardware.device))
    question = OutputRequest(
        ", ".join(["logits", *teacher.asked_for]),
        config.teacher.name,
        teacher.classifier,
        lambda images: teacher.answer(images).pack(),
        data,
        positions,
        views,
        teacher.asked_for,
    )
    try:
        teacher.remember(precomputed_outputs(question, _cache(config, "teacher"), max_gb, hardware), like)
    except TooLargeError as error:
        if outputs != "auto":
            raise ValueError(
                f"distillation.cache_max_gb={max_gb}: {error}; more, or distillation.outputs=online, is accepted"
            ) from error
        log.info("%s, more than distillation.cache_max_gb=%s: worked out anew in each epoch", error, max_gb)


def build_features(
    config: DictConfig,
    model: Classifier,
    loss: Loss,
    teacher: Teacher | Peer | None,
    data: ImageDataset,
    hardware: Hardware,
) -> ImageDataset | None:
    """The data set with a frozen backbone's features for images, which a head trains on; None where the images
    themselves are needed: by a backbone that learns, by a teacher, by a loss that asks for what is before the head, to
    be mixed, or because more comes after the head."""
    needed = not model.frozen_backbone or (teacher and not teacher.remembers) or config.train.epochs == 0
    if needed or mixes(config) or loss.roles:
        return None
    if not model.ends_with_head(data.images[data.splits["train"][:2]].to(hardware.device)):
        log.info("%s: more comes after its head, so its backbone runs in each epoch", config.model.name)
        return None
    max_gb = config.distillation.cache_max_gb
    try:
        return precomputed_features(model, config.model.name, data, _cache(config, "features"), max_gb, hardware)
    except TooLargeError as error:
        log.info("%s, more than distillation.cache_max_gb=%s: worked out anew in each epoch", error, max_gb)
        return None


def _cache(config: DictConfig, kind: str) -> Path:
    return Path(config.output_dir) / "cache" / kind
