"""A network's outputs for a batch: logits, and the features that a loss needs, by role."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROLES = ("stages", "preactivations", "embedding")


@dataclass(frozen=True)
class Outputs:
    """A network's outputs for N images; of the features, those that were requested."""

    logits: Tensor  # float [N, classes]
    stages: tuple[Tensor, ...] = ()  # each stage's output, float [N, C, H, W]
    preactivations: tuple[Tensor, ...] = ()  # the same before the stage's last ReLU
    embedding: Tensor | None = None  # float [N, D]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.logits, *self.stages, *self.preactivations, *([] if self.embedding is None else [self.embedding])]

    def pack(self) -> Tensor:
        """Everything as one row per image, float [N, F]; just the logits where there are no features."""
        return torch.cat([tensor.flatten(1) for tensor in self.tensors], dim=1)

    def unpack(self, rows: Tensor) -> "Outputs":
        """Rows from `pack`, back in the shapes of these outputs."""
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
    """A head's input as vectors [N, D]; maps [N, C, H, W] are averaged over their positions."""
    return tensor.mean(dim=(2, 3)) if tensor.ndim == 4 else tensor.flatten(1)


def wide(tensor: Tensor) -> Tensor:
    """In at least float32: sums over classes and T² overflow in half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
