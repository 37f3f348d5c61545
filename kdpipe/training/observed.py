"""A network that returns its features along with its logits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdpipe.losses.outputs import Outputs, as_embedding, wide
from kdpipe.models.roles import layout_of, places
from kdpipe.settings.errors import ConfigError
from kdpipe.training.layout import AXES, CHANNELS_FIRST, Axes, axes_by_definition, axes_from_shapes, try_size

Place = tuple[str, int]  # a role, and a number among its submodules


class Observed:
    """A model that is called with images and returns `Outputs`.

    Maps are returned as [N, C, H, W], whatever the order of axes inside the network: the first call finds it out (see
    `kdpipe.training.layout`).

    Args:
        model: what is called; it may wrap the network, or its head.
        network: where the submodules of the roles are; None for the model itself.
        roles: of `ROLES`.
        key: the section of the config ("model" or "teacher"), for messages.

    Raises:
        ConfigError: the network does not name the submodules of a role; or, when it is called, they return something
            else than the role stands for.
    """

    def __init__(
        self, model: nn.Module, network: nn.Module | None = None, roles: Sequence[str] = (), key: str = "model"
    ) -> None:
        self.model = model
        self.key = key
        self._network = network or model
        self._names: dict[Place, str] = {}
        self._takes_input: dict[Place, bool] = {}
        self._axes: dict[Place, Axes] | None = None  # of maps; None before the first call
        self._caught: dict[Place, object] = {}
        self._listening = False
        self._hooks: list[RemovableHandle] = []
        for role in roles:
            for number, (name, of_input) in enumerate(places(self._network, role, key)):
                self._names[role, number], self._takes_input[role, number] = name, of_input
                self._listen(self._network.get_submodule(name), (role, number), of_input)

    @property
    def places(self) -> dict[str, list[str]]:
        """The names of the submodules of each role; after the first call with their axes, if these are rearranged."""
        found: dict[str, list[str]] = {role: [] for role, _ in self._names}
        for place, name in self._names.items():
            axes = (self._axes or {}).get(place, CHANNELS_FIRST)
            found[place[0]].append(name if axes == CHANNELS_FIRST else f"{name} {axes}")
        return found

    @property
    def is_rearranged(self) -> bool:
        """Whether maps inside the network are not [N, C, H, W]; known after the first call."""
        return any(axes != CHANNELS_FIRST for axes in (self._axes or {}).values())

    def _listen(self, module: nn.Module, place: Place, of_input: bool) -> None:
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
        seen: list[Tensor] = []
        is_first = bool(self._names) and self._axes is None
        if is_first:
            hook = self._network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
        with self._listens():
            logits = self.model(images)
        caught = dict(self._caught)
        if is_first:
            hook.remove()
            self._axes = self._find_axes(caught, seen[0])
        self._caught.clear()
        features = {place: wide(self._arranged(place, caught.get(place))) for place in self._names}

        def of(role: str) -> tuple[Tensor, ...]:
            return tuple(tensor for (name, _), tensor in sorted(features.items()) if name == role)

        embedding = of("embedding")
        return Outputs(
            wide(logits), of("stages"), of("preactivations"), as_embedding(embedding[0]) if embedding else None
        )

    @contextmanager
    def _listens(self) -> Iterator[None]:
        """Catch what the submodules take or return inside the block."""
        self._caught.clear()
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def _arranged(self, place: Place, given: object) -> Tensor:
        """What a submodule returned, maps as [N, C, H, W]; a stage returns maps."""
        if isinstance(given, Tensor):
            if axes := (self._axes or {}).get(place):
                return given.permute(axes)
            if place[0] == "embedding":
                return given
        raise self._refusal(place, given)

    def _refusal(self, place: Place, given: object, reason: str = "") -> ConfigError:
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if isinstance(given, Tensor) and given.ndim == 3:
            reason = ", a sequence of tokens"
        key = self.key if place[0] == "embedding" else f"{self.key}.stages"
        return ConfigError(key, expected="maps [N, C, H, W]", problem=f"{self._names[place]} returns {shape}{reason}")

    def _find_axes(self, caught: Mapping[Place, object], seen: Tensor) -> dict[Place, Axes]:
        """The axes of all maps among what was caught, from what a copy of the network makes of images of other sizes.

        Args:
            seen: what the network was called with, float [N, C, H, W].
        """
        here = {place: given for place, given in caught.items() if isinstance(given, Tensor) and given.ndim == 4}
        axes: dict[Place, Axes] = {}
        for place in here:
            module = self._network.get_submodule(self._names[place])
            if known := axes_by_definition(module, self._takes_input[place]):
                axes[place] = known
        if here.keys() == axes.keys():
            return axes
        shapes = []
        for is_taller in (False, True):
            with self._listens():
                try_size(self._network, seen, is_taller)
            shapes.append({place: given.shape for place, given in self._caught.items() if isinstance(given, Tensor)})
        wider, taller = shapes
        for place in here.keys() - axes.keys():
            try:
                found = axes_from_shapes(here[place].shape, wider.get(place), taller.get(place))
            except ValueError:
                raise self._refusal(
                    place, here[place], ", whose axes do not follow an image's height and width"
                ) from None
            if found is None and (declared := layout_of(self._network)):
                found = AXES[declared]
            if found is None:
                reason = ", and which axes are its height and width cannot be tried: it takes images of one size"
                raise self._refusal(place, here[place], reason)
            axes[place] = found
        return axes
