"""What a run is made of, checked before it trains."""

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.assembly.building import check_arguments
from kdpipe.assembly.datasets import build_data, build_unlabelled, check_dataset, check_selection
from kdpipe.assembly.epoch_views import check_augmentation, check_outputs
from kdpipe.assembly.networks import build_model, check_single_images, say_size
from kdpipe.assembly.objectives import build_loss, check_fit, check_step, class_weights
from kdpipe.assembly.parameter_groups import by_layer
from kdpipe.assembly.teachers import KnownTeachers, build_teacher
from kdpipe.data import ImageDataset
from kdpipe.models import Classifier
from kdpipe.models.weights import weights_digest
from kdpipe.settings.composition import Invocation
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import EnsembleSettings, NetworkSettings, Settings
from kdpipe.training.teacher import NetworkTeacher, Teacher

if TYPE_CHECKING:
    from kdpipe.tracking import Tracker

log = logging.getLogger("kdpipe")


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before any of it moves to a device.

    Attributes:
        teacher_source: the run or file that the teacher's weights come from, several runs with commas between them; ""
            where there is no teacher.
        tags: what a finished run with the same parts is found by.
    """

    data: ImageDataset
    teacher: Teacher | None
    teacher_source: str
    model: Classifier
    tags: dict[str, str]


def check_components(settings: Settings) -> None:
    """Raise ConfigError for a value that a component does not take, or that goes with no other: before data is read."""
    settings.check_weights()
    loss = build_loss(settings)
    check_dataset(settings.dataset)
    check_arguments("model", settings.model, num_classes=2)
    if isinstance(settings.teacher, NetworkSettings):
        check_arguments("teacher", settings.teacher, num_classes=2)
    check_outputs(settings)
    train = settings.train
    single = {"train.mixup": train.mixup, "train.cutmix": train.cutmix}
    unlabelled = settings.dataset.unlabelled_root
    if unlabelled is not None and train.mixes:
        raise ConfigError("dataset.unlabelled_root", unlabelled, "null with train.mixup or train.cutmix")
    for key, value in (single | {"dataset.unlabelled_root": unlabelled}).items():
        if value is not None and loss.one_label:
            raise ConfigError(key, value, "null", "the loss needs one label for each image")
    check_step(settings, loss)
    if not isinstance(settings.teacher, NetworkSettings) and settings.needs_teacher and loss.roles:
        what = "an ensemble answers" if isinstance(settings.teacher, EnsembleSettings) else "a file of answers teaches"
        problem = f"{what} with logits alone, and the loss compares {', '.join(loss.roles)}"
        raise ConfigError("model@teacher", settings.teacher.name, "one network", problem)


def build_parts(settings: Settings, invocation: Invocation, tracker: "Tracker", known: KnownTeachers) -> Parts:
    """Data, teacher and model.

    Args:
        invocation: how the settings were composed, for the command that a message suggests.
        known: teachers that were built already; new ones are added.
    """
    data = build_checked_data(settings)
    key = ""
    if settings.teacher_learns:  # each run has its own
        known = {}
    elif settings.needs_teacher:
        key = json.dumps([settings.dataset.plain, settings.teacher.plain])
    if key not in known:
        known[key] = build_teacher(settings, invocation, data, tracker)
    teacher, teacher_source = known[key]
    model = build_model(settings, data, tracker)
    if settings.optimizer.layer_decay is not None:
        by_layer(settings.optimizer, model)
    networks = {"model": (settings.model.name, model)}
    if isinstance(teacher, NetworkTeacher) and isinstance(teacher.classifier, Classifier):
        networks["teacher"] = (settings.teacher.name, teacher.classifier)
    for part, (name, network) in networks.items():
        say_size(part, name, network, data)
        learns = part == "model" or (teacher and teacher.learns)
        if learns and settings.train.epochs > 0 and 1 in (settings.train.batch_size, len(data.splits["train"])):
            check_single_images(part, name, network, data)
    is_rearranged = check_fit(settings, model, teacher, data) if teacher else False
    tags = {
        "kdpipe.identity": settings.identity,
        "kdpipe.inputs": _inputs_digest(data, teacher, model, is_rearranged),
        "kdpipe.stage": settings.run_stage,
    }
    return Parts(data, teacher, teacher_source, model, tags)


def build_checked_data(settings: Settings) -> ImageDataset:
    """The images that a run trains on. Raises ConfigError for settings that do not go with them."""
    data = build_data(settings.dataset)
    check_selection(settings, data)
    class_weights(settings, data)
    check_augmentation(settings, data)
    if settings.needs_teacher and (settings.dataset.unlabelled_root is not None or _learns_from_more(settings, data)):
        return build_unlabelled(settings)
    return data


def _learns_from_more(settings: Settings, data: ImageDataset) -> bool:
    """Whether a student with a teacher also learns from the images that the data set has without a label."""
    if not data.more:
        return False
    needs_labels = "train.mixup and train.cutmix need" if settings.train.mixes else "the loss needs"
    if settings.train.mixes or build_loss(settings).one_label:
        log.warning("data set %s: images without a label are left out: %s one for each image", data.name, needs_labels)
        return False
    return True


def _inputs_digest(data: ImageDataset, teacher: Teacher | None, model: Classifier, is_rearranged: bool) -> str:
    """What the config only points to: the images, the teacher's weights, the first weights."""
    images = [data.fingerprint, data.unlabelled] if data.unlabelled else [data.fingerprint]
    if is_rearranged:  # before 0.5 such maps were compared with their height as channels
        images.append("rearranged")
    return "-".join([*images, weights_digest(model.network), *([teacher.digest] if teacher else [])])
