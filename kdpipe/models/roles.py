"""What a loss may ask of a network beside its logits, by role: after each stage, or before the last layer.

A network says in `roles` which of its submodules have them:
    stages: names of the submodules whose outputs [N, C, H, W] are what its stages make of the images, first to last;
    preactivations: names of the last ReLUs of these stages, whose inputs are taken; where a network names none, its
        stages end without one, and what leaves them is taken;
    embedding: the name of the submodule whose input is the representation of an image, [N, D]; its last linear layer.
        Where it is missing the head (`head_name`) is taken.

What the next module changes in place is seen as it is afterwards.
"""

from typing import Any

from torch import nn


def places(network: nn.Module, role: str, key: str) -> list[tuple[str, bool]]:
    """The names of the submodules that have a role in a network, each with whether its input is meant."""
    known: dict[str, Any] = getattr(network, "roles", {})
    if role == "embedding":
        name = known.get("embedding", getattr(network, "head_name", None))
        if name is not None:
            return [(str(name), True)]
    elif known.get(role):
        return [(name, role == "preactivations") for name in known[role]]
    elif role == "preactivations" and known.get("stages"):
        return [(name, False) for name in known["stages"]]
    raise ValueError(
        f"{key}={type(network).__name__}: it does not say what its {role} are, which the loss asks for; "
        f"a network with `roles`, or {key}.stages=[…] for one of torchvision or timm, is accepted"
    )
