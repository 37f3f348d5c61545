"""Where in a network the features are that a loss may need in addition to the logits, by role.

A network's attribute `roles` maps each role to names of its submodules:
    stages: whose outputs are the maps after each stage, first to last;
    preactivations: the last ReLU of each stage, whose inputs are taken; stages that end without a ReLU need none, and
        their outputs are taken;
    embedding: the last linear layer, whose input is the representation of an image, [N, D]; by default the head
        (`head_name`).

Maps may be [N, C, H, W] or [N, H, W, C]: a wider and a taller image show which. Of a network that takes images of one
size only, `roles` says it as `layout`: "NCHW" (the default), "NHWC", or None where nobody knows.

Tensors that the next module changes in place are seen as changed.
"""

from typing import Any

from torch import nn

from kdpipe.settings.errors import ConfigError


def places(network: nn.Module, role: str, key: str) -> list[tuple[str, bool]]:
    """The names of a network's submodules with a role, each with whether its input is meant, not its output.

    Raises:
        ConfigError: the network does not name any; `key` is where it stands in the config.
    """
    known: dict[str, Any] = getattr(network, "roles", {})
    if role == "embedding":
        name = known.get("embedding", getattr(network, "head_name", None))
        if name is not None:
            return [(str(name), True)]
    elif known.get(role):
        return [(name, role == "preactivations") for name in known[role]]
    elif role == "preactivations" and known.get("stages"):
        return [(name, False) for name in known["stages"]]
    problem = f"it does not name its {role}, which the loss compares"
    expected = f"a network with `roles`, or {key}.stages=[…] for one of torchvision or timm"
    raise ConfigError(key, type(network).__name__, expected, problem)


def layout_of(network: nn.Module) -> str | None:
    """How a network's author, or its library, orders the axes of its maps: "NCHW" or "NHWC"; None for not known."""
    known: dict[str, Any] = getattr(network, "roles", {})
    return known.get("layout", "NCHW")
