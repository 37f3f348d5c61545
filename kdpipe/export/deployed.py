"""A network as a function from raw images to logits, whatever it is kept in: an exported file or a run."""

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

from kdpipe.assembly import build_network, read_config
from kdpipe.assembly.finished_runs import FinishedRun, blank, open_run
from kdpipe.models.weights import check_class_names, load_state, read_weights
from kdpipe.runs.names import CONFIG
from kdpipe.tracking import RunStore

ONNX, INT8, PROGRAM, WEIGHTS = "model.onnx", "model_int8.onnx", "model.pt2", "model.safetensors"  # in a folder
SUFFIXES = (".onnx", ".pt2", ".safetensors")
INSTALL = "pip install -e '.[onnx]'"
ABOUT = "about.json"  # within a .pt2 file
BATCH = 64  # images that are answered together
# More side in pixels or classes than any network here has: a file that claims them is damaged.
LARGEST_SIDE = 8192
LEAST_TEMPERATURE = 0.01

Answer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Deployed:
    """A network that can be asked.

    Attributes:
        name: what it was opened by.
        answer: from raw images, uint8 [N, C, H, W], to logits, float32 [N, classes]; for as many as fit into memory.
        image_shape: (C, H, W) of the images that it takes.
        temperature: probabilities are softmax(logits / temperature).
    """

    name: str
    answer: Answer
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    temperature: float = 1.0

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits [N, classes] of uint8 images [N, C, H, W], a batch at a time."""
        parts = [self.answer(images[first : first + BATCH]) for first in range(0, len(images), BATCH)]
        return np.concatenate(parts)

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Probabilities [N, classes] of uint8 images [N, C, H, W].

        Raises:
            ValueError: logits that are no finite numbers.
        """
        logits = self.logits(images).astype(np.float64) / self.temperature
        if not np.isfinite(logits).all():
            raise ValueError(f"{self.name}: it answers with logits that are no finite numbers; a damaged file")
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        result: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
        return result


def about(run: FinishedRun, version: str) -> dict[str, str]:
    """What each exported file says of itself, as `described` reads it."""
    channels, height, width = run.image_shape
    said = {
        "class_names": json.dumps(run.class_names, ensure_ascii=False),
        "image_shape": f"{channels}x{height}x{width}",
        "preprocessing": "inside: takes raw uint8 images [batch, channels, height, width] in RGB order (or grey), "
        "0 to 255, gives logits",
        "kdpipe.run": run.record.id,
        "kdpipe.weights": run.address,
        "kdpipe.version": version,
    }
    if (temperature := temperature_of(run)) != 1:
        said["temperature"] = repr(temperature)
    return said


def temperature_of(run: FinishedRun) -> float:
    """The one at which the run's probabilities fit its validation images best; 1 where it has looked for none."""
    temperature = run.metrics.get("model/temperature", 1.0)
    return temperature if 0 < temperature < float("inf") else 1.0


