"""Training images drawn so that all classes are equally likely."""

import torch
from torch import Tensor


def balanced_draw(positions: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """As many positions as there are: those with a label drawn with replacement, each class being equally likely, as by
    PyTorch's WeightedRandomSampler, then those without one, each once.

    Args:
        positions: int64 [n].
        labels: of these positions, int64 [n]; −1 for none.
        draw: on the CPU: the same draws on every device.
    """
    has_label = labels >= 0
    labels = labels[has_label].cpu()
    weights = labels.bincount().double().reciprocal()[labels]
    chosen = torch.multinomial(weights, len(labels), replacement=True, generator=draw)
    return torch.cat([positions[has_label][chosen.to(positions.device)], positions[~has_label]])
