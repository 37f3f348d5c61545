"""Any torchvision classifier, by name, with its head replaced."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torchvision.models
from torch import Tensor, nn

from kdpipe.settings.errors import ConfigError, suggestion


def classifier(architecture: str, num_classes: int, stages: Sequence[str] | None = None) -> nn.Module:
    """torchvision's `architecture` without weights, its last layer replaced by one with `num_classes` logits.

    Args:
        stages: names of the submodules whose outputs are the maps after each stage; None for those of ResNets and
            DenseNets, which are known.

    Raises:
        ConfigError: torchvision has no such classifier, or the network no such submodule.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        near = suggestion(str(architecture), known)
        with suppress(ImportError):
            import timm

            near = "timm has it: choose the option timm" if timm.is_model(str(architecture)) else near
        expected = (
            f"a classifier of torchvision.models, such as {known[0]}, {known[1]}, {known[2]} ({len(known)} in all)"
        )
        raise ConfigError("name", architecture, expected, near)
    network = torchvision.models.get_model(architecture, weights=None)
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    path, last = layers[-1]
    if isinstance(last, nn.Linear):
        network.set_submodule(path, nn.Linear(last.in_features, num_classes))
    else:  # SqueezeNet's head is a 1×1 convolution.
        network.set_submodule(path, nn.Conv2d(last.in_channels, num_classes, kernel_size=1))
    if isinstance(network, torchvision.models.Inception3 | torchvision.models.GoogLeNet):
        # With their auxiliary classifiers, the output in training mode would be a tuple.
        network.aux_logits = False
        network.transform_input = True  # from ImageNet's mean and std to the scale of their weights
        for name in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, name):
                setattr(network, name, None)
    network.head_name = path
    network.roles = _roles_of(network) if stages is None else {"stages": check_stages(network, stages), "layout": None}
    published = torchvision.models.get_model_weights(architecture)["DEFAULT"]
    expected = published.transforms()
    network.preprocessing = {
        **{"image_size": expected.crop_size[0], "mean": expected.mean, "std": expected.std},
        **{"resize": "crop", "interpolation": expected.interpolation.value},
        "crop_pct": expected.crop_size[0] / expected.resize_size[0],
    }

    def imagenet_weights() -> dict[str, Tensor]:
        auxiliary = ("AuxLogits.", "aux1.", "aux2.")
        pretrained = torchvision.models.get_model(architecture, weights="DEFAULT").state_dict()
        return {name: tensor for name, tensor in pretrained.items() if not name.startswith(auxiliary)}

    network.imagenet_weights = imagenet_weights
    network.imagenet_classes = tuple(published.meta["categories"])
    return network


def _roles_of(network: nn.Module) -> dict[str, Any]:
    """The roles of a network's submodules (see `kdpipe.models.roles`), for families where they are known."""
    if isinstance(network, torchvision.models.ResNet):
        return resnet_roles(network)
    if isinstance(network, torchvision.models.DenseNet):
        return {"stages": [f"features.denseblock{number}" for number in (1, 2, 3, 4)]}
    return {}


def resnet_roles(network: nn.Module) -> dict[str, Any]:
    """The roles of a torchvision ResNet's submodules; makes the last ReLU of each stage work out of place."""
    stages = [f"layer{number}" for number in (1, 2, 3, 4)]
    # A block calls its one ReLU after each convolution; the last call counts.
    last = [f"{name}.{len(network.get_submodule(name)) - 1}.relu" for name in stages]  # type: ignore[arg-type]
    for name in last:
        network.get_submodule(name).inplace = False  # type: ignore[assignment]
    return {"stages": stages, "preactivations": last}


def check_stages(network: nn.Module, stages: Sequence[str]) -> list[str]:
    """The names of the stages; raise ConfigError unless each is the name of a submodule."""
    names = [name for name, _ in network.named_modules() if name]
    is_list = isinstance(stages, Sequence) and not isinstance(stages, str)
    if not is_list or not stages or any(name not in names for name in stages):
        some = ", ".join(name for name, _ in network.named_children())
        raise ConfigError("stages", list(stages) if is_list else stages, f"a list of submodules' names, such as {some}")
    return list(stages)
