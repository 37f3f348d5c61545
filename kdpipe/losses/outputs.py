"""What a network makes of images: its logits, and the features that a loss may ask for by role."""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def as_embedding(tensor: Tensor) -> Tensor:
    """[N, D] of what a head is given; maps [N, C, H, W] are averaged over their positions."""
    return tensor.mean(dim=(2, 3)) if tensor.ndim == 4 else tensor.flatten(1)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums over classes and T² overflow in half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
