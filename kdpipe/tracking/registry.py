"""MLflow's model registry: exported ONNX files under a name, with signature and alias."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray

from kdpipe.runs.store_address import describe_error, in_store
from kdpipe.settings.errors import ConfigError
from kdpipe.system.silence import quiet
from kdpipe.tracking.run_store import RunStore

FOLDER = "exported"  # among the run's artifacts
DESCRIPTION = (
    "Raw uint8 images in. Out: the likeliest class of each, the probabilities of all classes, softmax(logits / "
    "temperature) with the temperature in a tag of that name, their logits, and class_names, the order of both."
)
NOT_FOUND, EXISTS = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"  # error codes of MLflow


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    alias: str
    uri: str  # of the store, without its password
    image_shape: tuple[int, ...]

    def summary(self) -> str:
        """For a terminal, with a command that predicts."""
        shape = ", ".join(map(str, self.image_shape))
        model = quote(f"models:/{self.name}@{self.alias}")
        predict = f"mlflow models predict -m {model} --env-manager local -i input.json -o answers.json"
        serve = f"mlflow models serve -m {model} --env-manager local"
        return "\n".join(
            [
                f"registered: {self.name} version {self.version}, alias {self.alias}",
                f"to predict: {in_store(self.uri, predict)}",
                f"to serve: {in_store(self.uri, serve)}",
                f'where input.json is {{"inputs": {{"images": IMAGES}}}}, IMAGES nested lists [batch, {shape}] of '
                "numbers from 0 to 255",
            ]
        )


def check_registry(store: RunStore, name: str, alias: str) -> None:
    """Raise ConfigError for a name or an alias that the registry would refuse, and for a store without a registry."""
    if not name.strip() or any(letter in name for letter in "/:"):
        raise ConfigError("--register", name, "a name without / and :")
    if not re.fullmatch(r"[\w-]{1,255}", alias, re.ASCII) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ConfigError("--alias", alias, "letters, digits, - and _, but not latest or v and a number")
    try:
        store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != NOT_FOUND:
            raise ConfigError("--register", name, problem=describe_error(error)) from error


def register(
    store: RunStore,
    run_id: str,
    name: str,
    alias: str,
    file: Path,
    tags: Mapping[str, str],
    example: NDArray[np.uint8],
) -> Registered:
    """Add an exported ONNX file to its run's artifacts, as a new version of a registered model, with an alias.

    The run's status and end time stay as they are.

    Args:
        example: uint8 [2, C, H, W], for the signature.

    Raises:
        ConfigError: the store takes no models, or cannot be written.
    """
    client = store.client
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        folder = f"{FOLDER}/{file.stem}-{digest}"  # a later export must not overwrite this version
        with TemporaryDirectory() as temporary:
            save_model(file, Path(temporary) / "model", example)
            client.log_artifacts(run_id, str(Path(temporary) / "model"), folder)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != EXISTS:
                raise
        version = client.create_model_version(
            name, f"runs:/{run_id}/{folder}", run_id, tags=dict(tags), description=DESCRIPTION
        )
        client.set_registered_model_alias(name, alias, version.version)
    except Exception as error:  # also of requests and artifact stores
        problem = f"{store.name} did not take the model ({describe_error(error)})"
        raise ConfigError("--register", name, problem=problem) from error
    return Registered(name, str(version.version), alias, store.name, example.shape[1:])


def save_model(file: Path, folder: Path, example: NDArray[np.uint8]) -> None:
    """Write an exported ONNX file in MLflow's format, with its signature."""
    import mlflow.onnx
    import onnx

    model = onnx.load(file, load_external_data=False)
    signature = ModelSignature(
        Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]), "images")]),
        Schema([_specification(output) for output in model.graph.output]),
    )
    with quiet():
        mlflow.onnx.save_model(
            model,
            str(folder),
            signature=signature,
            pip_requirements=[f"{name}=={installed(name)}" for name in ("mlflow", "onnx", "onnxruntime", "numpy")],
            save_as_external_data=False,
        )


def _specification(output: Any) -> TensorSpec:
    """The output of an ONNX model in MLflow's terms; a size with a name, such as batch, is any."""
    import onnx

    kind = output.type.tensor_type
    is_text = kind.elem_type == onnx.TensorProto.STRING
    dtype = np.dtype(str) if is_text else onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return TensorSpec(dtype, tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim), output.name)
