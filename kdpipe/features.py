"""What a loss may ask of a network beside its logits, by role: after each stage, or before the last layer.

A network says in `roles` which of its submodules have them:
    stages: names of the submodules whose outputs [N, C, H, W] are what its stages make of the images, first to last;
    preactivations: names of the last ReLUs of these stages, whose inputs are taken; where a network names none, its
        stages end without one, and what leaves them is taken;
    embedding: the name of the submodule whose input is the representation of an image, [N, D]; its last linear layer.
        Where it is missing the head (`head_name`) is taken.

What the next module changes in place is seen as it is afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ROLES = ("stages", "preactivations", "embedding")


@dataclass(frozen=True)
class Outputs:
    """What a network makes of N images; of the roles, those that were asked for.

    Attributes:
        logits: float [N, classes].
        stages: float [N, C, H, W] each.
        preactivations: the same before each stage's last ReLU.
        embedding: float [N, D].
    """

    logits: Tensor
    stages: tuple[Tensor, ...] = ()
    preactivations: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        embedding = [] if self.embedding is None else [self.embedding]
        return [self.logits, *self.stages, *self.preactivations, *embedding]

    def pack(self) -> Tensor:
        """All of it, a row for each image: float [N, F]; the logits themselves where there is nothing else."""
        return torch.cat([tensor.flatten(1) for tensor in self.tensors], dim=1)

    def unpack(self, rows: Tensor) -> "Outputs":
        """`rows` as `pack` writes them, in the shapes of these outputs."""
        pieces = iter(rows.split([tensor[0].numel() for tensor in self.tensors], dim=1))

        def shaped(like: Tensor) -> Tensor:
            return next(pieces).reshape(len(rows), *like.shape[1:])

        return Outputs(
            shaped(self.logits),
            tuple(map(shaped, self.stages)),
            tuple(map(shaped, self.preactivations)),
            None if self.embedding is None else shaped(self.embedding),
        )


class Observed:
    """A model that is called with images and gives `Outputs`.

    Args:
        model: what is called; it may be a wrapper around the network, or around its head.
        network: where the roles' submodules are; the model itself where it is None.
        roles: of `ROLES`.
        key: where in the config the network stands, for messages ("model" or "teacher").

    Attributes:
        places: the submodules of each role, by name.

    Raises:
        ValueError: the network does not say which of its submodules have a role; or, when it is called, what they give
            is not what the role stands for.
    """

    def __init__(
        self, model: nn.Module, network: nn.Module | None = None, roles: Sequence[str] = (), key: str = "model"
    ) -> None:
        self.model = model
        self.key = key
        self._names: dict[tuple[str, int], str] = {}
        self._caught: dict[tuple[str, int], Tensor] = {}
        self._listening = False
        self._hooks: list[RemovableHandle] = []
        network = network or model
        self.places = {role: [name for name, _ in places(network, role, key)] for role in roles}
        for role in roles:
            for number, (name, of_input) in enumerate(places(network, role, key)):
                self._names[role, number] = name
                self._listen(network.get_submodule(name), (role, number), of_input)

    def _listen(self, module: nn.Module, place: tuple[str, int], of_input: bool) -> None:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._listening:
                self._caught[place] = inputs[0]

        def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._listening:
                self._caught[place] = output

        hook = module.register_forward_pre_hook(before) if of_input else module.register_forward_hook(after)
        self._hooks.append(hook)

    def remove(self) -> None:
        """Leave the network as it was."""
        for hook in self._hooks:
            hook.remove()

    def __call__(self, images: Tensor) -> Outputs:
        """What the network makes of images, in float32 at least."""
        self._caught.clear()
        self._listening = True
        try:
            logits = self.model(images)
        finally:
            self._listening = False
        caught = {place: wide(self._checked(place)) for place in self._names}
        self._caught.clear()

        def of(role: str) -> tuple[Tensor, ...]:
            return tuple(tensor for (name, _), tensor in sorted(caught.items()) if name == role)

        embedding = of("embedding")
        return Outputs(
            wide(logits), of("stages"), of("preactivations"), as_embedding(embedding[0]) if embedding else None
        )

    def _checked(self, place: tuple[str, int]) -> Tensor:
        """What was caught there; a stage's are maps."""
        given: object = self._caught.get(place)
        if isinstance(given, Tensor) and (given.ndim == 4 or place[0] == "embedding"):
            return given
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{self.key}.stages: {self._names[place]} gives {shape}; maps [N, C, H, W] are accepted")


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


def as_embedding(tensor: Tensor) -> Tensor:
    """[N, D] of what a head is given; maps [N, C, H, W] are averaged over their positions."""
    return tensor.mean(dim=(2, 3)) if tensor.ndim == 4 else tensor.flatten(1)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums over classes and T² overflow in half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
