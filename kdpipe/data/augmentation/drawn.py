"""The random numbers behind the views of each epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdpipe.system.randomness import generator

DRAWS = 3  # random numbers for each image, where an augmentation does not say how many it needs
Augmentation = Callable[[Tensor, Tensor], Tensor]


def number_of_draws(augment: Augmentation) -> int:
    """How many random numbers an augmentation needs for each image."""
    return int(getattr(augment, "draws", DRAWS))


def steps_of(augment: Augmentation) -> Sequence[Augmentation]:
    """The augmentations that one consists of, in their order."""
    steps: Sequence[Augmentation] = getattr(augment, "steps", (augment,))
    return steps


@dataclass(frozen=True)
class Views:
    """The augmented views of a data set's images in each epoch: new ones each time or, with a `number` K, the same K
    views over and over, independent of `seed`, so that all seeds can share a teacher's outputs for them."""

    augment: Augmentation
    described: str  # the augmentation and its settings
    num_images: int
    seed: int
    number: int | None = None

    def draws(self, epoch: int) -> Tensor:
        """The random numbers of every image in an epoch, counted from 1: float [num_images, draws] in [0, 1).

        Each step of a pipeline has its own generator, so that a step at the end leaves those before it as they were.
        """
        if self.number is None:
            seed, purpose = self.seed, f"augmentation/{epoch}"
        else:
            seed, purpose = 0, f"view/{(epoch - 1) % self.number}"
        columns = [
            torch.rand(
                self.num_images,
                number_of_draws(step),
                generator=generator(seed, f"{purpose}/{place}" if place else purpose),
            )
            for place, step in enumerate(steps_of(self.augment))
        ]
        return torch.cat(columns, dim=1)


def no_augmentation() -> None:
    """Every epoch sees the same images."""
    return None
