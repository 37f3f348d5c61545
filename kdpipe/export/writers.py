"""Writers of the export formats, with the preprocessing inside."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch.export import Dim, ExportedProgram

from kdpipe.assembly.finished_runs import FinishedRun
from kdpipe.export.predictor import METADATA_FILE
from kdpipe.export.sources import public_settings
from kdpipe.models import Classifier
from kdpipe.settings.errors import first_line
from kdpipe.system.silence import quiet


def trace_classifier(classifier: Classifier, image_shape: tuple[int, int, int]) -> ExportedProgram:
    """The network as a graph, with a dynamic batch size.

    Raises:
        ValueError: the network cannot be traced.
    """
    # Black images, since programs keep their example; two, because torch.export specialises on a size of 1.
    example = torch.zeros(2, *image_shape, dtype=torch.uint8)
    classifier.requires_grad_(False)
    try:
        with quiet():
            program = torch.export.export(classifier, (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
    except Exception as error:  # the tracer has many of its own
        raise ValueError(f"torch.export cannot trace it ({type(error).__name__}: {first_line(error)})") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # file names of this machine
    return program


def write_onnx(program: ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    """model.onnx: input `images`, uint8 [batch, C, H, W]; output `logits`, float32 [batch, classes]."""
    with quiet():
        exported = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
        assert exported is not None
        model = exported.model_proto
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == symbol:
                size.dim_param = "batch"
    # The exporter's own metadata contains file names of this machine, and makes up a tenth of a small file.
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    save_onnx(model, file, metadata)


def write_answering(exported: Path, file: Path) -> None:
    """An exported ONNX file that answers in words and probabilities too, from the names and the temperature in its
    metadata: outputs `class` [batch] (text), `probabilities` [batch, classes], `logits` [batch, classes] and
    `class_names` [classes], the order of both. It is ONNX alone, so whoever serves it runs no code of ours."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(exported)
    graph, metadata = model.graph, {entry.key: entry.value for entry in model.metadata_props}
    names = json.loads(metadata["class_names"])
    temperature = np.array(float(metadata.get("temperature", 1)), np.float32)
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(names, object), "answer.names"),
            numpy_helper.from_array(temperature, "answer.temperature"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Div", ["logits", "answer.temperature"], ["answer.scaled"]),
            helper.make_node("Softmax", ["answer.scaled"], ["probabilities"], axis=1),
            helper.make_node("ArgMax", ["logits"], ["answer.likeliest"], axis=1, keepdims=0),
            helper.make_node("Gather", ["answer.names", "answer.likeliest"], ["class"], axis=0),
            helper.make_node("Identity", ["answer.names"], ["class_names"]),
        ]
    )
    words, numbers, size = TensorProto.STRING, TensorProto.FLOAT, len(names)
    graph.output.extend(
        [
            helper.make_tensor_value_info("class", words, ["batch"]),
            helper.make_tensor_value_info("probabilities", numbers, ["batch", size]),
            helper.make_tensor_value_info("class_names", words, [size]),
        ]
    )
    save_onnx(model, file, metadata)


def save_onnx(model: Any, file: Path, metadata: dict[str, str]) -> None:
    """Save an ONNX model with this metadata alone."""
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    model.producer_name, model.producer_version = "kdpipe", metadata["kdpipe.version"]
    onnx.save(model, file)


def write_program(program: ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    """model.pt2, for torch.export.load."""
    with quiet():
        torch.export.save(program, str(file), extra_files={METADATA_FILE: json.dumps(metadata)})


def write_weights(run: FinishedRun, file: Path, metadata: dict[str, str]) -> None:
    """model.safetensors, which needs config.yaml next to it."""
    state = {name: tensor.detach().contiguous() for name, tensor in run.classifier.network.state_dict().items()}
    save_file(state, file, metadata=metadata)


def portable_config(run: FinishedRun) -> str:
    """The run's composed config as YAML, without folders of this machine."""
    return yaml.safe_dump(strip_folders(public_settings(run)), sort_keys=False, allow_unicode=True)


def strip_folders(value: Any) -> Any:
    """The same settings, with absolute paths reduced to their last part."""
    if isinstance(value, dict):
        return {key: strip_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [strip_folders(part) for part in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):  # noqa: PTH117
        return Path(value).name
    return value
