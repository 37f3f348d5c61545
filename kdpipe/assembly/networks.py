"""Networks and their weights."""

import logging
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from kdpipe.assembly.building import build
from kdpipe.assembly.run_networks import network_differences, refuse, trained_network
from kdpipe.data import ImageDataset
from kdpipe.data.decode import stored
from kdpipe.models import Classifier
from kdpipe.models.weights import check_class_names, load_imagenet, load_state, read_weights
from kdpipe.settings.addresses import file_and_part, run_and_file
from kdpipe.settings.errors import ConfigError, first_line
from kdpipe.settings.identity import FIRST_RESIZING
from kdpipe.settings.schema import Freeze, NetworkSettings, Settings
from kdpipe.system.once import log_once
from kdpipe.system.padding import each_photo
from kdpipe.system.randomness import derive_seed

if TYPE_CHECKING:
    from kdpipe.tracking import RunStore


def build_network(key: str, settings: NetworkSettings, data: ImageDataset, freeze: Freeze) -> Classifier:
    """The network that stands under `key` in the config, without weights."""
    network = build(key, settings, num_classes=data.num_classes)
    # A network of a library knows what its pretrained weights expect.
    own = getattr(network, "preprocessing", {})
    chosen = {name: getattr(settings, name) for name in ("image_size", "mean", "std", *FIRST_RESIZING)}
    preprocessing: dict[str, Any] = {
        name: own.get(name, FIRST_RESIZING.get(name)) if value is None else value for name, value in chosen.items()
    }
    if settings.crop_pct is None and preprocessing["image_size"] != own.get("image_size"):
        preprocessing["crop_pct"] = 1  # nothing to cut off that its weights would have been trained without
    try:
        classifier = Classifier(network, **preprocessing, freeze=freeze)
    except ConfigError as error:
        raise error.under(key) from error
    _check_output(key, settings, classifier, data)
    return classifier


@torch.no_grad()
def _check_output(key: str, settings: NetworkSettings, classifier: Classifier, data: ImageDataset) -> None:
    """Raise ConfigError where two images do not become logits: before training."""
    images = data.images[torch.arange(2)]
    try:
        logits = classifier.eval()(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        problem = f"{settings.name} cannot take images of this size ({first_line(error)})"
        size = classifier.image_size
        raise ConfigError(f"{key}.image_size", size, _sizes_taken(classifier, images), problem) from error
    if logits.shape != (len(images), data.num_classes):
        expected = f"a network with logits [N, {data.num_classes}], not {[*logits.shape]}"
        raise ConfigError(f"{key}.name", settings.name, expected)


SIZES = (8, 16, 24, 32, 48, 64, 96, 112, 128, 160, 192, 224, 256, 299, 384)  # usual ones, in pixels


def _sizes_taken(classifier: Classifier, images: Tensor) -> str:
    """The usual sizes of images that a network takes, in words; "" where it takes none of them."""
    taken, given = [], classifier.image_size
    for size in SIZES:
        classifier.image_size = size
        try:
            classifier(images)
        except (RuntimeError, AssertionError, ValueError):
            continue
        taken.append(size)
    classifier.image_size = given
    if len(taken) > 1 and taken == [size for size in SIZES if size >= taken[0]]:
        return f"{taken[0]} or more"
    return " or ".join(map(str, taken))


def check_single_images(key: str, name: str, classifier: Classifier, data: ImageDataset) -> None:
    """Raise ConfigError where a network cannot learn from batches of one image: BatchNorm needs several values."""
    learner = deepcopy(classifier).train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            learner(data.images[data.splits["train"][:1]])
    except ValueError as error:
        problem = f"{name} cannot learn from one image at a time ({first_line(error)})"
        raise ConfigError("train.batch_size", 1, f"2 or more, or a larger {key}.image_size", problem) from error


def images_for(network: Classifier, data: ImageDataset, positions: Tensor) -> Tensor:
    """Images as an exported network takes them, uint8 [n, C, H, W]: photos that keep their shape as squares, squeezed
    or cropped as the network would do."""
    images = data.images[positions].contiguous()
    if not data.keeps_shapes:
        return images
    _, height, width = data.image_shape
    photos = (Image.fromarray(photo.permute(1, 2, 0).cpu().numpy()) for photo in each_photo(images))
    return torch.stack([torch.from_numpy(stored(photo, (width, height), network.resize).copy()) for photo in photos])


def say_size(key: str, name: str, classifier: Classifier, data: ImageDataset) -> None:
    """Log, once in a command, that a network sees images smaller than they are stored."""
    size, stored = classifier.image_size, max(data.image_shape[1:])
    if size < stored:
        message = "%s sees the images at %d×%d, smaller than stored (%d×%d); %s.image_size is its size"
        log_once(logging.INFO, message, name, size, size, stored, stored, key)


def build_model(settings: Settings, data: ImageDataset, store: "RunStore") -> Classifier:
    """What is trained: seeded first weights, or those that the config names."""
    torch.manual_seed(derive_seed(settings.seed, "student"))
    model = build_network("model", settings.model, data, settings.model.freeze)
    load_weights("model", settings.model, model, data, store)
    return model


def load_weights(
    key: str, settings: NetworkSettings, classifier: Classifier, data: ImageDataset, store: "RunStore"
) -> None:
    """Load the weights that the config names into a network: none, ImageNet's, a run's or a file's."""
    if settings.weights == "imagenet":
        load_imagenet(f"{key}.weights", classifier.network, settings.name, data.class_names)
    elif settings.weights is not None:
        theirs = trained_network(f"{key}.weights", settings.weights, lambda: store)
        if theirs is not None:  # which the settings have already, unless they are of another way in than a command
            refuse(key, settings, network_differences(settings, theirs))
        load_trained(f"{key}.weights", settings.weights, settings.name, classifier, data, store)


def load_trained(
    key: str, weights: str, name: str, classifier: Classifier, data: ImageDataset, store: "RunStore"
) -> None:
    """Load the weights of a run or a file into a network."""
    if weights.startswith("runs:/"):
        with store.downloaded(*run_and_file(weights), key) as path:
            state, class_names = read_weights(key, path)
    else:
        state, class_names = read_weights(key, *file_and_part(weights))
    check_class_names(key, weights, class_names, data.class_names)
    load_state(key, weights, classifier.network, state, name, data.num_classes)
