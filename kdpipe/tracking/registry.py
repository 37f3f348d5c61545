"""MLflow's registry of models: exported ONNX files under a name, with their signature and an alias."""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray

from kdpipe.runs.store import describe_error, without_password
from kdpipe.tracking.runs import RunStore

FOLDER = "exported"  # among the run's artifacts
DESCRIPTION = (
    "Raw uint8 images in, logits out, one for each class in the order of the tag class_names (also in the ONNX file's "
    "metadata); probabilities are softmax(logits / temperature), which is a tag, too."
)
ABSENT = "RESOURCE_DOES_NOT_EXIST"
THERE = "RESOURCE_ALREADY_EXISTS"


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    alias: str
    uri: str  # of the store
    image_shape: tuple[int, ...]

    def told(self) -> str:
        """For a terminal, with the command that answers."""
        shape = ", ".join(map(str, self.image_shape))
        return "\n".join(
            [
                f"registered: {self.name} version {self.version}, alias {self.alias}",
                f"it answers: MLFLOW_TRACKING_URI={quote(without_password(self.uri))} mlflow models predict "
                f"-m {quote(f'models:/{self.name}@{self.alias}')} --env-manager local -i input.json -o answers.json",
                f'where input.json is {{"inputs": {{"images": IMAGES}}}}, IMAGES nested lists [batch, {shape}] of '
                "numbers from 0 to 255",
            ]
        )


def check_registry(store: RunStore, name: str, alias: str) -> None:
    """Raise ValueError for a name or an alias that the registry would refuse, and for a store that has none."""
    if not name.strip() or any(letter in name for letter in "/:"):
        raise ValueError(f"--register {name}: a name without / and : is accepted")
    if not re.fullmatch(r"[\w-]{1,255}", alias, re.ASCII) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ValueError(f"--alias {alias}: letters, digits, - and _ are accepted, but not latest, nor v and a number")
    try:
        store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != ABSENT:
            raise ValueError(f"--register {name}: {describe_error(error)}") from error


def register(
    store: RunStore,
    run_id: str,
    name: str,
    alias: str,
    file: Path,
    tags: Mapping[str, str],
    example: NDArray[np.uint8],
) -> Registered:
    """Keep an exported ONNX file among its run's artifacts, as a new version of a registered model with an alias.

    The run itself stays as it is: finished, when it was.

    Args:
        example: uint8 [2, C, H, W], of which the signature is made.

    Raises:
        ValueError: the store takes no models, or cannot be written.
    """
    client = store.client
    try:
        folder = f"{FOLDER}/{file.stem}-{digest(file)}"  # so that a later export leaves what this version has
        with TemporaryDirectory() as temporary:
            save(file, Path(temporary) / "model", example)
            client.log_artifacts(run_id, str(Path(temporary) / "model"), folder)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != THERE:
                raise
        version = client.create_model_version(
            name, f"runs:/{run_id}/{folder}", run_id, tags=dict(tags), description=DESCRIPTION
        )
        client.set_registered_model_alias(name, alias, version.version)
    except Exception as error:  # those of requests and of stores of artifacts come through, too
        raise ValueError(f"--register {name}: {store.name} did not take the model ({describe_error(error)})") from error
    return Registered(name, str(version.version), alias, store.uri, example.shape[1:])


def save(file: Path, folder: Path, example: NDArray[np.uint8]) -> None:
    """An exported ONNX file as MLflow keeps such models, with what it takes and gives."""
    import mlflow.onnx
    import onnx

    model = onnx.load(file, load_external_data=False)
    classes = len(json.loads({entry.key: entry.value for entry in model.metadata_props}["class_names"]))
    signature = ModelSignature(
        Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]), "images")]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, classes), "logits")]),
    )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mlflow.onnx.save_model(
                model,
                str(folder),
                signature=signature,
                pip_requirements=[f"{name}=={installed(name)}" for name in ("mlflow", "onnx", "onnxruntime", "numpy")],
                save_as_external_data=False,
            )
    finally:
        logging.disable(before)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
