"""Checkpoints from which a training continues."""

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdpipe.models.weights import State
from kdpipe.settings.errors import first_line
from kdpipe.system.files import fsync_folder, write_atomically

log = logging.getLogger("kdpipe")

KEPT = 2


def copy_state(module: nn.Module) -> State:
    """A copy of the module's state, which further training does not change."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Keep `state` (tensors and plain values, nested) in a new file of `folder`, and the one before; delete older ones.

    The name of the file has the SHA-256 of its content, which shows a torn or damaged one. An OSError names the file;
    what was there before is intact.
    """
    if not folder.is_dir():
        folder.mkdir()
        fsync_folder(folder.parent)
    content = io.BytesIO()
    torch.save(state, content)
    before = _files(folder)
    number = 1 + max((_number(file) for file in before), default=0)
    write_atomically(folder / f"{number:06}-{checkpoint_digest(content.getbuffer())}.pt", content.getbuffer())
    for file in before[KEPT - 1 :]:
        file.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest intact state in `folder`; None where there is none. No code in a file is run.

    Raises:
        ValueError: an intact file that this version of PyTorch cannot read.
    """
    for file in _files(folder):
        content = file.read_bytes()
        if not file.stem.endswith(f"-{checkpoint_digest(content)}"):
            log.warning("%s is torn or damaged: using the checkpoint before it, if there is one", file)
            continue
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"expected a checkpoint, found {type(state).__name__}")
        except MemoryError:
            raise
        except Exception as error:  # the unpickler raises whatever it stumbles over
            raise ValueError(f"{file}: not readable ({first_line(error)}); train.resume=never trains anew") from error
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


def checkpoint_digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
