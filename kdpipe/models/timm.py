"""Any timm classifier, by name; timm is an extra."""

import difflib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdpipe.models.torchvision import check_stages


def classifier(architecture: str, num_classes: int, stages: Sequence[str] | None = None) -> nn.Module:
    """timm's `architecture` without weights, with `num_classes` logits.

    Args:
        stages: names of the submodules whose outputs are what its stages make of the images; None for those that timm
            takes features from.

    Raises:
        ValueError: timm is not installed, or has no such network, or that one no such submodule.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError("model=timm: timm is not installed; pip install 'kdpipe[timm]'") from error
    if not timm.is_model(architecture):
        near = ", ".join(difflib.get_close_matches(architecture, timm.list_models())) or "none is near"
        raise ValueError(f"model.name={architecture}: a network of timm.list_models() is accepted ({near})")
    network: nn.Module = timm.create_model(architecture, num_classes=num_classes)
    name = network.pretrained_cfg["classifier"]  # type: ignore[index]
    if not isinstance(name, str):
        raise ValueError(f"model.name={architecture}: a network with one head is accepted, this one has {name}")
    network.head_name = name  # type: ignore[assignment]
    names = stages_of(network) if stages is None else check_stages(network, stages)
    network.roles = {"stages": names}  # type: ignore[assignment]
    expected = network.pretrained_cfg
    network.preprocessing = {  # type: ignore[assignment]
        "image_size": expected["input_size"][1],  # type: ignore[index]
        "mean": expected["mean"],  # type: ignore[index]
        "std": expected["std"],  # type: ignore[index]
    }

    def imagenet_backbone() -> dict[str, Tensor]:
        pretrained = timm.create_model(architecture, pretrained=True)
        return {key: tensor for key, tensor in pretrained.state_dict().items() if not key.startswith(f"{name}.")}

    network.imagenet_backbone = imagenet_backbone  # type: ignore[assignment]
    return network


def stages_of(network: nn.Module) -> list[str]:
    """The submodules that timm takes features from, where these are known to be maps [N, C, H, W]."""
    if getattr(network, "output_fmt", "NCHW") != "NCHW":
        return []
    names = {name for name, _ in network.named_modules()}
    known: list[dict[str, Any]] = getattr(network, "feature_info", [])
    return [info["module"] for info in known if info["module"] in names]
