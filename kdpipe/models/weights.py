"""Reading weights from files and putting them into networks; nothing is loaded in part without a word."""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

State = dict[str, Tensor]


def read_weights(key: str, path: Path) -> tuple[State, list[str] | None]:
    """The state dict in `path` and the class names that it was trained with, where the file says them.

    Reads safetensors and what `torch.save` writes (as a state dict, or with one under "state_dict" or "model"); no
    code in a file is run.

    Raises:
        ValueError: no such file, or not a file of weights.
    """
    if not path.is_file():
        raise ValueError(f"{key}={path}: there is no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                class_names = json.loads((file.metadata() or {}).get("class_names", "null"))
            named = class_names is None or (
                isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
            )
            if not named:
                raise ValueError("class_names in its metadata is no list of names")
            return load_file(path), class_names
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{key}={path}: not a readable safetensors file ({reason})") from error
    try:
        _check_size(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights raise whatever the unpickler stumbles over
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{key}={path}: a state dict saved by torch.save or safetensors is accepted ({reason})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    is_state = isinstance(content, Mapping) and all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in content.items()
    )
    if not is_state:
        raise ValueError(f"{key}={path}: a state dict is accepted, this file holds something else")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}, None


def _check_size(path: Path) -> None:
    """Raise ValueError for a zip archive that takes more memory than disk: `torch.save` compresses nothing."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename} in it is compressed, torch.save compresses nothing")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members claim to be larger than the file")


def _is_plain(tensor: object) -> bool:
    """Whether this is a tensor that a network's own can be replaced by, and not a sparse, quantised or empty shell."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested)
    )


def load_state(key: str, source: str, network: nn.Module, state: State, name: str, num_classes: int) -> None:
    """Put `state` into `network`, all of it.

    Raises:
        ValueError: names or shapes differ; the message says how.
    """
    # Files older than PyTorch 0.4.1 have no such counters; BatchNorm does not need them.
    counters = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")}
    state = counters | state
    expected = network.state_dict()
    complaints = []
    if missing := [name for name in expected if name not in state]:
        complaints.append(f"{len(missing)} missing, such as {missing[0]}")
    if unexpected := [name for name in state if name not in expected]:
        complaints.append(f"{len(unexpected)} unknown, such as {unexpected[0]}")
    complaints += [
        f"{name} has shape {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ][:3]
    if complaints:
        raise ValueError(
            f"{key}={source}: weights of {name} with {num_classes} classes are accepted; {'; '.join(complaints)}"
        )
    network.load_state_dict(state)


def check_class_names(key: str, source: str, trained: Sequence[str] | None, expected: Sequence[str]) -> None:
    """Raise ValueError where weights were trained on other classes than the data set has."""
    if trained is not None and list(trained) != list(expected):
        raise ValueError(
            f"{key}={source}: trained on {len(trained)} classes ({_shorten(trained)}), "
            f"but the data set has {len(expected)} ({_shorten(expected)})"
        )


def load_imagenet(key: str, network: nn.Module, name: str) -> None:
    """Put the ImageNet weights into all of `network` but its head.

    Raises:
        ValueError: there are none for this network, or they cannot be downloaded.
    """
    if not hasattr(network, "imagenet_backbone"):
        raise ValueError(f"{key}=imagenet: {name} has no ImageNet weights; null, a file or runs:/<run id> is accepted")
    try:
        backbone = network.imagenet_backbone()  # type: ignore[operator]
    except Exception as error:  # a refused connection, a torn file in the cache, …
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{key}=imagenet: the ImageNet weights of {name} are not in {torch.hub.get_dir()}/checkpoints and cannot "
            f"be downloaded ({reason}); null (random weights), a file or runs:/<run id> is accepted"
        ) from error
    incompatible = network.load_state_dict(backbone, strict=False)
    head = f"{network.head_name}."
    assert not incompatible.unexpected_keys, incompatible.unexpected_keys
    assert all(name.startswith(head) for name in incompatible.missing_keys), incompatible.missing_keys


def weights_digest(network: nn.Module, without: str | None = None) -> str:
    """16 hex digits that stand for a network's weights, all but those of the submodule `without`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if without is not None and name.startswith(f"{without}."):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
