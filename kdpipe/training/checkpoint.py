"""Weights on disk, and all that a training needs to go on from where it was."""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from kdpipe.models.weights import State
from kdpipe.system.files import fsync_folder, write_atomically

log = logging.getLogger("kdpipe")

KEPT = 2


def copy_state(module: nn.Module) -> State:
    """The module's state as it is now, out of reach of further training."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save_weights(network: nn.Module, path: Path, class_names: Sequence[str]) -> None:
    """Write a network's weights as safetensors, class names among its metadata; whole or not at all, and the same
    bytes for the same weights."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # More than one entry would come in any order.
    write_atomically(path, save(state, metadata={"class_names": json.dumps(list(class_names))}))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Keep `state` (tensors and plain values, nested) in a new file of `folder`, and the one before; older ones go.

    The file's name has the SHA-256 of its content, so that a torn or damaged one is known.

    Raises:
        OSError: with the file's name; what was there before is intact.
    """
    if not folder.is_dir():
        folder.mkdir()
        fsync_folder(folder.parent)
    content = io.BytesIO()
    torch.save(state, content)
    before = _files(folder)
    number = 1 + max((_number(file) for file in before), default=0)
    write_atomically(folder / f"{number:06}-{digest(content.getbuffer())}.pt", content.getbuffer())
    for file in before[KEPT - 1 :]:
        file.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state in `folder` that is whole; None where there is none. No code in a file is run.

    Raises:
        ValueError: a whole file that this version of PyTorch does not read.
    """
    for file in _files(folder):
        content = file.read_bytes()
        if not file.stem.endswith(f"-{digest(content)}"):
            log.warning("%s is torn or damaged: the checkpoint before it is taken, if there is one", file)
            continue
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"no checkpoint, but {type(state).__name__}")
        except MemoryError:
            raise
        except Exception as error:  # the unpickler raises whatever it stumbles over
            reason = str(error).split("\n")[0]
            raise ValueError(f"{file}: not readable ({reason}); train.resume=never trains anew") from error
        return state
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove what `save_checkpoint` wrote, and the folder where it is empty then."""
    for file in [*_files(folder), *folder.glob("*.tmp")]:
        file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _files(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted(folder.glob("[0-9]*-*.pt"), key=_number, reverse=True)


def _number(file: Path) -> int:
    number = file.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