def described(source: str, answer: Answer, said: Mapping[str, str]) -> Deployed:
    """A network with what its file says of it.

    Raises:
        ValueError: it does not say it, or something impossible.
    """
    try:
        class_names = json.loads(said["class_names"])
        channels, height, width = map(int, said["image_shape"].split("x"))
        temperature = float(said.get("temperature", 1))
        whole = (
            isinstance(class_names, list)
            and all(isinstance(name, str) for name in class_names)
            and channels in (1, 3)
            and 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE
            and LEAST_TEMPERATURE <= temperature <= 1 / LEAST_TEMPERATURE
        )
    except (KeyError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(
            f"{source}: this file does not say its classes and the shape of its images; one that "
            "python -m kdpipe.export wrote is accepted"
        )
    return Deployed(source, answer, tuple(class_names), (channels, height, width), temperature)


def tried(deployed: Deployed) -> Deployed:
    """The same, once two black images were answered with as many logits as it has classes.

    Raises:
        ValueError: they were not: the file is not what it says.
    """
    asked = np.zeros((2, *deployed.image_shape), np.uint8)
    try:
        given = list(deployed.answer(asked).shape)
    except Exception as error:  # onnxruntime and PyTorch have many
        raise ValueError(
            f"{deployed.name}: it does not take the images that it says it takes, uint8 {list(asked.shape)} "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    if given != [2, len(deployed.class_names)]:
        names = f"it names {len(deployed.class_names)} classes"
        raise ValueError(f"{deployed.name}: {names} and gives logits {given}; a damaged or tampered file")
    return deployed


def open_deployed(address: str, store: Callable[[], RunStore], trust: bool = False) -> Deployed:
    """The network in an exported file or folder, or of a run.

    Args:
        address: a file, a folder (its model.onnx first), or a run: <run id>, runs:/<run id>, runs:/<run id>/epoch_N.
        store: opens the store, where a run is asked for.
        trust: load files whose loading can run code, which .pt2 files are.

    Raises:
        ValueError: nothing there that can be asked.
    """
    path = Path(address).expanduser()
    if path.is_dir():
        names = [name for name in (ONNX, INT8, WEIGHTS, PROGRAM) if (path / name).is_file()]
        if not names:
            raise ValueError(f"{address}: a folder with {ONNX}, {INT8}, {WEIGHTS} or {PROGRAM} is accepted")
        path = path / names[0]
    elif not path.is_file():
        if path.suffix in SUFFIXES or (len(path.parts) > 1 and not address.startswith("runs:/")):
            raise ValueError(f"{address}: there is no such file; {', '.join(SUFFIXES)}, a folder or a run is accepted")
        try:
            opened = store()
        except ValueError as error:
            if address.startswith("runs:/"):
                raise
            raise ValueError(f"{address}: there is no such file or folder; nor such a run, for {error}") from error
        if not address.startswith("runs:/") and opened.get_run(address) is None:
            raise ValueError(f"{address}: there is no such file or folder, and no such run in {opened.name}")
        return of_run(open_run(address, opened))
    if path.suffix == ".onnx":
        return open_onnx(path)
    if path.suffix == ".pt2":
        return open_program(path, trust)
    if path.suffix == ".safetensors":
        return open_weights(path)
    raise ValueError(f"{path}: {', '.join(SUFFIXES)}, a folder or a run is accepted")


def of_run(run: FinishedRun) -> Deployed:
    return Deployed(run.address, answers_of(run.classifier), run.class_names, run.image_shape, temperature_of(run))


def answers_of(network: nn.Module) -> Answer:
    """A PyTorch network as a function of arrays."""

    @torch.inference_mode()
    def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = network(torch.from_numpy(images)).float().numpy()
        return logits

    return answer


def check_extra(what: str, *modules: str) -> None:
    """Raise ValueError, with the line that installs it, where the extra that this takes is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{what}: this takes {', '.join(missing)}, not installed; {INSTALL} installs what it takes")


def open_onnx(path: Path, threads: int | None = None) -> Deployed:
    """An exported ONNX file; no code in it is run, and no other file is read.

    Args:
        threads: of the CPU that it may use; None for all.

    Raises:
        ValueError: not installed, not readable, or not exported from a run.
    """
    check_extra(str(path), "onnx", "onnxruntime")
    import onnx
    import onnxruntime

    try:
        model = onnx.load(path, load_external_data=False)
        if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in tensors_of(model)):
            raise ValueError("weights in another file, which is not read")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # protobuf and onnxruntime have errors of their own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: not a readable ONNX file ({reason})") from error
    names = [argument.name for argument in session.get_inputs()]

    def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {names[0]: images})[0]
        return logits

    return tried(described(str(path), answer, session.get_modelmeta().custom_metadata_map))


def session_options(threads: int | None) -> Any:
    """onnxruntime's, without its chatter."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    # Its threads would go on spinning after each answer, and take the processor from what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def tensors_of(model: Any) -> Iterator[Any]:
    """All constant tensors of an ONNX model, those within the attributes of nodes and in functions, too."""

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


def open_program(path: Path, trust: bool) -> Deployed:
    """A program of torch.export.

    Raises:
        ValueError: it is not trusted, not readable, or not exported from a run.
    """
    if not trust:
        # torch.export.load unpickles what the file says is to be unpickled, and evaluates its formulas of sizes.
        raise ValueError(
            f"{path}: to load a .pt2 file can run code that somebody put into it; --trust loads one whose origin you "
            f"know, and {ONNX} or {WEIGHTS} of the same export run none"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a file of torch.export.save")
    said = {ABOUT: ""}
    try:
        program = torch.export.load(str(path), extra_files=said)
        text = said[ABOUT]
        description = json.loads(text or "{}")
    except Exception as error:  # whatever the file makes it stumble over
        raise ValueError(f"{path}: not readable ({' '.join(str(error).split())[:300]})") from error
    return tried(described(str(path), answers_of(program.module()), description))


def open_weights(path: Path) -> Deployed:
    """Weights in safetensors with the config of their run beside them, from which the network is built.

    Raises:
        ValueError: no config beside them, one that names what is not accepted, or weights of another network.
    """
    file = path.with_name(CONFIG)
    if not file.is_file():
        raise ValueError(f"{path}: {CONFIG} beside it says which network it is of; there is none")
    state, class_names = read_weights("file", path)
    said = read_metadata(path)
    deployed = described(str(path), lambda images: np.zeros((len(images), 0), np.float32), said)
    model = read_config(file, ["model"]).model
    classifier = build_network("model", model, blank(deployed.class_names, deployed.image_shape), freeze="none")
    check_class_names("file", str(path), class_names, deployed.class_names)
    load_state("file", str(path), classifier.network, state, str(model.name), len(deployed.class_names))
    return described(str(path), answers_of(classifier.eval()), said)


def read_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
