"""Networks and their weights."""

import copy
from typing import TYPE_CHECKING, Any

import torch

from kdpipe.assembly.building import build
from kdpipe.assembly.run_networks import network_differences, refuse, trained_network
from kdpipe.data import ImageDataset
from kdpipe.models import Classifier
from kdpipe.models.weights import check_class_names, load_imagenet, load_state, read_weights
from kdpipe.settings.addresses import file_and_part, run_and_file
from kdpipe.settings.errors import ConfigError, first_line
from kdpipe.settings.schema import Freeze, NetworkSettings, Settings
from kdpipe.system.randomness import derive_seed
from kdpipe.training.loop import batches

if TYPE_CHECKING:
    from kdpipe.tracking import RunStore


def build_network(key: str, settings: NetworkSettings, data: ImageDataset, freeze: Freeze) -> Classifier:
    """The network that stands under `key` in the config, without weights."""
    network = build(key, settings, num_classes=data.num_classes)
    # A network of a library knows what its pretrained weights expect.
    own = getattr(network, "preprocessing", {})
    preprocessing: dict[str, Any] = {
        name: own.get(name) if getattr(settings, name) is None else getattr(settings, name)
        for name in ("image_size", "mean", "std")
    }
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
        raise ConfigError(f"{key}.image_size", settings.image_size, problem=problem) from error
    if logits.shape != (len(images), data.num_classes):
        expected = f"a network with logits [N, {data.num_classes}], not {[*logits.shape]}"
        raise ConfigError(f"{key}.name", settings.name, expected)


def check_batches(key: str, name: str, classifier: Classifier, data: ImageDataset, batch_size: int) -> None:
    """Raise ConfigError for batches of one image where the network cannot learn from one: BatchNorm on maps of one
    pixel has nothing to take a mean of."""
    if min(map(len, batches(data.splits["train"], batch_size))) > 1:
        return
    copied = copy.deepcopy(classifier)
    try:
        with torch.no_grad():
            copied.train()(data.images[data.splits["train"][:1]])
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        problem = f"BatchNorm in {name} ({key}) cannot learn from one image"
        raise ConfigError("train.batch_size", batch_size, "2 or more, and as many training images", problem) from error


def build_model(settings: Settings, data: ImageDataset, store: "RunStore") -> Classifier:
    """What is trained: seeded first weights, or those that the config names."""
    torch.manual_seed(derive_seed(settings.seed, "student"))
    model = build_network("model", settings.model, data, settings.model.freeze)
    load_weights("model", settings.model, model, data, store)
    if settings.train.epochs:
        check_batches("model", settings.model.name, model, data, settings.train.batch_size)
    return model


def load_weights(
    key: str, settings: NetworkSettings, classifier: Classifier, data: ImageDataset, store: "RunStore"
) -> None:
    """Load the weights that the config names into a network: none, ImageNet's, a run's or a file's."""
    if settings.weights == "imagenet":
        load_imagenet(f"{key}.weights", classifier.network, settings.name)
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
