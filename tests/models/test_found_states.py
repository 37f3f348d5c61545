"""Checkpoints as other tools write them: wrappers, prefixes, averaged weights, and objects of any class."""

import argparse
import collections
import logging
import pathlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdpipe.models.found_states import StandIn, load_tensors, under_names_of
from kdpipe.models.resnet import ResNet
from kdpipe.models.weights import State, load_state, read_weights
from kdpipe.settings.addresses import file_and_part
from kdpipe.settings.errors import ConfigError


def network(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(8, 2)


NETWORK, OTHER = network(), network(1)
STATE, AVERAGE = NETWORK.state_dict(), OTHER.state_dict()
OPTIMIZER = torch.optim.AdamW(NETWORK.parameters()).state_dict()


def prefixed(prefix: str, state: State = STATE) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def averaged() -> AveragedModel:
    return AveragedModel(network(), multi_avg_fn=get_ema_multi_avg_fn(0.9))


class Lit(nn.Module):
    """A module around the network, as Lightning's are."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.criterion = NETWORK, nn.CrossEntropyLoss(weight=torch.ones(2))


class FromAfar:
    """An object of a class that nobody has here."""

    def __init__(self, value: object) -> None:
        self.value = value


def loaded(file: Path | str, content: Any = None, **how: Any) -> State:
    """As `teacher.weights=FILE` loads it."""
    if content is not None:
        torch.save(content, file, **how)
    into = network(2)
    load_state(
        "teacher.weights", str(file), into, read_weights("teacher.weights", *file_and_part(str(file)))[0], "resnet8", 2
    )
    return into.state_dict()


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refusal(file: Path | str, content: Any = None) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(file, content)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"teacher.weights={file}: ")


WRITTEN: dict[str, Callable[[], Any]] = {
    "model_state_dict": lambda: {"epoch": 3, "model_state_dict": STATE, "optimizer_state_dict": OPTIMIZER, "loss": 0.1},
    "net": lambda: {"net": prefixed("module."), "acc": np.float64(93.1), "epoch": np.int64(7)},
    "a name of one's own": lambda: {"resnet_weights": STATE, "step": 10},
    "wrapped twice": lambda: {"checkpoint": {"model": {"state_dict": STATE}}, "config": {"lr": 0.1}},
    "Lightning": lambda: {
        "epoch": 4,
        "global_step": 500,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": Lit().state_dict(),
        "optimizer_states": [OPTIMIZER],
        "hyper_parameters": {"root": pathlib.PosixPath("/data"), "net": FromAfar(NETWORK), "lr": 0.1},
    },
    "timm's train.py": lambda: {
        "epoch": 9,
        "arch": "resnet8",
        "state_dict": STATE,
        "optimizer": OPTIMIZER,
        "version": 2,
        "args": argparse.Namespace(model="resnet8", lr=0.1, mean=(0.5, 0.5), std=None),
        "metric": np.float64(76.5),
    },
    "torch.compile": lambda: torch.compile(NETWORK).state_dict(),
    "torch.compile in Lightning": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "DataParallel over torch.compile": lambda: prefixed("module._orig_mod."),
    "AveragedModel": lambda: {**averaged().state_dict(), **prefixed("module.")},
    "DeepSpeed": lambda: {"module": STATE, "ds_version": "0.14", "dtype": torch.bfloat16},
    "a backbone and a head": lambda: {
        ("head." if name.startswith("linear") else "backbone.") + name: tensor for name, tensor in STATE.items()
    },
    "student beside teacher of another kind": lambda: {
        **prefixed("student."),
        "teacher.features.0.weight": torch.ones(3),
    },
    "numbers between tensors": lambda: {**STATE, "epoch": 3, "best": np.float32(0.9)},
    "a defaultdict": lambda: {"state_dict": STATE, "history": collections.defaultdict(list, {"loss": [1.0, 0.5]})},
    "parameters": lambda: dict(NETWORK.named_parameters()) | dict(NETWORK.named_buffers()),
}


@pytest.mark.parametrize("tool", WRITTEN)
def test_checkpoints_of_other_tools(tool: str, tmp_path: Path) -> None:
    assert same(loaded(tmp_path / "checkpoint.pt", WRITTEN[tool]()), STATE)


@pytest.mark.parametrize(
    ("content", "raw"),
    [
        ({"state_dict": STATE, "state_dict_ema": AVERAGE, "args": argparse.Namespace()}, "state_dict"),
        ({"model": STATE, "model_ema": {"n_averaged": torch.tensor(5), **prefixed("module.", AVERAGE)}}, "model"),
        ({"ema": {"model": AVERAGE}, "net": STATE}, "net"),
        ({"ema_state_dict": AVERAGE, "model_state_dict": STATE}, "model_state_dict"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ", ".join(value),
)
def test_averaged_weights_are_taken_and_raw_ones_can_be(
    content: dict[str, Any], raw: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "checkpoint.pt"
    with caplog.at_level(logging.INFO, "kdpipe"):
        assert same(loaded(file, content), AVERAGE)
    assert f"{file}::{raw} takes the raw ones" in caplog.text
    assert same(loaded(f"{file}::{raw}"), STATE)


def test_one_of_several_is_chosen_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "dino.pt"
    said = refusal(file, {"student": prefixed("module."), "teacher": AVERAGE, "epoch": 3})
    assert said.startswith(f"it has several state dicts, student, teacher; {file}::student takes the first")
    assert same(loaded(f"{file}::student"), STATE) and same(loaded(f"{file}::teacher"), AVERAGE)
    said = refusal(f"{file}::momentum")
    assert "it has no momentum; it has several state dicts, student, teacher" in said

    flat = tmp_path / "flat.pt"
    said = refusal(flat, {**prefixed("student."), **prefixed("teacher.", AVERAGE)})
    assert f"it has such weights several times, under student, teacher; {flat}::student takes the first" in said
    assert same(loaded(f"{flat}::teacher"), AVERAGE)


def test_what_was_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kdpipe"):
        loaded(tmp_path / "checkpoint.ckpt", WRITTEN["Lightning"]())
    assert "criterion left out" in caplog.text


def test_a_file_without_weights_lists_its_keys_and_how_to_save_them(tmp_path: Path) -> None:
    file = tmp_path / "log.pt"
    said = refusal(file, {"epoch": 3, "history": [0.1], "args": argparse.Namespace(lr=1)})
    assert said.startswith("its keys are epoch, history, args, none with a state dict; torch.save(model.state_dict(), ")
    assert "it has a whole kdpipe.models.resnet.ResNet, whose code is not run; torch.save(model" in refusal(
        file, NETWORK
    )


def test_a_type_in_a_file_from_before_zip_is_named(tmp_path: Path) -> None:
    file = tmp_path / "old.pth"
    torch.save({"state_dict": STATE, "args": argparse.Namespace(lr=1)}, file, _use_new_zipfile_serialization=False)
    said = refusal(file)
    assert "argparse.Namespace, whose code is not run; torch.save(model.state_dict(), " in said


def test_nothing_of_a_stranger_s_class_is_run(tmp_path: Path) -> None:
    """Whatever a file names, an object of it is an empty list."""

    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return subprocess.getoutput, (f"touch '{tmp_path / 'code was run'}'",)

    torch.save({"state_dict": STATE, "args": Runs(), "more": FromAfar(1)}, tmp_path / "harmful.pt")
    before = torch.serialization.get_safe_globals()
    content = load_tensors(tmp_path / "harmful.pt")
    assert same(content["state_dict"], STATE)
    assert isinstance(content["args"], StandIn) and isinstance(content["more"], StandIn)
    assert content["args"] == content["more"] == [] and not vars(content["more"])
    assert not (tmp_path / "code was run").exists()
    assert torch.serialization.get_safe_globals() == before


@given(st.lists(st.sampled_from(["module", "model", "_orig_mod", "backbone", "net", "a.b"]), max_size=4))
def test_any_prefix_of_all_keys_comes_off(prefixes: list[str]) -> None:
    state, others = under_names_of(STATE, prefixed("".join(f"{prefix}." for prefix in prefixes)))
    assert same(state, STATE) and not others


def test_a_prefix_of_the_network_s_own_stays() -> None:
    own = prefixed("net.")
    assert same(under_names_of(own, own)[0], own)
    assert same(under_names_of(own, prefixed("module.", own))[0], own)
