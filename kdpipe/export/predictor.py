"""A network as a function from raw images to logits, whether it is stored in an exported file or in a run."""

import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdpipe import __version__
from kdpipe.assembly.finished_runs import FinishedRun, blank_images, open_run
from kdpipe.assembly.networks import build_network
from kdpipe.export.formats import INT8, ONNX, PROGRAM
from kdpipe.export.sources import fitted_temperature
from kdpipe.models.weights import check_class_names, load_state, read_weights
from kdpipe.runs.names import CONFIG
from kdpipe.settings.addresses import WEIGHTS
from kdpipe.settings.errors import flat
from kdpipe.settings.saved import read_network_settings
from kdpipe.tracking import RunStore

SUFFIXES = (".onnx", ".pt2", ".safetensors")
INSTALL = "pip install -e '.[onnx]'"
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
        temperature: probabilities are softmax(logits / temperature).
    """

    name: str
    forward: Forward
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    temperature: float = 1.0

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
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        result: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
        return result


def model_metadata(run: FinishedRun) -> dict[str, str]:
    """What is stored in each exported file, and read by `parse_metadata`."""
    channels, height, width = run.image_shape
    metadata = {
        "class_names": json.dumps(run.class_names, ensure_ascii=False),
        "image_shape": f"{channels}x{height}x{width}",
        "preprocessing": "inside: takes raw uint8 images [batch, channels, height, width] in RGB order (or grey), "
        "0 to 255, gives logits",
        "kdpipe.run": run.record.id,
        "kdpipe.weights": run.address,
        "kdpipe.version": __version__,
    }
    if (temperature := fitted_temperature(run)) != 1:
        metadata["temperature"] = repr(temperature)
    return metadata


def parse_metadata(source: str, metadata: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[int, int, int], float]:
    """The class names, image shape and temperature that a file claims.

    Raises:
        ValueError: they are missing or impossible.
    """
    try:
        class_names = json.loads(metadata["class_names"])
        channels, height, width = map(int, metadata["image_shape"].split("x"))
        temperature = float(metadata.get("temperature", 1))
        valid = (
            isinstance(class_names, list)
            and all(isinstance(name, str) for name in class_names)
            and channels in (1, 3)
            and 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE
            and LEAST_TEMPERATURE <= temperature <= 1 / LEAST_TEMPERATURE
        )
    except (KeyError, ValueError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(
            f"{source}: its metadata lacks valid class names or image shape; expected a file written by "
            "python -m kdpipe.export"
        )
    return tuple(class_names), (channels, height, width), temperature


def tested(predictor: Predictor) -> Predictor:
    """The same, after a forward pass of two black images.

    Raises:
        ValueError: the file does not match its metadata.
    """
    images = np.zeros((2, *predictor.image_shape), np.uint8)
    try:
        shape = list(predictor.forward(images).shape)
    except Exception as error:  # onnxruntime and PyTorch have many
        raise ValueError(
            f"{predictor.name}: it rejects images of the shape in its metadata, uint8 {list(images.shape)} "
            f"({flat(error, 200)})"
        ) from error
    if shape != [2, len(predictor.class_names)]:
        raise ValueError(
            f"{predictor.name}: its metadata names {len(predictor.class_names)} classes, but its logits are {shape}; "
            "the file is damaged"
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
        return open_run_predictor(address, open_store)
    if path.suffix == ".onnx":
        return open_onnx(path)
    if path.suffix == ".pt2":
        return open_program(path, trust)
    if path.suffix == ".safetensors":
        return open_weights(path)
    raise ValueError(f"{path}: expected a file that ends with {', '.join(SUFFIXES)}, a folder or a run")


def open_run_predictor(address: str, open_store: Callable[[], RunStore]) -> Predictor:
    """The network of a run.

    Raises:
        ValueError: there is no such run, or the address looks like that of a missing file.
    """
    is_run = address.startswith("runs:/")
    path = Path(address)
    if path.suffix in SUFFIXES or (len(path.parts) > 1 and not is_run):
        raise ValueError(f"{address}: file not found; expected {', '.join(SUFFIXES)}, a folder or a run")
    try:
        store = open_store()
    except ValueError as error:
        if is_run:
            raise
        raise ValueError(
            f"{address}: no file or folder has this name, and runs cannot be looked up: {error}"
        ) from error
    if not is_run and store.get_run(address) is None:
        raise ValueError(f"{address}: no file or folder has this name, and no run in {store.name} has this id")
    run = open_run(address, store)
    return predictor_of(run)


def predictor_of(run: FinishedRun) -> Predictor:
    forward = numpy_forward(run.classifier)
    return Predictor(run.address, forward, run.class_names, run.image_shape, fitted_temperature(run))


def numpy_forward(network: nn.Module) -> Forward:
    """A PyTorch network as a function of arrays."""

    @torch.inference_mode()
    def forward(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = network(torch.from_numpy(images)).float().numpy()
        return logits

    return forward


def require_packages(what: str, *modules: str) -> None:
    """Raise ValueError, with the command that installs them, where packages are missing."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{what}: requires {', '.join(missing)}; install with {INSTALL}")


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

    try:
        model = onnx.load(path, load_external_data=False)
        if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in constant_tensors(model)):
            raise ValueError("its weights are in another file, which is not read")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # protobuf and onnxruntime have errors of their own
        raise ValueError(f"{path}: not a readable ONNX file ({flat(error, 300)})") from error
    input_name = session.get_inputs()[0].name if session.get_inputs() else ""

    def forward(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {input_name: images})[0]
        return logits

    metadata = session.get_modelmeta().custom_metadata_map
    return tested(Predictor(str(path), forward, *parse_metadata(str(path), metadata)))


def session_options(threads: int | None) -> Any:
    """Options for onnxruntime: quiet, and good neighbours in a measurement."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    # Otherwise its threads keep spinning after each call, and slow down whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def constant_tensors(model: Any) -> Iterator[Any]:
    """All constant tensors of an ONNX model, including those in attributes of nodes and in functions."""

    def of_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
        for node in nodes:
            for attribute in node.attribute:
                yield attribute.t
                yield from attribute.tensors
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
                    yield from of_graph(graph)

    def of_graph(graph: Any) -> Iterator[Any]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from of_nodes(graph.node)

    yield from of_graph(model.graph)
    for function in model.functions:
        yield from of_nodes(function.node)


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
    return tested(Predictor(str(path), numpy_forward(program.module()), *parse_metadata(str(path), metadata)))


def open_weights(path: Path) -> Predictor:
    """Weights in safetensors, in a network built from the run's config next to them.

    Raises:
        ValueError: the config is missing or not allowed, or the weights are those of another network.
    """
    file = path.with_name(CONFIG)
    if not file.is_file():
        raise ValueError(f"{path}: {CONFIG} next to it is missing, which describes its network")
    state, class_names = read_weights("file", path)
    known, image_shape, temperature = parse_metadata(str(path), read_metadata(path))
    model = read_network_settings(file)
    classifier = build_network("model", model, blank_images(known, image_shape), freeze="none")
    check_class_names("file", str(path), class_names, known)
    load_state("file", str(path), classifier.network, state, str(model.name), len(known))
    return Predictor(str(path), numpy_forward(classifier.eval()), known, image_shape, temperature)


def read_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
