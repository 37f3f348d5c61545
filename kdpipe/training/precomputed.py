"""Outputs of frozen networks (a teacher's logits, a backbone's features), computed once and kept on disk."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdpipe.data import ImageDataset, PerImageValues
from kdpipe.data.augmentation import Views
from kdpipe.evaluation.exam import require_finite
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.weights import weights_digest
from kdpipe.settings.identity import RESULTS
from kdpipe.system.disk_cache import META, array_digest, ensure_entry, mapped_array, new_array, read_meta
from kdpipe.system.hardware import Hardware
from kdpipe.system.progress import progress
from kdpipe.training.teacher import FileTeacher, NetworkTeacher, Teacher

log = logging.getLogger("kdpipe")

ARRAY = "outputs.npy"


class TooLargeError(ValueError):
    """Outputs larger than an entry may be."""


@dataclass(frozen=True)
class OutputRequest:
    """Which outputs of a frozen network are wanted.

    Attributes:
        name: "logits", with the roles of features that come with them, or "features".
        forward: from uint8 images [N, C, H, W] to float [N, …].
        positions: of the images in the data set, int64 [n], sorted.
        views: the views of each image; None for the images as stored.
        places: the submodules of each role.
    """

    name: str
    network_name: str
    classifier: Classifier | Ensemble
    forward: Callable[[Tensor], Tensor]
    data: ImageDataset
    positions: Tensor
    views: Views | None = None
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def number_of_views(self) -> int:
        return self.views.number or 1 if self.views else 1

    def key(self, hardware: Hardware) -> str:
        """A hash of everything that the outputs depend on, as 16 hex digits."""
        head = str(self.classifier.network.head_name) if self.name == "features" else None
        parts = [
            RESULTS,
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


def precomputed_outputs(
    request: OutputRequest, folder: Path, max_gb: float, hardware: Hardware, level: int = logging.INFO
) -> list[PerImageValues]:
    """The outputs for each view, from an entry of `folder`; if it is missing or damaged, the network runs over the
    images once. Processes that need the same entry at the same time do the work once.

    Args:
        level: of the log line that says where the outputs are from.

    Raises:
        TooLargeError: they would take more than `max_gb` (of 10⁹ bytes).
    """
    with torch.no_grad():
        sample = request.forward(request.data.images[request.positions[:2]].to(hardware.device))
    shape = (request.number_of_views, len(request.positions), *sample.shape[1:])
    gigabytes = 4 * np.prod(shape, dtype=float) / 1e9
    if gigabytes > max_gb:
        raise TooLargeError(f"{request.about()} would take {gigabytes:.3g} GB")
    entry = folder / request.key(hardware)
    origin = "from the cache"

    def make(folder: Path) -> None:
        nonlocal origin
        started = time.perf_counter()
        compute_outputs(request, shape, folder, hardware)
        origin = f"computed in {time.perf_counter() - started:.1f} s and cached"

    ensure_entry(entry, partial(is_intact, shape=shape), make)
    log.log(level, "%s: %s", request.about(), origin)
    outputs = mapped_array(entry / ARRAY)
    return [PerImageValues(request.positions, view) for view in outputs]


def precomputed_features(
    model: Classifier, name: str, data: ImageDataset, folder: Path, max_gb: float, hardware: Hardware
) -> ImageDataset:
    """The data set with the features of the model's frozen backbone in place of the images, to train its head on.

    Raises:
        TooLargeError: they would take more than `max_gb` (of 10⁹ bytes).
    """
    positions = torch.cat(list(data.splits.values())).sort().values
    model.eval()
    request = OutputRequest("features", name, model, model.features, data, positions)
    (features,) = precomputed_outputs(request, folder, max_gb, hardware)
    return replace(data, images=features)


def logits_of_test_images(
    teacher: Teacher, name: str, data: ImageDataset, folder: Path, hardware: Hardware
) -> Tensor | None:
    """A teacher's logits for the test images, float32 [n, classes]; None where it cannot answer for all of them.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    positions = data.splits["test"]
    if not teacher.covers(positions):
        return None
    known = logits_of_teacher(teacher, name, data, positions.sort().values, folder, hardware)
    return require_finite(f"the teacher {name}", known[positions].clone())


def logits_of_teacher(
    teacher: Teacher,
    name: str,
    data: ImageDataset,
    positions: Tensor,
    folder: Path,
    hardware: Hardware,
    level: int = logging.INFO,
) -> PerImageValues:
    """A teacher's logits for some images that it covers, int64 [n], sorted: those of its file, or of its network, kept
    in `folder`.

    Args:
        level: of the log line that says where those of a network are from.
    """
    if isinstance(teacher, FileTeacher):
        return teacher.answers
    assert isinstance(teacher, NetworkTeacher)
    request = OutputRequest("logits", name, teacher.classifier, teacher.classifier, data, positions)
    (known,) = precomputed_outputs(request, folder, math.inf, hardware, level)
    return known


@torch.no_grad()
def compute_outputs(request: OutputRequest, shape: tuple[int, ...], folder: Path, hardware: Hardware) -> None:
    """Write the outputs, float32 [views, n, …], and their description."""
    outputs = new_array(folder / ARRAY, shape, np.float32)
    digest = hashlib.sha256()
    data = request.data
    with progress(request.name, shape[0] * shape[1]) as bar:
        for view in range(shape[0]):
            draws = request.views.draws(view + 1) if request.views else None
            done = 0
            for batch in request.positions.split(hardware.inference_batch_size):
                images = data.images[batch].to(hardware.device)
                if request.views and draws is not None:
                    images = request.views.augment(images, draws[batch].to(hardware.device))
                with hardware.autocast():
                    values = request.forward(images).float().cpu().numpy()
                outputs[view, done : done + len(batch)] = values
                digest.update(np.ascontiguousarray(values).data)
                done += len(batch)
                bar.advance(len(batch))
    outputs.flush()
    (folder / META).write_text(json.dumps({"about": request.about(), "sha256": digest.hexdigest()}))


def is_intact(entry: Path, shape: tuple[int, ...]) -> bool:
    """Whether an entry holds what was written: float32 of that shape."""
    meta = read_meta(entry)
    try:
        content = np.lib.format.open_memmap(entry / ARRAY, mode="r")
        digest = array_digest(entry / ARRAY)
    except Exception:  # NumPy's reader of headers raises all kinds
        return False
    return (content.shape, content.dtype) == (shape, np.float32) and digest == meta.get("sha256")
