"""The learning rate of each step, as the optimizer sees it."""

import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.assembly.building import build as build_component
from kdpipe.settings.composition import CONF
from kdpipe.settings.errors import as_typed
from kdpipe.settings.schema import Settings
from kdpipe.training.schedules import constant, cosine, multistep, onecycle

Build = Callable[..., torch.optim.lr_scheduler.LRScheduler]


def rates(build: Build, epochs: int, steps: int, lr: float = 1.0, **settings: object) -> list[float]:
    """The learning rate of each step of epochs of so many steps, and the one left after the last step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = build(optimizer, epochs=epochs, steps_per_epoch=steps, **settings)
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(epochs * steps):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_constant_stays_at_the_optimizers_own() -> None:
    assert rates(constant, 3, 4, lr=0.3) == [0.3] * 13


def test_cosine_without_warm_up_falls_from_the_optimizers_own_to_0() -> None:
    half_a_cosine = [0.3 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(21)]
    assert rates(cosine, 4, 5, lr=0.3, warmup_epochs=0) == pytest.approx(half_a_cosine, abs=1e-9)


def test_cosine_rises_linearly_first() -> None:
    rise = [0.3 * (step + 1) / 11 for step in range(10)]
    fall = [0.3 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]
    seen = rates(cosine, 4, 5, lr=0.3, warmup_epochs=2)
    assert seen == pytest.approx(rise + fall, abs=1e-9)
    assert max(seen) == pytest.approx(0.3)
    assert seen[-1] == pytest.approx(0, abs=1e-9)


def test_a_warm_up_may_take_part_of_an_epoch() -> None:
    seen = rates(cosine, 1, 8, warmup_epochs=0.25)
    assert seen[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert seen[8] == pytest.approx(0, abs=1e-9)


def test_a_warm_up_of_the_whole_training_never_falls() -> None:
    assert rates(cosine, 2, 4, warmup_epochs=2)[:8] == pytest.approx([step / 9 for step in range(1, 9)])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1))
def test_cosine_rises_falls_and_trains_in_every_step(epochs: int, steps: int, share: float) -> None:
    seen = rates(cosine, epochs, steps, lr=0.1, warmup_epochs=share * epochs)
    warmup = min(round(share * epochs * steps), epochs * steps)
    assert all(0 < rate <= 0.1 + 1e-12 for rate in seen[:-1])
    assert seen[: warmup + 1] == sorted(seen[: warmup + 1])
    if warmup < epochs * steps:
        assert seen[warmup] == pytest.approx(0.1)
        assert seen[warmup:] == sorted(seen[warmup:], reverse=True)
        assert seen[-1] == pytest.approx(0, abs=1e-12)


def test_multistep_counts_in_epochs() -> None:
    seen = rates(multistep, 5, 3, milestones=[1, 3], gamma=0.1)
    by_epoch = [seen[3 * epoch : 3 * epoch + 3] for epoch in range(5)]
    expected = [1, 0.1, 0.1, 0.01, 0.01]
    assert by_epoch == [pytest.approx([rate] * 3) for rate in expected]


def test_milestones_after_the_last_epoch_have_no_effect() -> None:
    assert rates(multistep, 2, 3, milestones=[150, 180], gamma=0.1) == [1] * 7


def test_no_milestones_are_a_constant_rate() -> None:
    assert rates(multistep, 2, 3, milestones=[], gamma=0.1) == [1] * 7


def test_a_constant_rate_may_rise_first() -> None:
    assert rates(constant, 3, 4, lr=0.5, warmup_epochs=1) == pytest.approx([0.1, 0.2, 0.3, 0.4, *[0.5] * 9])


def test_milestones_are_counted_from_the_start_of_a_warm_up() -> None:
    seen = rates(multistep, 5, 3, milestones=[2, 4], gamma=0.1, warmup_epochs=1)
    assert seen[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert seen[3:] == pytest.approx([1, 1, 1, *[0.1] * 6, *[0.01] * 4])
    assert seen[3:] == pytest.approx(rates(multistep, 5, 3, milestones=[2, 4], gamma=0.1)[3:])


ONE_CYCLE = {"pct_start": 0.3, "div_factor": 25, "final_div_factor": 100, "cycle_momentum": True}


def test_onecycle_is_pytorch_s_over_all_steps() -> None:
    seen = rates(onecycle, 4, 5, lr=0.5, **ONE_CYCLE)
    assert seen[0] == pytest.approx(0.5 / 25)
    assert seen[5] == max(seen) == pytest.approx(0.5)  # after 0.3 of 20 steps
    assert seen[19] == pytest.approx(0.5 / 25 / 100)  # that of the last step
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20, pct_start=0.3, final_div_factor=100)
    for rate in seen[:20]:
        assert rate == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("epochs", "pct_start"), [(10, 0.1), (3, 1 / 3)])
def test_onecycle_may_rise_within_its_first_step(epochs: int, pct_start: float) -> None:
    seen = rates(onecycle, epochs, 1, lr=0.5, **ONE_CYCLE | {"pct_start": pct_start})
    assert seen[0] == pytest.approx(0.5 / 25)
    assert seen[1] == max(seen[:epochs])
    assert seen[epochs - 1] == pytest.approx(0.5 / 25 / 100)


@pytest.mark.parametrize(
    ("build", "values"),
    [
        (constant, {"warmup_epochs": 1}),
        (cosine, {"warmup_epochs": 1}),
        (multistep, {"milestones": [1], "gamma": 0.1}),
        (multistep, {"milestones": [2], "gamma": 0.1, "warmup_epochs": 1}),
        (onecycle, ONE_CYCLE),
    ],
)
def test_groups_of_parameters_keep_their_own_rates(build: Build, values: dict[str, object]) -> None:
    first, second = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.4}], lr=1)
    scheduler = build(optimizer, epochs=3, steps_per_epoch=2, **values)
    for _ in range(5):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(4 * optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("value", [-1, 4, "abc", math.nan, math.inf, True, None])
def test_a_warm_up_that_does_not_fit_is_refused(value: object) -> None:
    with pytest.raises(ValueError) as error:
        rates(cosine, 3, 2, warmup_epochs=value)
    expected = "a number from 0 to 3" if value == 4 else "a number from 0"
    assert str(error.value) == f"warmup_epochs={as_typed(value)}: expected {expected}"


@pytest.mark.parametrize("value", [0, -1, 1.5, "abc", True])
def test_a_milestone_that_is_no_epoch_is_refused(value: object) -> None:
    with pytest.raises(ValueError) as error:
        rates(multistep, 3, 2, milestones=[1, value], gamma=0.1)
    assert str(error.value) == f"milestones={as_typed(value)}: expected a whole number from 1"


@pytest.mark.parametrize("milestones", [150, None])
def test_milestones_that_are_no_list_are_refused(milestones: object) -> None:
    with pytest.raises(
        ValueError, match=rf"^milestones={as_typed(milestones)}: expected a list of whole numbers from 1$"
    ):
        rates(multistep, 3, 2, milestones=milestones, gamma=0.1)


@pytest.mark.parametrize("gamma", [0, -0.1, "abc", math.nan, math.inf, True])
def test_a_bad_gamma_is_refused(gamma: object) -> None:
    with pytest.raises(ValueError) as error:
        rates(multistep, 3, 2, milestones=[1], gamma=gamma)
    assert str(error.value) == f"gamma={as_typed(gamma)}: expected a number above 0"


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "scheduler").glob("*.yaml")))
def test_every_yaml_builds_without_a_warning(name: str, composed: Callable[..., Settings]) -> None:
    config = composed(f"scheduler={name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = rates(partial(build_component, "scheduler", config.scheduler), config.train.epochs, 3)
    assert max(seen) == pytest.approx(1)


def test_the_command_lines_values_reach_the_schedule(composed: Callable[..., Settings]) -> None:
    config = composed("scheduler=multistep", "scheduler.milestones=[2]", "scheduler.gamma=0.5")
    schedule = partial(build_component, "scheduler", config.scheduler)
    assert rates(schedule, 3, 2) == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "scheduler").glob("*.yaml")))
def test_only_evaluating_works_with_every_schedule(name: str, composed: Callable[..., Settings]) -> None:
    config = composed(f"scheduler={name}", "train.epochs=0")
    assert len(rates(partial(build_component, "scheduler", config.scheduler), config.train.epochs, 3)) == 1
