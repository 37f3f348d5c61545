"""A network as a function from raw images to logits, whether it is stored in an exported file or in a run."""

import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn

from kdpipe import __version__
from kdpipe.assembly.finished_runs import FinishedRun, blank_images, open_run
from kdpipe.assembly.networks import build_network
from kdpipe.export.formats import INT8, ONNX, PROGRAM, SUFFIXES
from kdpipe.export.sources import fitted_temperature
from kdpipe.models.weights import check_class_names, load_state, metadata_in, read_weights
from kdpipe.runs.names import CONFIG
from kdpipe.settings.addresses import WEIGHTS
from kdpipe.settings.errors import flat
from kdpipe.settings.saved import read_network_settings
from kdpipe.settings.values import Resize
from kdpipe.tracking import RunStore

METADATA_FILE = "about.json"  # within a .pt2 file
BATCH = 64  # images per forward pass
# A file that claims a longer side in pixels, or a more extreme temperature, is damaged.
LARGEST_SIDE = 8192
LEAST_TEMPERATURE = 0.01

Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Predictor:
    """A network that takes and returns arrays.

    Attributes:
        name: the file or run that it was opened from.
        forward: from raw images, uint8 [N, C, H, W], to logits, float32 [N, classes]; N must fit into memory.
        class_names: in the order of the logits.
        image_shape: (C, H, W) of the images that it takes.
        resize: how photos become images of that shape.
        temperature: probabilities are softmax(logits / temperature).
    """

    name: str
    forward: Forward
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    temperature: float = 1.0
    resize: Resize = "squeeze"

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits [N, classes] of uint8 images [N, C, H, W], batch by batch."""
        batches = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
        return np.concatenate([self.forward(batch) for batch in batches])

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Probabilities [N, classes] of uint8 images [N, C, H, W].

        Raises:
            ValueError: some logits are not finite.
        """
        logits = self.logits(images).astype(np.float64) / self.temperature
        if not np.isfinite(logits).all():
            raise ValueError(f"{self.name}: its logits are not finite; the file is damaged")
        return softmax(logits, axis=1)


def model_metadata(run: FinishedRun) -> dict[str, str]:
    """What is stored in each exported file, and read again when it is opened."""
    metadata = {
        "class_names": json.dumps(run.class_names, ensure_ascii=False),
        "image_shape": "x".join(map(str, run.image_shape)),
        "preprocessing": "inside: takes raw uint8 images [batch, channels, height, width] in RGB order (or grey), "
        "0 to 255, gives logits",
        "kdpipe.run": run.record.id,
        "kdpipe.weights": run.address,
        "kdpipe.version": __version__,
    }
    if (temperature := fitted_temperature(run)) != 1:
        metadata["temperature"] = repr(temperature)
    if run.resize != "squeeze":
        metadata["resize"] = run.resize
    return metadata


