"""Reading weights from files and loading them into networks, completely or not at all."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kdpipe.settings.errors import ConfigError, first_line, flat
from kdpipe.settings.values import composed
from kdpipe.system.files import write_atomically

State = dict[str, Tensor]
OTHERS = "a file or runs:/<run id>"


def read_weights(key: str, path: Path) -> tuple[State, list[str] | None]:
    """The state dict in `path` and the class names that it was trained with, where the file has them.

    Reads safetensors and files from `torch.save` (a state dict, or one under "state_dict" or "model"); code in a file
    is never run.

    Raises:
        ConfigError: the file is missing or has no weights; `key` is where its name stands in the config.
    """
    if not path.is_file():
        raise ConfigError(key, path, problem="file not found")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                class_names = json.loads((file.metadata() or {}).get("class_names", "null"))
            is_list = isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
            if class_names is not None and not is_list:
                raise ValueError("class_names in its metadata is not a list of names")
            return load_file(path), class_names
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            raise ConfigError(key, path, problem=f"not a readable safetensors file ({flat(error)})") from error
    try:
        _check_size(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other bytes raise whatever the unpickler stumbles over
        problem = f"not readable ({first_line(error).split('. ')[0]})"
        raise ConfigError(key, path, "a state dict saved by torch.save or safetensors", problem) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    is_state = isinstance(content, Mapping) and all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in content.items()
    )
    if not is_state:
        raise ConfigError(key, path, "a state dict", "the file holds something else")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}, None


def _check_size(path: Path) -> None:
    """Raise ValueError for a zip archive that needs more memory than disk: `torch.save` does not compress."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"its member {member.filename} is compressed, which torch.save never does")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members claim to be larger than the file")


def _is_plain(tensor: object) -> bool:
    """Whether this is an ordinary tensor in memory, not a sparse, quantised or meta one."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested)
    )


def load_state(key: str, source: str, network: nn.Module, state: State, name: str, num_classes: int) -> None:
    """Load all of `state` into `network`.

    Raises:
        ConfigError: names or shapes differ.
    """
    expected = network.state_dict()
    # Files from before PyTorch 0.4.1 lack these counters, which BatchNorm does not need.
    state = {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")} | state
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"{len(missing)} missing, such as {missing[0]}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"{len(unexpected)} unknown, such as {unexpected[0]}")
    problems += [
        f"{name} has shape {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ][:3]
    if problems:
        raise ConfigError(key, source, f"weights of {name} with {num_classes} classes", "; ".join(problems))
    network.load_state_dict(state)


def check_class_names(key: str, source: str, trained: Sequence[str] | None, expected: Sequence[str]) -> None:
    """Raise ConfigError if weights were trained on classes other than those of the data set. Two forms of Unicode are
    one name."""
    if trained is not None and composed(trained) != composed(expected):
        problem = f"trained on {len(trained)} classes ({_shorten(trained)})"
        raise ConfigError(key, source, f"the data set's {len(expected)} ({_shorten(expected)})", problem)


def load_imagenet(key: str, network: nn.Module, name: str) -> None:
    """Load the ImageNet weights into all of `network` but its head.

    Raises:
        ConfigError: there are none for this network, or they cannot be downloaded.
    """
    if not hasattr(network, "imagenet_backbone"):
        raise ConfigError(key, "imagenet", f"null, {OTHERS}", f"{name} has no ImageNet weights")
    if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ:  # PyTorch takes only one of the two
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # for the library that loads them
    try:
        backbone = network.imagenet_backbone()  # type: ignore[operator]
    except Exception as error:  # a refused connection, a broken file in the cache, …
        where = f"not in {torch.hub.get_dir()}/checkpoints"
        problem = f"the ImageNet weights of {name} are {where} and cannot be downloaded ({first_line(error)})"
        raise ConfigError(key, "imagenet", f"null (random weights), {OTHERS}", problem) from error
    incompatible = network.load_state_dict(backbone, strict=False)
    head = f"{network.head_name}."
    assert not incompatible.unexpected_keys, incompatible.unexpected_keys
    assert all(name.startswith(head) for name in incompatible.missing_keys), incompatible.missing_keys


def weights_digest(network: nn.Module, without: str | None = None) -> str:
    """16 hex digits that identify a network's weights, without those of the submodule `without`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if without is not None and name.startswith(f"{without}."):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def save_weights(network: nn.Module, path: Path, class_names: Sequence[str]) -> None:
    """Write a network's weights as safetensors, with the class names in the metadata: atomically, and the same bytes
    for the same weights."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # One entry of metadata: the order of several is not fixed.
    write_atomically(path, save(state, metadata={"class_names": json.dumps(list(class_names))}))
