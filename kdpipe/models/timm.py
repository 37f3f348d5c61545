"""Any timm classifier, by name; timm is an extra."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kdpipe.models.torchvision import check_stages
from kdpipe.settings.errors import ConfigError, one_of, suggestion


def classifier(architecture: str, num_classes: int, stages: Sequence[str] | None = None) -> nn.Module:
    """timm's `architecture` without weights, with `num_classes` logits.

    Args:
        stages: names of the submodules whose outputs are the maps after each stage; None for those that timm takes
            features from.

    Raises:
        ConfigError: timm is not installed, or has no such network; the network has several heads, or no such submodule.
    """
    try:
        import timm
    except ImportError as error:
        problem = "timm is not installed; pip install 'kdpipe[timm]'"
        raise ConfigError("name", architecture, problem=problem) from error
    if not timm.is_model(architecture):
        near = suggestion(architecture, timm.list_models())
        raise ConfigError("name", architecture, "a network of timm.list_models()", near)
    try:
        network: Any = timm.create_model(architecture, num_classes=num_classes)
    except RuntimeError as error:
        name, _, tag = architecture.partition(".")
        if f"tag ({tag})" not in str(error):
            raise
        known = [f"{name}.{tag}" for tag in timm.models.get_arch_pretrained_cfgs(name)]
        raise ConfigError("name", architecture, one_of([name, *known]), "timm has no such weights") from error
    name = network.pretrained_cfg["classifier"]
    if not isinstance(name, str):
        raise ConfigError("name", architecture, "a network with one head", f"its heads are {', '.join(name)}")
    network.head_name = name
    network.roles = {"stages": _stages_of(network) if stages is None else check_stages(network, stages)}
    expected = network.pretrained_cfg
    network.preprocessing = {"image_size": expected["input_size"][1], "mean": expected["mean"], "std": expected["std"]}

    def imagenet_backbone() -> dict[str, Tensor]:
        with _offline_where_no_hub_answers():
            pretrained = timm.create_model(architecture, pretrained=True)
        return {key: tensor for key, tensor in pretrained.state_dict().items() if not key.startswith(f"{name}.")}

    network.imagenet_backbone = imagenet_backbone
    network.imagenet_cache = _hub_cache
    return network


@contextmanager
def _offline_where_no_hub_answers() -> Iterator[None]:
    """Look into the cache alone where the Hugging Face Hub cannot be reached: its client would retry for a minute."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever transport it uses
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _stages_of(network: nn.Module) -> list[str]:
    """The submodules that timm takes features from, if these are known to be maps [N, C, H, W]."""
    if getattr(network, "output_fmt", "NCHW") != "NCHW":
        return []
    names = {name for name, _ in network.named_modules()}
    known: list[dict[str, Any]] = getattr(network, "feature_info", [])
    return [info["module"] for info in known if info["module"] in names]
