"""State dicts in files that other tools have written: in wrappers, under prefixes, beside objects of any class."""

import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from kdpipe.settings.errors import shortened

State = dict[str, Tensor]

# Where training scripts put the weights; the first one found counts. All other names count where there is only one.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
DEPTH = 4  # of wrappers in wrappers
COUNTERS = "num_batches_tracked"  # of BatchNorm, which does not need them; files from before PyTorch 0.4.1 lack them
SAVE = "torch.save(model.state_dict(), FILE) saves the weights alone"
AVERAGED = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, whose weights are those of its module


class StandIn(list[Any]):
    """Takes the place of an object whose class is not PyTorch's own: the class is not imported, none of its code runs,
    and what the file says of the object is dropped."""

    def __new__(cls, *args: object, **kwargs: object) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


def load_tensors(path: Path) -> Any:
    """What `torch.save` has written, with a `StandIn` for each object that is no tensor and no plain value.

    Raises:
        ValueError: an object without which it cannot be read.
        Exception: whatever else PyTorch's reader stumbles over.
    """
    named: list[Any] = []
    if zipfile.is_zipfile(path):  # of what came before zip, PyTorch cannot tell the classes
        for name in get_unsafe_globals_in_checkpoint(str(path)):
            # The items of a dictionary are set one by one, which the reader does with a real one alone.
            named.append((_empty if name == "collections.defaultdict" else type(name, (StandIn,), {}), name))
    try:
        with safe_globals(named):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        names = [name for _, name in named] or re.findall(r"GLOBAL (\S+)", str(error))
        if not names:
            raise
        raise ValueError(f"it has {shortened(names)}, whose code is not run; {SAVE}") from error


def _empty(*args: object) -> dict[object, object]:
    return {}


def choose_state(content: Any, part: str = "") -> tuple[State, str, str]:
    """The state dict in the content of a file: averaged weights (EMA) before raw ones, as timm's loader takes them.

    Args:
        part: the wrapper or the prefix of the one that was asked for; "" for that which is found.

    Returns:
        The state dict, the wrapper that it was in, and that of the raw weights where it is their average; "" for none.

    Raises:
        ValueError: there is none, or several of which none is known to be the network's.
    """
    found = dict(_states_in(content))
    if not found and isinstance(content, Mapping):  # numbers between the tensors
        tensors = {name: tensor for name, tensor in content.items() if isinstance(name, str) and is_plain(tensor)}
        found = {"": tensors} if tensors else {}
    if part in found and part:
        return found[part], part, ""
    averaged = [name for name in found if "ema" in re.split("[._]", name.lower())]
    raw = [name for name in found if name not in averaged]
    known = [name for wrapper in ("", *WRAPPERS) for name in raw if name.rpartition(".")[2] == wrapper]
    chosen = (known or raw)[:1] if known or len(raw) == 1 else []
    if part:
        state = found[chosen[0]] if chosen else {}
        below = {name.removeprefix(f"{part}."): state[name] for name in state if name.startswith(f"{part}.")}
        if not below:
            raise ValueError(f"it has no {part}; {_described(content, found)}")
        return below, part, ""
    if averaged:
        return found[averaged[0]], averaged[0], "".join(chosen)
    if not chosen:
        raise ValueError(_described(content, found))
    return found[chosen[0]], chosen[0], ""


def _states_in(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """All mappings from names to tensors, with the wrappers that they are in; an optimizer's state is left out."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    if all(map(is_plain, content.values())) and (content or not depth):
        yield name, dict(content)
    elif depth < DEPTH:
        for key, value in content.items():
            if "optim" not in key.lower():
                yield from _states_in(value, f"{name}.{key}" if name else key, depth + 1)


def is_plain(tensor: object) -> bool:
    """Whether this is an ordinary tensor in memory, not a sparse, quantised or meta one."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested)
    )


def _described(content: Any, found: Mapping[str, State]) -> str:
    """What a file holds, for someone who looks for its weights."""
    if found:
        names = list(found)
        return f"it has several state dicts, {', '.join(names)}; FILE::{names[0]} takes the first"
    if isinstance(content, StandIn):
        return f"it has a whole {type(content).__name__}, whose code is not run; {SAVE}"
    if isinstance(content, Mapping) and content:
        return f"its keys are {shortened(content, 8)}, none with a state dict; {SAVE}"
    return f"the file holds something else; {SAVE}"


def under_names_of(expected: Collection[str], state: State) -> tuple[State, list[str]]:
    """A state dict with the names of the network that it belongs to, without the prefixes of what it was wrapped in
    when it was saved (DataParallel's module., Lightning's model., torch.compile's _orig_mod., …); and the first names
    of what else was saved with it. As it is, but for wrappers, where no prefix makes it fit.

    Raises:
        ValueError: it holds several such networks.
    """
    names = set(expected)
    needed = {name for name in names if not name.endswith(COUNTERS)}
    state = {
        name if name in names else name.replace("_orig_mod.", ""): tensor
        for name, tensor in state.items()
        if name in names or name.rpartition(".")[2] != AVERAGED
    }

    def below(prefix: str) -> State:
        return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}

    prefixes = {"": 0}
    for name in state:
        parts = name.split(".")
        prefixes |= {".".join(parts[:depth]) + ".": depth for depth in range(1, len(parts))}
    fitting = [prefix for prefix in prefixes if needed <= below(prefix).keys() <= names]
    if len(fitting) > 1 and "" not in fitting:
        some = ", ".join(prefix.rstrip(".") for prefix in fitting)
        raise ValueError(f"it has such weights several times, under {some}; FILE::{fitting[0][:-1]} takes the first")
    headless = {name.partition(".")[2]: tensor for name, tensor in state.items()}  # backbone.conv1, head.fc
    if not fitting and len(headless) == len(state) and needed <= headless.keys() <= names:
        return headless, []
    best = fitting[0] if fitting else max(prefixes, key=lambda prefix: (len(needed & below(prefix).keys()), not prefix))
    others = [name.partition(".")[0] for name in state if fitting and not name.startswith(best)]
    return below(best), list(dict.fromkeys(others))
