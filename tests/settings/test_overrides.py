"""What was typed is what is meant: names that look like numbers, numbers from the environment, keys with ++."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_refused
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.settings.overrides import names_as_typed
from kdpipe.settings.schema import Settings

NUMBER_LIKE = ["2024_05_01", "1e3", "42", "007", "0x1F", "1_000", "true", "on", "-1", "1.50", "nan", "1E5"]


@pytest.mark.parametrize("name", NUMBER_LIKE)
def test_a_name_is_the_text_that_was_typed(composed: Callable[..., Settings], name: str) -> None:
    keys = ("output_dir", "tracking.experiment", "tracking.uri", "dataset.unlabelled_root", "model.weights")
    settings = composed(
        "dataset=image_folder", f"dataset.root={name}", f"dataset.cache_dir={name}", *(f"{key}={name}" for key in keys)
    )
    assert (settings.output_dir, settings.tracking.experiment, settings.tracking.uri) == (name, name, name)
    assert (settings.dataset.unlabelled_root, settings.model.weights) == (name, name)
    assert (
        settings.dataset.arguments["root"] == settings.dataset.arguments["cache_dir"] == settings.dataset.name == name
    )


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_names_in_lists_and_sweeps_are_text_too(prefix: str) -> None:
    assert names_as_typed(f"{prefix}model.stages=[0,layer1, 2]") == f"{prefix}model.stages=['0',layer1, '2']"
    assert names_as_typed(f"{prefix}dataset.root=1e3,b,'2,3'") == f"{prefix}dataset.root='1e3',b,'2,3'"


@given(st.text("a1_.e-/0", min_size=1, max_size=8))
def test_every_name_is_read_as_its_own_text(name: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([names_as_typed(f"output_dir={name}")])
    assert str(override.value()) == name and isinstance(override.value(), str)


@pytest.mark.parametrize("override", ["seed=3", "loss.alpha=1e-1", "tracking.uri=null", "model.weights=imagenet", "-m"])
def test_other_overrides_stay_as_they_are(override: str) -> None:
    assert names_as_typed(override) == override


def test_a_sweep_over_names_keeps_their_text(kdpipe: Callable) -> None:
    outcome = kdpipe("-m", "dataset=image_folder", "dataset.root=2024_05_01,2024_06_01", "loss.alpha=0")
    assert outcome.status == 1
    assert "dataset.root=2024_05_01: " in outcome.errors, outcome.errors


def test_names_in_an_experiment_of_one_s_own_keep_their_text(kdpipe: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    dated = folder / "dated.yaml"
    dated.write_text("# @package _global_\ndataset:\n  root: 2024_05_01\ntracking:\n  experiment: 0x1F\n")
    command = ["--config-dir=mine", "dataset=image_folder", "experiment=dated", "loss.alpha=0"]
    outcome = kdpipe(*command)
    assert_refused(outcome, "dataset.root=2024_05_01: ")
    dated.write_text("# @package _global_\noutput_dir: 1e3\n")
    assert_refused(kdpipe(*command, "dataset.root=x"), "output_dir=1000: expected text", "quotes")


def test_numbers_may_come_from_the_environment(
    composed: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SEED": "3", "RATE": "1e-3", "ALPHA": "0.25", "EPOCHS": "[1,2]", "DATE": "2024_05_01"}.items():
        monkeypatch.setenv(name, value)
    settings = composed(
        *("seed=${oc.env:SEED}", "optimizer.lr=${oc.env:RATE}", "loss.alpha=${oc.env:ALPHA}"),
        *("train.keep_epochs=${oc.env:EPOCHS}", "+optimizer.eps=${oc.env:RATE}", "train.resume=${oc.env:NONE,never}"),
        *("tracking.experiment=${oc.env:DATE}", "output_dir=${oc.env:DATE}/${oc.env:SEED}"),
    )
    assert (settings.seed, settings.optimizer.lr, settings.loss.arguments["alpha"]) == (3, 1e-3, 0.25)
    assert (settings.train.keep_epochs, settings.optimizer.arguments["eps"]) == ([1, 2], 1e-3)
    assert settings.train.resume == "never"
    assert (settings.tracking.experiment, settings.output_dir) == ("2024_05_01", "2024_05_01/3")
    plain = ["optimizer.lr=1e-3", "loss.alpha=0.25", "seed=3", "train.keep_epochs=[1,2]", "+optimizer.eps=1e-3"]
    assert settings.identity == composed(*plain).identity


@pytest.mark.parametrize(
    "override",
    [
        *("++loss.warmup=0", "++optimizer.momentum=0.9", "++scheduler.gamma=0.5", "++augmentation.flip=false"),
        *("++model.shortcut=B", "++teacher.shortcut=B", "++dataset.image_size=32", "++also.weight=2"),
    ],
)
def test_a_key_with_two_plus_is_left_out_where_a_component_lacks_it(
    composed: Callable[..., Settings], override: str
) -> None:
    settings = composed(override)
    assert settings == composed() and settings.identity == composed().identity


def test_a_key_with_two_plus_counts_where_a_component_has_it(composed: Callable[..., Settings]) -> None:
    settings = composed("loss=dkd", "++loss.warmup=0", "optimizer=sgd", "++optimizer.dampening=0.1")
    assert settings.loss.arguments["warmup"] == 0
    assert settings.optimizer.arguments["dampening"] == 0.1


def test_what_is_left_out_is_said_once(kdpipe: Callable) -> None:
    outcome = kdpipe("loss=kd", "loss.alpha=0", "++loss.warmup=0", "dataset=digits", "train.epochs=0")
    assert outcome.status == 0, outcome.errors
    lines = re.findall(r".*left out.*", outcome.output)
    assert len(lines) == 1 and "++loss.warmup: left out for kdpipe.losses.KD, which has no such key" in lines[0]
    outcome = kdpipe("-m", "loss=kd,label_smoothing", "++loss.alpha=0", "dataset=digits", "train.epochs=0")
    assert outcome.status == 0, outcome.errors
    assert outcome.output.count("++loss.alpha: left out for kdpipe.losses.LabelSmoothing, ") == 1


def test_the_flag_of_a_sweep_may_come_last(kdpipe: Callable) -> None:
    outcome = kdpipe("dataset=digits", "loss.alpha=0", "train.epochs=0", "seed=0,1", "-m")
    assert outcome.status == 0, outcome.errors
    assert "2 cells" in outcome.output
