"""Any torchvision classifier, by name, with its head replaced."""

from collections.abc import Callable

import torchvision.models
from torch import Tensor, nn


def classifier(architecture: str, num_classes: int) -> nn.Module:
    """torchvision's `architecture` without weights; its last layer gives `num_classes` logits.

    Raises:
        ValueError: torchvision has no such classifier.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise ValueError(f"model.name={architecture}: a torchvision classifier is accepted: {', '.join(known)}")
    network = torchvision.models.get_model(architecture, weights=None)
    path, last = [
        (name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ][-1]
    head: nn.Module
    if isinstance(last, nn.Linear):
        head = nn.Linear(last.in_features, num_classes)
    else:  # SqueezeNet's head is a 1×1 convolution.
        head = nn.Conv2d(last.in_channels, num_classes, kernel_size=1)
    network.set_submodule(path, head)
    if isinstance(network, torchvision.models.Inception3 | torchvision.models.GoogLeNet):
        # Their second classifiers would make the output of a training step a tuple.
        network.aux_logits = False
        network.transform_input = True  # from ImageNet's mean and std to the scale that their weights know
        for name in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, name):
                setattr(network, name, None)
    network.head_name = path
    network.imagenet_backbone = imagenet_backbone(architecture, path)
    expected = torchvision.models.get_model_weights(architecture)["DEFAULT"].transforms()
    network.preprocessing = {"image_size": expected.crop_size[0], "mean": expected.mean, "std": expected.std}
    return network


def imagenet_backbone(architecture: str, head_name: str) -> Callable[[], dict[str, Tensor]]:
    """A function that downloads (or finds in PyTorch's cache) the ImageNet weights of all but the head."""

    def load() -> dict[str, Tensor]:
        pretrained = torchvision.models.get_model(architecture, weights="DEFAULT")
        return {
            name: tensor
            for name, tensor in pretrained.state_dict().items()
            if not name.startswith((f"{head_name}.", "AuxLogits.", "aux1.", "aux2."))
        }

    return load
