"""What a frozen network says of the images, worked out once and kept, memory-mapped."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdpipe import __version__
from kdpipe.data import ImageDataset, PerImageValues
from kdpipe.data.augmentation import Views
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.weights import weights_digest
from kdpipe.system.disk_cache import META, ensure_entry, mapped_array, new_array, read_meta
from kdpipe.system.hardware import Hardware
from kdpipe.system.progress import progress

log = logging.getLogger("kdpipe")

ARRAY = "outputs.npy"


class TooLargeError(ValueError):
    """More than an entry may hold."""


@dataclass(frozen=True)
class Question:
    """What is asked of a frozen network.

    Attributes:
        name: "logits", with the roles that are asked for, or "features".
        answer: from uint8 images [N, C, H, W] to float [N, …].
        positions: of the images in the data set, int64 [n], sorted.
        views: the views of each image; None for the images as they are stored.
        places: the submodules of each role that is asked for.
    """

    name: str
    network_name: str
    classifier: Classifier | Ensemble
    answer: Callable[[Tensor], Tensor]
    data: ImageDataset
    positions: Tensor
    views: Views | None = None
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def number_of_views(self) -> int:
        return self.views.number or 1 if self.views else 1

    def key(self, hardware: Hardware) -> str:
        """All that the answers depend on, as 16 hex digits."""
        head = str(self.classifier.network.head_name) if self.name == "features" else None
        parts = [
            __version__,
            self.name,
            self.places,
            repr(self.classifier),
            weights_digest(self.classifier.network, without=head),
            self.data.fingerprint,
            self.data.unlabelled,
            hashlib.sha256(self.positions.numpy().tobytes()).hexdigest(),
            [self.views.described, self.views.number] if self.views else None,
            hardware.device.type,
            hardware.precision,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def about(self) -> str:
        views = f", {self.number_of_views} views" if self.views else ""
        return f"{self.name} of {self.network_name} for {len(self.positions):,} images of {self.data.name}{views}"


def known_outputs(
    question: Question, folder: Path, max_gb: float, hardware: Hardware, level: int = logging.INFO
) -> list[PerImageValues]:
    """The answers for each view, from an entry of `folder`; where it is missing or damaged the network runs over the
    images once. Processes that need the same entry at once do that work once.

    Args:
        level: of the line in the log that says where they are from.

    Raises:
        TooLargeError: they would take more than `max_gb` (of 10⁹ bytes).
    """
    with torch.no_grad():
        answered = question.answer(question.data.images[question.positions[:2]].to(hardware.device))
    shape = (question.number_of_views, len(question.positions), *answered.shape[1:])
    gigabytes = 4 * np.prod(shape, dtype=float) / 1e9
    if gigabytes > max_gb:
        raise TooLargeError(f"{question.about()} would take {gigabytes:.3g} GB")
    entry = folder / question.key(hardware)
    told = "from the cache"

    def make(folder: Path) -> None:
        nonlocal told
        started = time.perf_counter()
        work_out(question, shape, folder, hardware)
        told = f"worked out in {time.perf_counter() - started:.1f} s and kept"

    ensure_entry(entry, partial(is_whole, shape=shape), make)
    log.log(level, "%s: %s", question.about(), told)
    outputs = mapped_array(entry / ARRAY)
    return [PerImageValues(question.positions, view) for view in outputs]


def features_of(
    model: Classifier, name: str, data: ImageDataset, folder: Path, max_gb: float, hardware: Hardware
) -> ImageDataset:
    """The data set with what the model's frozen backbone makes of its images in place of the images: what its head
    trains on.

    Raises:
        TooLargeError: they would take more than `max_gb` (of 10⁹ bytes).
    """
    positions = torch.cat(list(data.splits.values())).sort().values
    model.eval()
    (features,) = known_outputs(
        Question("features", name, model, model.features, data, positions), folder, max_gb, hardware
    )
    return replace(data, images=features)


@torch.no_grad()
def work_out(question: Question, shape: tuple[int, ...], folder: Path, hardware: Hardware) -> None:
    """Write the answers, float32 [views, n, …], and what they are."""
    outputs = new_array(folder / ARRAY, shape, np.float32)
    digest = hashlib.sha256()
    data = question.data
    with progress(question.name, shape[0] * shape[1]) as bar:
        for view in range(shape[0]):
            draws = question.views.draws(view + 1) if question.views else None
            done = 0
            for batch in question.positions.split(hardware.inference_batch_size):
                images = data.images[batch].to(hardware.device)
                if question.views and draws is not None:
                    images = question.views.augment(images, draws[batch].to(hardware.device))
                with hardware.autocast():
                    answers = question.answer(images).float().cpu().numpy()
                outputs[view, done : done + len(batch)] = answers
                digest.update(np.ascontiguousarray(answers).data)
                done += len(batch)
                bar.advance(len(batch))
    outputs.flush()
    (folder / META).write_text(json.dumps({"about": question.about(), "sha256": digest.hexdigest()}))


def is_whole(entry: Path, shape: tuple[int, ...]) -> bool:
    """Whether an entry holds what was written: float32 of that shape."""
    meta = read_meta(entry)
    try:
        content = np.lib.format.open_memmap(entry / ARRAY, mode="r")
        digest = hashlib.sha256()
        for view in content:
            digest.update(np.ascontiguousarray(view).data)
    except Exception:  # NumPy's reader of headers raises whatever it stumbles over
        return False
    return (content.shape, content.dtype) == (shape, np.float32) and digest.hexdigest() == meta.get("sha256")
