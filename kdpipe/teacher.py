"""The frozen network that teaches, and its answers, worked out once where every epoch sees the same images."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Self

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdpipe import __version__
from kdpipe.data import ImageDataset
from kdpipe.evaluate import BATCH_SIZE
from kdpipe.models import Classifier
from kdpipe.models.weights import weights_digest
from kdpipe.progress import progress

log = logging.getLogger("kdpipe")


class Teacher(nn.Module):
    """Cannot be trained by accident: no gradients, and in evaluation mode whatever `train()` is called around it."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier: Classifier = classifier.requires_grad_(False).eval()
        self._known: tuple[Tensor, Tensor] | None = None  # positions in the data set, sorted, and their logits

    def train(self, mode: bool = True) -> Self:
        return self

    def remember(self, positions: Tensor, logits: Tensor) -> None:
        """From now on answer for the images at these positions, int64 [N], sorted, with logits [N, classes]."""
        self._known = (positions, logits)

    # Not inference_mode: a loss may save the teacher's outputs for its backward pass.
    @torch.no_grad()
    def forward(self, images: Tensor, indices: Tensor) -> Tensor:
        """Logits [N, classes] of uint8 images [N, C, H, W] at the positions `indices`, int64 [N], of the data set."""
        if self._known:
            positions, logits = self._known
            return logits[torch.searchsorted(positions, indices)].to(images.device)
        answer: Tensor = self.classifier(images)
        return answer


def teach_from_cache(
    teacher: Teacher, data: ImageDataset, folder: Path, device: torch.device, autocast: torch.autocast, precision: str
) -> None:
    """Let the teacher answer for the training images, as they are stored, from a file in `folder`; where it is missing
    or damaged the network runs over them once. Processes that need the same file at once do that work once."""
    positions = data.splits["train"].sort().values
    entry = outputs_key(teacher, data, positions, precision)
    file = folder / f"{entry}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        logits = read_outputs(file)
        if logits is None:
            logits = compute_outputs(teacher, data, positions, device, autocast)
            write_outputs(file, logits)
            log.info("teacher: answers for %s training images worked out and kept", f"{len(positions):,}")
        else:
            log.info("teacher: answers for %s training images from the cache", f"{len(positions):,}")
    teacher.remember(positions, logits)


def outputs_key(teacher: Teacher, data: ImageDataset, positions: Tensor, precision: str) -> str:
    """All that a teacher's answers depend on, as 16 hex digits."""
    classifier = teacher.classifier
    parts = [
        __version__,
        repr(classifier.network),
        weights_digest(classifier.network),
        classifier.image_size,
        classifier.mean.flatten().tolist(),
        classifier.std.flatten().tolist(),
        data.fingerprint,
        hashlib.sha256(positions.numpy().tobytes()).hexdigest(),
        precision,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def compute_outputs(
    teacher: Teacher, data: ImageDataset, positions: Tensor, device: torch.device, autocast: torch.autocast
) -> Tensor:
    """The teacher's logits, float [N, classes], for the images at `positions`."""
    answers = []
    with progress("teacher", len(positions)) as bar:
        for batch in positions.split(BATCH_SIZE):
            with autocast:
                answers.append(teacher(data.images[batch].to(device), batch).float().cpu())
            bar.advance(len(batch))
    return torch.cat(answers)


def read_outputs(file: Path) -> Tensor | None:
    """The logits in a file; None where there is none, or not as it was written."""
    try:
        with safe_open(file, framework="pt") as content:
            logits: Tensor = content.get_tensor("logits")
            whole = (content.metadata() or {}).get("sha256") == _checksum(logits)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError):
        whole = False
    if not whole:
        log.warning("%s is damaged: the teacher's answers are worked out again", file)
        return None
    return logits


def write_outputs(file: Path, logits: Tensor) -> None:
    """Write logits with their checksum; whole or not at all."""
    temporary = file.with_suffix(".tmp")
    save_file({"logits": logits}, temporary, metadata={"sha256": _checksum(logits)})
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(file)


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
