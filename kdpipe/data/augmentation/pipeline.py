"""Several augmentations, one after the other."""

from collections.abc import Sequence

from torch import Tensor

from kdpipe.data.augmentation.drawn import Augmentation, number_of_draws, steps_of
from kdpipe.settings.errors import ConfigError


class Pipeline:
    """Each step augments what the one before it returns, with random numbers of its own.

    Raises:
        ConfigError: there is no step, or one is no augmentation.
    """

    def __init__(self, steps: Sequence[Augmentation]) -> None:
        expected = "a list with at least one augmentation, such as [crop_flip,trivial_augment]"
        if not isinstance(steps, list | tuple) or not steps:
            raise ConfigError("steps", steps, expected)
        for number, step in enumerate(steps):
            if not callable(step):
                raise ConfigError(f"steps.{number}", step, "an augmentation")
        self.steps = tuple(inner for step in steps for inner in steps_of(step))
        self.draws = sum(map(number_of_draws, self.steps))

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        columns = draws.split([number_of_draws(step) for step in self.steps], dim=1)
        for number, (step, own) in enumerate(zip(self.steps, columns, strict=True)):
            try:
                images = step(images, own)
            except ConfigError as error:  # of images that a step cannot take
                raise error.under(f"steps.{number}") from error
        return images
