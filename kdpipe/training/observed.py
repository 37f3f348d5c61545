"""A network that returns its features along with its logits."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdpipe.losses.outputs import Outputs, as_embedding, wide
from kdpipe.models.roles import places
from kdpipe.settings.errors import ConfigError


class Observed:
    """A model that is called with images and returns `Outputs`.

    Args:
        model: what is called; it may wrap the network, or its head.
        network: where the submodules of the roles are; None for the model itself.
        roles: of `ROLES`.
        key: the section of the config ("model" or "teacher"), for messages.

    Attributes:
        places: the names of the submodules of each role.

    Raises:
        ConfigError: the network does not name the submodules of a role; or, when it is called, they return something
            else than the role stands for.
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
        """Remove the hooks from the network."""
        for hook in self._hooks:
            hook.remove()

    def __call__(self, images: Tensor) -> Outputs:
        """Logits and features of images, in float32 at least."""
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
        """What a submodule returned; a stage returns maps."""
        given: object = self._caught.get(place)
        if isinstance(given, Tensor) and (given.ndim == 4 or place[0] == "embedding"):
            return given
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        problem = f"{self._names[place]} returns {shape}"
        raise ConfigError(f"{self.key}.stages", expected="maps [N, C, H, W]", problem=problem)
