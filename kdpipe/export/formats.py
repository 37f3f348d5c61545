"""A finished run's network written in each format, preprocessing included."""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch.export import Dim, ExportedProgram

from kdpipe.assembly import plain
from kdpipe.assembly.finished_runs import FinishedRun
from kdpipe.export.deployed import ABOUT
from kdpipe.models import Classifier


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings, logs and lines that exporters print of things that users can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def traced(classifier: Classifier, image_shape: tuple[int, int, int]) -> ExportedProgram:
    """The network as a graph, for batches of any size.

    Raises:
        ValueError: its computation cannot be written as a graph.
    """
    # Black images, since programs keep their example; two, because 1 would be taken for the only size.
    example = torch.zeros(2, *image_shape, dtype=torch.uint8)
    classifier.requires_grad_(False)
    try:
        with quiet():
            program = torch.export.export(classifier, (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
    except Exception as error:  # the tracer has many of its own
        reason = str(error).split("\n")[0]
        raise ValueError(f"this network cannot be exported ({type(error).__name__}: {reason})") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # file names of this machine
    return program


def write_onnx(program: ExportedProgram, file: Path, said: dict[str, str]) -> None:
    """model.onnx: input `images`, uint8 [batch, C, H, W]; output `logits`, float32 [batch, classes]."""
    with quiet():
        exported = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
        assert exported is not None
        model = exported.model_proto
    graph = model.graph
    symbols = {graph.input[0].type.tensor_type.shape.dim[0].dim_param: "batch"}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in symbols:
                size.dim_param = symbols[size.dim_param]
    # What the exporter tells of itself has names of files of this machine, and takes a tenth of a small file.
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    write_described(model, file, said)


def write_described(model: Any, file: Path, said: dict[str, str]) -> None:
    """An ONNX model with what it says of itself."""
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, said)
    model.producer_name, model.producer_version = "kdpipe", said["kdpipe.version"]
    onnx.save(model, file)


def write_program(program: ExportedProgram, file: Path, said: dict[str, str]) -> None:
    """model.pt2, for torch.export.load."""
    with quiet():
        torch.export.save(program, str(file), extra_files={ABOUT: json.dumps(said)})


def write_weights(run: FinishedRun, file: Path, said: dict[str, str]) -> None:
    """model.safetensors, and beside it config.yaml, from which the network is built again."""
    state = {name: tensor.detach().contiguous() for name, tensor in run.classifier.network.state_dict().items()}
    save_file(state, file, metadata=said)


def config_of(run: FinishedRun) -> str:
    """The run's composed config, with the names but not the places of what was on this machine."""
    return yaml.safe_dump(without_places(plain(run.config)), sort_keys=False, allow_unicode=True)


def without_places(value: Any) -> Any:
    """The same settings, absolute paths cut down to their last part."""
    if isinstance(value, dict):
        return {key: without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):  # noqa: PTH117
        return Path(value).name
    return value
