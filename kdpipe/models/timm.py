"""Any timm classifier, by name; timm is an extra."""

from collections.abc import Sequence
from typing import Any

import torchvision.models
from torch import Tensor, nn

from kdpipe.models.torchvision import check_stages
from kdpipe.settings.components import NO_TIMM
from kdpipe.settings.errors import ConfigError, one_of, suggestion
from kdpipe.system.hub import without_retries


def classifier(architecture: str, num_classes: int, stages: Sequence[str] | None = None) -> nn.Module:
    """timm's `architecture` without weights, with `num_classes` logits.

    Args:
        stages: names of the submodules whose outputs are the maps after each stage; None for those that timm takes
            features from.

    Raises:
        ConfigError: timm is not installed, or has no such network or weights; the network has several heads, or no such
            submodule.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError("name", architecture, problem=NO_TIMM) from error
    if not timm.is_model(architecture):
        near = suggestion(architecture, timm.list_models())
        if architecture in torchvision.models.list_models(module=torchvision.models):
            near = "torchvision has it: choose the option torchvision"
        raise ConfigError("name", architecture, "a network of timm.list_models()", near)
    try:
        network: Any = timm.create_model(architecture, num_classes=num_classes)
    except RuntimeError as error:  # of weights that do not exist: resnet18.nonsense
        tags = timm.list_pretrained(f"{architecture.partition('.')[0]}.*")
        if "pretrained tag" not in str(error) or not tags:
            raise
        raise ConfigError("name", architecture, one_of(tags), suggestion(architecture, tags)) from error
    name = network.pretrained_cfg["classifier"]
    if not isinstance(name, str):
        raise ConfigError("name", architecture, "a network with one head", f"its heads are {', '.join(name)}")
    network.head_name = name
    network.roles = _roles_of(network, stages)
    expected = timm.data.resolve_model_data_config(network)
    network.preprocessing = {
        **{"image_size": expected["input_size"][1], "mean": expected["mean"], "std": expected["std"]},
        "resize": "squeeze" if expected["crop_mode"] == "squash" else "crop",
        **{"interpolation": expected["interpolation"], "crop_pct": expected["crop_pct"]},
    }
    published = network.pretrained_cfg
    if not (published.get("hf_hub_id") or published.get("url")):
        return network  # nobody has published weights of it

    def imagenet_weights() -> dict[str, Tensor]:
        with without_retries():
            return timm.create_model(architecture, pretrained=True).state_dict()

    network.imagenet_weights = imagenet_weights
    if published.get("hf_hub_id"):
        from huggingface_hub import constants

        network.imagenet_cache = constants.HF_HUB_CACHE
    return network


def _roles_of(network: nn.Module, stages: Sequence[str] | None) -> dict[str, Any]:
    """The submodules that timm takes features from, or the named ones, and the order of axes if timm says it."""
    names = {name for name, _ in network.named_modules() if name}
    infos: list[dict[str, Any]] = getattr(network, "feature_info", [])
    known = [info["module"] for info in infos if info["module"] in names]
    chosen = known if stages is None else check_stages(network, stages)
    of_known = str(getattr(network, "output_fmt", "NCHW"))
    return {"stages": chosen, "layout": of_known if set(chosen) <= set(known) else None}
