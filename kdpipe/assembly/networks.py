"""Networks that a config describes, the present one or that of a run, and their weights."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from kdpipe.data import ImageDataset
from kdpipe.models import Classifier
from kdpipe.models.weights import check_class_names, load_imagenet, load_state, read_weights
from kdpipe.runs.names import run_and_file
from kdpipe.settings import config as settings
from kdpipe.settings.components import check_config, check_yaml
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.hydra_errors import one_line
from kdpipe.system.randomness import derive_seed


def build_network(key: str, model: DictConfig, data: ImageDataset, freeze: str) -> Classifier:
    """The network that stands under `key`, without weights."""
    architecture = {name: value for name, value in model.items() if name not in settings.NOT_ARCHITECTURE}
    try:
        network = instantiate(architecture, num_classes=data.num_classes)
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__.under(key) from error
        raise ValueError(one_line(error)) from error
    # A network of a library knows what its pretrained weights expect.
    own = getattr(network, "preprocessing", {})
    preprocessing: dict[str, Any] = {
        name: own.get(name) if model[name] is None else model[name] for name in settings.PREPROCESSING
    }
    try:
        classifier = Classifier(network, **preprocessing, freeze=freeze)  # type: ignore[arg-type]
    except ConfigError as error:
        raise error.under(key) from error
    check_output(key, model, classifier, data)
    return classifier


@torch.no_grad()
def check_output(key: str, model: DictConfig, classifier: Classifier, data: ImageDataset) -> None:
    """Raise ValueError where a network gets from images to no logits: two images tell before training."""
    images = data.images[torch.arange(2)]
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


def read_model(file: Path) -> DictConfig:
    """What a run's composed config says of its network.

    Raises:
        ValueError: it says no such thing, or names what is not accepted.
    """
    return read_config(file, ["model"]).model


def read_config(file: Path, sections: Sequence[str], optional: Sequence[str] = ()) -> DictConfig:
    """These sections of a run's composed config, and of the optional ones those that it has.

    Raises:
        ValueError: it lacks them, or names what is not accepted: it may be somebody else's.
    """
    check_yaml(file)
    composed = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(composed, dict)
    found = {name: composed[name] for name in (*sections, *optional) if isinstance(composed.get(name), dict)}
    needed = ("_target_", "name", *settings.PREPROCESSING)
    if not set(sections) <= set(found) or not all(key in found["model"] for key in needed) or "${" in str(found):
        raise ValueError(f"{file}: the composed config of a run is accepted, with its model's {', '.join(needed)}")
    config = OmegaConf.create(found)
    check_config(config)
    return config


def load_weights(key: str, model: DictConfig, classifier: Classifier, data: ImageDataset, tracker: Any) -> None:
    """Put the weights that the config names into a network: none, ImageNet's, a run's or a file's."""
    if model.weights == "imagenet":
        load_imagenet(f"{key}.weights", classifier.network, model.name)
    elif model.weights is not None:
        load_trained(f"{key}.weights", str(model.weights), model.name, classifier, data, tracker)


def load_trained(key: str, weights: str, name: str, classifier: Classifier, data: ImageDataset, tracker: Any) -> None:
    """Put the weights of a run or a file into a network."""
    of_run = weights.startswith("runs:/")
    file = tracker.downloaded(*run_and_file(weights), key) if of_run else nullcontext(Path(weights).expanduser())
    with file as path:
        state, class_names = read_weights(key, path)
    check_class_names(key, weights, class_names, data.class_names)
    load_state(key, weights, classifier.network, state, name, data.num_classes)
