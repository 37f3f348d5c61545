"""What each epoch sees of the images: augmented views, mixed images."""

import torch
from torch import Tensor

from kdpipe.assembly.building import build
from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import Augmentation, Flip, RandomResizedCrop, Views, number_of_draws, steps_of
from kdpipe.data.mixing import Mixing
from kdpipe.settings.errors import ConfigError, first_line
from kdpipe.settings.identity import canonical
from kdpipe.settings.schema import AnswersSettings, Settings
from kdpipe.system.once import warn_once
from kdpipe.system.padding import each_photo, is_padded
from kdpipe.training.loop import epoch_order

SHOWN = 16  # images in the picture of views
AUGMENTATIONS = "kdpipe.data.augmentation"


def build_augmentation(settings: Settings) -> Augmentation | None:
    """None where every epoch sees the images as they are stored."""
    augment: Augmentation | None = build("augmentation", settings.augmentation)
    return augment


def check_augmentation(settings: Settings, data: ImageDataset) -> None:
    """Raise ConfigError for an augmentation that two images do not survive: before anything trains."""
    augment = build_augmentation(settings)
    if augment is None:
        return
    images, target = data.images[torch.arange(2)], settings.augmentation.target
    number = number_of_draws(augment)
    expected = f"a function of uint8 images [N, C, H, W] and random numbers [N, {number}]"
    try:
        views = augment(images, torch.zeros(len(images), number))
    except ConfigError as error:  # of images that its settings do not go with
        raise error.under("augmentation") from error
    except Exception as error:  # made for other arguments, or with a mistake
        problem = f"it cannot augment images ({first_line(error)})"
        raise ConfigError("augmentation._target_", target, expected, problem) from error
    if not isinstance(views, torch.Tensor) or (views.shape, views.dtype) != (
        _shape_of_views(augment, images),
        images.dtype,
    ):
        raise ConfigError("augmentation._target_", target, f"{expected} that returns such images")


def _shape_of_views(augment: Augmentation, images: Tensor) -> torch.Size:
    """That of the images, but for what is cropped to another size."""
    shape = images.shape
    for step in steps_of(augment):
        if isinstance(step, RandomResizedCrop) and step.size:
            channels = 3 if is_padded(images) else shape[1]
            shape = torch.Size([len(images), channels, step.size, step.size])
    return shape


def build_views(settings: Settings, data: ImageDataset) -> Views | None:
    """What each epoch sees; None for the images as they are stored."""
    augment = build_augmentation(settings)
    if augment is None:
        return None
    described = repr(sorted((key, canonical(value)) for key, value in settings.augmentation.plain.items()))
    fixed = settings.needs_teacher and settings.distillation.outputs == "views"
    number = settings.distillation.views if fixed else None
    return Views(augment, described, len(data.labels), settings.seed, number)


def first_views(settings: Settings, data: ImageDataset) -> tuple[list[Tensor], list[Tensor]]:
    """The first images of the first batch, as they are stored and as the first epoch sees them: uint8 [C, H, W] each,
    up to SHOWN of both."""
    order = epoch_order(data, settings.seed, 1, settings.dataset.sampler == "balanced")
    batch = order[: settings.train.batch_size]
    stored = images = data.images[batch]
    if views := build_views(settings, data):
        images = views.augment(images, views.draws(1)[batch])
    if mixing := build_mixing(settings, data):
        mixed, _ = mixing(images, data.labels[batch], 1, 0)
        images = mixed.round().to(torch.uint8)
    of_one, seen = (
        each_photo(some[:SHOWN]) if data.keeps_shapes and is_padded(some) else list(some[:SHOWN])
        for some in (stored, images)
    )
    return of_one, seen


def build_mixing(settings: Settings, data: ImageDataset) -> Mixing | None:
    """Mixes the images of each batch; None where images are not mixed."""
    train = settings.train
    return Mixing(train.mixup, train.cutmix, data.num_classes, settings.seed) if train.mixes else None


def check_outputs(settings: Settings) -> None:
    """Raise ConfigError for a way to get the teacher's answers that the views of the images rule out."""
    _check_sizes(settings)
    outputs, key = settings.distillation.outputs, "distillation.outputs"
    has_views = build_augmentation(settings) is not None
    if settings.needs_teacher and isinstance(settings.teacher, AnswersSettings):
        return _check_views_of_answers(settings, has_views)
    if outputs == "cached" and has_views:
        raise ConfigError(key, outputs, "auto, online or views", "augmentation gives each epoch other views")
    if outputs in ("cached", "views") and settings.train.mixes:
        problem = "train.mixup and train.cutmix give each epoch other images"
        raise ConfigError(key, outputs, "auto or online", problem)
    if outputs == "views" and not has_views:
        raise ConfigError(key, outputs, "auto, cached or online", "without augmentation there is only one view")


def _check_sizes(settings: Settings) -> None:
    """Raise ConfigError for what shifts or mixes images of one size, where photos keep their shape."""
    if settings.dataset.resize != "keep":
        return
    problem = "it needs images of one size, and dataset.resize=keep keeps the shapes of photos"
    remedy = "random_resized_crop first, which makes them so, or dataset.resize=crop"
    for step in steps_of(build_augmentation(settings) or Flip()):
        if isinstance(step, RandomResizedCrop):
            return
        is_ours = type(step).__module__.startswith(AUGMENTATIONS)
        if is_ours and not isinstance(step, Flip):
            raise ConfigError("augmentation", type(step).__name__, remedy, problem)
    for name in ("mixup", "cutmix"):
        if (value := getattr(settings.train, name)) is not None:
            raise ConfigError(f"train.{name}", value, f"null, augmentation={remedy}", problem)


def _check_views_of_answers(settings: Settings, has_views: bool) -> None:
    """Raise ConfigError for images that a file has no answers for; warn where it has one answer for all views."""
    problem = "a file of answers knows the images as they are stored"
    for name in ("mixup", "cutmix"):
        if (value := getattr(settings.train, name)) is not None:
            raise ConfigError(f"train.{name}", value, "null", f"{problem}, and no others")
    if (outputs := settings.distillation.outputs) not in ("auto", "cached"):
        raise ConfigError("distillation.outputs", outputs, "auto or cached", f"{problem}, and no others")
    if has_views:
        warn_once("augmentation: %s, so each view of an image is taught the same answer", problem)
