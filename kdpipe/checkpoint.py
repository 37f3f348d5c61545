"""Weights on disk and in memory."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from kdpipe.models.weights import State


def copy_state(module: nn.Module) -> State:
    """The module's state as it is now, out of reach of further training."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save_weights(network: nn.Module, path: Path, class_names: Sequence[str]) -> None:
    """Write a network's weights as safetensors, class names among its metadata; whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary, metadata={"format": "pt", "class_names": json.dumps(list(class_names))})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
