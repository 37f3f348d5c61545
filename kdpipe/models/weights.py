"""Reading weights from files and loading them into networks, completely or not at all."""

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from kdpipe.models.found_states import COUNTERS, State, choose_state, load_tensors, under_names_of
from kdpipe.settings.errors import ConfigError, first_line, flat, shortened
from kdpipe.settings.values import composed
from kdpipe.system.files import write_atomically

log = logging.getLogger("kdpipe")
OTHERS = "a file or runs:/<run id>"
IMAGENET_IDS = "791ce0333040dd24"  # the digest of WordNet's ids of its 1,000 classes, sorted, with spaces between


def read_weights(key: str, path: Path, part: str = "") -> tuple[State, list[str] | None]:
    """The state dict in `path` and the class names that it was trained with, where the file has them.

    Reads safetensors and files from `torch.save`, in which it finds a state dict in the usual wrappers; code in a file
    is never run.

    Args:
        part: the wrapper or prefix of the state dict, where a file has several.

    Raises:
        ConfigError: the file is missing or has no weights; `key` is where its name stands in the config.
    """
    if not path.is_file():
        raise ConfigError(key, path, problem="file not found")
    class_names = None
    if path.suffix == ".safetensors":
        content, class_names = _read_safetensors(key, path)
    else:
        content = _read_pickled(key, path)
    try:
        state, taken, raw = choose_state(content, part)
    except ValueError as error:
        raise ConfigError(key, path, "a state dict", str(error).replace("FILE", str(path))) from error
    if raw:
        log.info("%s: its averaged weights (%s) are taken; %s::%s takes the raw ones", path, taken, path, raw)
    return state, class_names


def _read_safetensors(key: str, path: Path) -> tuple[State, list[str] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            class_names = json.loads((file.metadata() or {}).get("class_names", "null"))
        is_list = isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
        if class_names is not None and not is_list:
            raise ValueError("class_names in its metadata is not a list of names")
        return load_file(path), class_names
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(key, path, problem=f"not a readable safetensors file ({flat(error)})") from error


def _read_pickled(key: str, path: Path) -> Any:
    try:
        _check_size(path)
        return load_tensors(path)
    except Exception as error:  # other bytes raise whatever the unpickler stumbles over
        reason = str(error).replace("FILE", str(path)) if isinstance(error, ValueError) else first_line(error)
        problem = f"not readable ({flat(reason).split('. ')[0]})"
        raise ConfigError(key, path, "a state dict saved by torch.save or safetensors", problem) from error


def metadata_in(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, such as the class names of one of kdpipe's; nothing where it cannot be
    read, which reading the weights reports."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


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


def load_state(key: str, source: str, network: nn.Module, state: State, name: str, num_classes: int) -> None:
    """Load all of `state` into `network`, under whatever prefix it was saved.

    Raises:
        ConfigError: names or shapes differ.
    """
    expected = network.state_dict()
    try:
        state, others = under_names_of(expected, state)
    except ValueError as error:
        raise ConfigError(key, source, f"weights of {name}", str(error).replace("FILE", source)) from error
    if others:
        log.info("%s: %s left out, which the network does not have", source, shortened(others))
    state = {name: tensor for name, tensor in expected.items() if name.endswith(COUNTERS)} | state
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
    for name, tensor in state.items():
        if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
            problem = f"{bad:,} of {tensor.numel():,} numbers in {name} are NaN or infinite"
            raise ConfigError(key, source, "weights of a training that has not diverged", problem)
    network.load_state_dict(state)


def check_class_names(key: str, source: str, trained: Sequence[str] | None, expected: Sequence[str]) -> None:
    """Raise ConfigError if weights were trained on classes other than those of the data set. Two forms of Unicode are
    one name."""
    if trained is None or composed(trained) == composed(expected):
        return
    problem = f"trained on {len(trained)} classes ({shortened(trained)})"
    wanted = f"the data set's {len(expected)} ({shortened(expected)})"
    pairs = zip(composed(trained), composed(expected), strict=False)
    place = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
    if place is not None:
        first = f"class {place + 1} is {trained[place]} there and {expected[place]} here"
        same = sorted(composed(trained)) == sorted(composed(expected))
        problem = f"{problem}: {f'the same in another order, {first}' if same else first}"
    raise ConfigError(key, source, wanted, problem)


def load_imagenet(key: str, network: nn.Module, name: str, class_names: Sequence[str] = ()) -> None:
    """Load the ImageNet weights into `network`: into its head as well where the classes are ImageNet's.

    Raises:
        ConfigError: there are none for this network, or they cannot be downloaded.
    """
    if not hasattr(network, "imagenet_weights"):
        raise ConfigError(key, "imagenet", f"null, {OTHERS}", f"{name} has no ImageNet weights")
    if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ:  # PyTorch takes only one of the two
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # for the library that loads them
    try:
        pretrained = network.imagenet_weights()  # type: ignore[operator]
    except Exception as error:  # a refused connection, a broken file in the cache, …
        where = getattr(network, "imagenet_cache", f"{torch.hub.get_dir()}/checkpoints")
        problem = f"the ImageNet weights of {name} are not in {where} and cannot be downloaded ({first_line(error)})"
        raise ConfigError(key, "imagenet", f"null (random weights), {OTHERS}", problem) from error
    head, own = f"{network.head_name}.", network.state_dict()
    if not (
        is_imagenet(class_names, getattr(network, "imagenet_classes", ()))
        and all(key in pretrained and pretrained[key].shape == own[key].shape for key in own if key.startswith(head))
    ):
        pretrained = {key: tensor for key, tensor in pretrained.items() if not key.startswith(head)}
    incompatible = network.load_state_dict(pretrained, strict=False)
    assert not incompatible.unexpected_keys, incompatible.unexpected_keys
    assert all(name.startswith(head) for name in incompatible.missing_keys), incompatible.missing_keys


def is_imagenet(class_names: Sequence[str], categories: Sequence[str]) -> bool:
    """Whether these are ImageNet's 1,000 classes in the order of pretrained heads: WordNet's ids (n01440764, …), as
    folders have them, or the library's `categories`."""
    digest = hashlib.sha256(" ".join(class_names).encode()).hexdigest()[:16]
    return digest == IMAGENET_IDS or (len(categories) > 0 and tuple(class_names) == tuple(categories))


def weights_digest(network: nn.Module, without: str | None = None) -> str:
    """16 hex digits that identify a network's weights, without those of the submodule `without`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if without is not None and name.startswith(f"{without}."):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_weights(network: nn.Module, path: Path, class_names: Sequence[str]) -> None:
    """Write a network's weights as safetensors, with the class names in the metadata: atomically, and the same bytes
    for the same weights."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # One entry of metadata: the order of several is not fixed.
    write_atomically(path, save(state, metadata={"class_names": json.dumps(list(class_names))}))