def _parse_metadata(
    source: str, metadata: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[int, int, int], float, Resize]:
    """The class names, image shape, temperature and resizing that a file claims."""
    try:
        class_names = json.loads(metadata["class_names"])
        channels, height, width = map(int, metadata["image_shape"].split("x"))
        temperature = float(metadata.get("temperature", 1))
        resize = metadata.get("resize", "squeeze")
        valid = (
            isinstance(class_names, list)
            and all(isinstance(name, str) for name in class_names)
            and channels in (1, 3)
            and 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE
            and LEAST_TEMPERATURE <= temperature <= 1 / LEAST_TEMPERATURE
            and resize in get_args(Resize)
        )
    except (KeyError, ValueError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(
            f"{source}: its metadata lacks valid class names or image shape; expected a file written by "
            "python -m kdpipe.export"
        )
    return tuple(class_names), (channels, height, width), temperature, cast(Resize, resize)


def _described_predictor(source: str, forward: Forward, metadata: Mapping[str, str]) -> Predictor:
    """A file's network, described by its metadata; a forward pass of two black images checks that they match."""
    predictor = Predictor(source, forward, *_parse_metadata(source, metadata))
    images, classes = np.zeros((2, *predictor.image_shape), np.uint8), len(predictor.class_names)
    try:
        shape = list(forward(images).shape)
    except Exception as error:  # onnxruntime and PyTorch have many
        raise ValueError(
            f"{source}: it rejects images of the shape in its metadata, uint8 {list(images.shape)} ({flat(error, 200)})"
        ) from error
    if shape != [2, classes]:
        raise ValueError(
            f"{source}: its metadata names {classes} classes, but its logits are {shape}; the file is damaged"
        )
    return predictor


def open_predictor(address: str, open_store: Callable[[], RunStore], trust: bool = False) -> Predictor:
    """The network in an exported file or folder, or of a run.

    Args:
        address: a file, a folder (its model.onnx first), or a run: <run id>, runs:/<run id>, runs:/<run id>/epoch_N.
        open_store: called only for a run.
        trust: load files whose loading can run code, as that of .pt2 files can.

    Raises:
        ValueError: there is no such network, or it cannot be read.
    """
    path = Path(address).expanduser()
    if path.is_dir():
        names = [name for name in (ONNX, INT8, WEIGHTS, PROGRAM) if (path / name).is_file()]
        if not names:
            raise ValueError(f"{address}: expected a folder with {ONNX}, {INT8}, {WEIGHTS} or {PROGRAM}")
        path = path / names[0]
    elif not path.is_file():
        return _open_run_predictor(address, open_store)
    if path.suffix == ".onnx":
        return open_onnx(path)
    if path.suffix == ".pt2":
        return open_program(path, trust)
    if path.suffix == ".safetensors":
        return open_weights(path)
    raise ValueError(f"{path}: expected a file that ends with {', '.join(SUFFIXES)}, a folder or a run")


def _open_run_predictor(address: str, open_store: Callable[[], RunStore]) -> Predictor:
    """The network of a run; the error depends on whether the address looks like that of a missing file."""
    is_run, path = address.startswith("runs:/"), Path(address)
    if path.suffix in SUFFIXES or (len(path.parts) > 1 and not is_run):
        raise ValueError(f"{address}: file not found; expected {', '.join(SUFFIXES)}, a folder or a run")
    try:
        run = open_run(address, open_store())
    except ValueError as error:
        if is_run:
            raise
        raise ValueError(
            f"{address}: no file or folder has this name, and it cannot be opened as a run: {error}"
        ) from error
    forward = numpy_forward(run.classifier)
    return Predictor(run.address, forward, run.class_names, run.image_shape, fitted_temperature(run), run.resize)


def numpy_forward(network: nn.Module) -> Forward:
    """A PyTorch network as a function of arrays."""

    @torch.inference_mode()
    def forward(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return network(torch.from_numpy(images)).float().numpy()

    return forward


def require_packages(what: str, *modules: str) -> None:
    """Raise ValueError, with the command that installs them, where packages are missing."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{what}: requires {', '.join(missing)}; install with pip install -e '.[onnx]'")


def open_onnx(path: Path, threads: int | None = None) -> Predictor:
    """An exported ONNX file. Loading it runs no code, and reads no other file.

    Args:
        threads: of the CPU that it may use; None for all.

    Raises:
        ValueError: onnxruntime is not installed, or the file is not readable or not an exported run.
    """
    require_packages(str(path), "onnx", "onnxruntime")
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    # Otherwise its threads keep spinning after each call, and slow down whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        model = onnx.load(path, load_external_data=False)
        if any(map(onnx.external_data_helper.uses_external_data, _constant_tensors(model))):
            raise ValueError("its weights are in another file, which is not read")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # protobuf and onnxruntime have errors of their own
        raise ValueError(f"{path}: not a readable ONNX file ({flat(error, 300)})") from error
    input_name = session.get_inputs()[0].name if session.get_inputs() else ""

    def forward(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return session.run(None, {input_name: images})[0]

    return _described_predictor(str(path), forward, session.get_modelmeta().custom_metadata_map)


def _constant_tensors(message: Any) -> Iterator[Any]:
    """All tensors in a part of an ONNX model, wherever they are: in graphs, attributes of nodes, functions."""
    for field, value in message.ListFields():
        for part in [value] if hasattr(value, "ListFields") else value if field.message_type else ():
            yield from [part] if field.message_type.name == "TensorProto" else _constant_tensors(part)


def open_program(path: Path, trust: bool) -> Predictor:
    """A program saved by torch.export.

    Raises:
        ValueError: it is not trusted, not readable, or not an exported run.
    """
    if not trust:
        # torch.export.load unpickles whatever the file lists, and evaluates its size formulas.
        raise ValueError(
            f"{path}: loading a .pt2 file can run code hidden in it; use --trust if you know where it comes from, or "
            f"{ONNX} or {WEIGHTS} of the same export, which run none"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a file of torch.export.save")
    extra_files = {METADATA_FILE: ""}
    try:
        program = torch.export.load(str(path), extra_files=extra_files)
        metadata = json.loads(extra_files[METADATA_FILE] or "{}")
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path}: not readable ({flat(error, 300)})") from error
    return _described_predictor(str(path), numpy_forward(program.module()), metadata)


def open_weights(path: Path) -> Predictor:
    """Weights in safetensors, in a network built from the run's config next to them.

    Raises:
        ValueError: the config is missing or not allowed, or the weights are those of another network.
    """
    file = path.with_name(CONFIG)
    if not file.is_file():
        raise ValueError(f"{path}: {CONFIG} next to it is missing, which describes its network")
    state, class_names = read_weights("file", path)
    known, image_shape, temperature, resize = _parse_metadata(str(path), metadata_in(path))
    model = read_network_settings(file)
    classifier = build_network("model", model, blank_images(known, image_shape), freeze="none")
    check_class_names("file", str(path), class_names, known)
    load_state("file", str(path), classifier.network, state, str(model.name), len(known))
    return Predictor(str(path), numpy_forward(classifier.eval()), known, image_shape, temperature, resize)
