"""What a recipe adds to a training: averaged weights, accumulated gradients, an early end, scaled gradients."""

from collections.abc import Sequence

import pytest
import torch
from helpers import classifier, some_digits
from hypothesis import given
from hypothesis import settings as settings_of_test
from hypothesis import strategies as st
from torch import nn

from kdpipe.data import ImageDataset
from kdpipe.losses import CrossEntropy
from kdpipe.models import Classifier
from kdpipe.settings.metric_names import LAST_EPOCH, Select
from kdpipe.system.hardware import Hardware
from kdpipe.training import loop
from kdpipe.training.checkpoint import copy_state
from kdpipe.training.loop import Hooks, Recipe, evaluate_with, fit, is_stalled
from kdpipe.training.observed import Observed
from kdpipe.training.schedules import cosine
from kdpipe.training.state import Training


def plain() -> Classifier:
    """A network without BatchNorm, for 8×8 images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.GELU(), nn.Linear(16, 10))
    return Classifier(network, 8, [0.5] * 3, [0.5] * 3)


def training_of(
    model: nn.Module, ema: float | None = None, precision: str = "float32", epochs: int = 2, steps: int = 5
) -> Training:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    hardware = Hardware(torch.device("cpu"), precision)
    return Training(Observed(model), CrossEntropy(), optimizer, cosine(optimizer, epochs, steps, 0), hardware, ema=ema)


def weights_of(module: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


# Averaged weights


def test_the_average_is_a_moving_one_over_the_steps() -> None:
    torch.manual_seed(0)
    model = classifier()  # with BatchNorm
    training = training_of(model, ema=0.5)
    expected: dict[str, torch.Tensor] = {}
    seen: list[None] = []

    def on_step() -> None:
        steps = len(seen)  # averaged before this one
        decay = min(0.5, (1 + steps) / (10 + steps)) if steps else 0
        for name, tensor in copy_state(model).items():
            if tensor.is_floating_point():
                expected[name] = decay * expected.get(name, tensor) + (1 - decay) * tensor
        seen.append(None)

    fit(training, some_digits(), Recipe(2, batch_size=50, seed=0), Hooks(on_step=on_step))
    assert len(seen) == 10
    averaged = training.averaged_weights
    assert averaged and any("running_var" in name for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(averaged[name], tensor)


@pytest.mark.parametrize("choice", ["last", "best", "ema"])
def test_each_choice_ends_with_its_weights_and_tests_the_others(choice: Select) -> None:
    data, logged = some_digits(), []
    training = training_of(plain(), ema=0.9, epochs=3)
    last = {}
    hooks = Hooks(
        lambda epoch, metrics: logged.append(metrics), on_checkpoint=lambda: last.update(copy_state(training.model))
    )
    ended = fit(training, data, Recipe(3, batch_size=50, seed=0, select=choice), hooks)
    assert training.averaged_weights
    weights = {"last": last, "best": training.best, "ema": copy_state(training.averaged.module)}
    assert all(torch.equal(tensor, weights[choice][name]) for name, tensor in training.model.state_dict().items())
    others = {name: evaluate_with(weights[name], training, data, "test") for name in weights if name != choice}
    for name, measured in others.items():
        assert ended[f"test/accuracy_{name}"] == measured["accuracy"]
        assert ended[f"test/macro_f1_{name}"] == measured["macro_f1"]
    assert f"test/accuracy_{choice}" not in ended
    of_average = evaluate_with(weights["ema"], training, data, "validation")
    assert logged[-1]["val/accuracy_ema"] == of_average["accuracy"]
    assert logged[-1]["val/loss_ema"] == of_average["loss"] != logged[-1]["val/loss"]
    if choice == "ema":
        assert ended["selected/accuracy"] == of_average["accuracy"]


def test_averaging_changes_nothing_else() -> None:
    data, found = some_digits(), []
    for ema in (None, 0.9):
        model = plain()
        fit(training_of(model, ema), data, Recipe(2, batch_size=50, seed=0), Hooks())
        found.append(weights_of(model))
    assert torch.equal(*found)


# Accumulated gradients


def steps_of(batch_size: int, accumulate: int, data: ImageDataset, clip_norm: float | None = None) -> torch.Tensor:
    """The weights after each step."""
    model, seen = plain(), []
    number = -(-len(data.splits["train"]) // (batch_size * accumulate))
    recipe = Recipe(2, batch_size=batch_size, seed=0, accumulate=accumulate, clip_norm=clip_norm)
    fit(training_of(model, steps=number), data, recipe, Hooks(on_step=lambda: seen.append(weights_of(model))))
    return torch.stack(seen)


@pytest.mark.parametrize(("batch_size", "clip_norm"), [(40, None), (50, None), (50, 0.1)])
def test_accumulated_batches_are_one_large_batch(batch_size: int, clip_norm: float | None) -> None:
    data = some_digits()
    # The last group of an epoch has batches of 40 and 34 images, or one batch of 34.
    assert len(data.splits["train"]) == 80 + 80 + 40 + 34 == 100 + 100 + 34
    small, large = steps_of(batch_size, 2, data, clip_norm), steps_of(2 * batch_size, 1, data, clip_norm)
    assert len(small) == len(large) == 6
    torch.testing.assert_close(small, large, rtol=0, atol=1e-6)


def test_a_group_may_be_larger_than_the_epoch() -> None:
    data = some_digits()
    torch.testing.assert_close(steps_of(40, 100, data), steps_of(234, 1, data), rtol=0, atol=1e-6)


# An early end


@pytest.mark.parametrize(
    ("reached", "patience", "stalled"),
    [
        ([0.5, 0.5, 0.5], None, False),
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.5, 0.4, 0.51], 2, False),
        ([0.5, 0.4, 0.3], 3, False),
    ],
)
def test_it_stalls_after_epochs_without_a_rise(reached: list[float], patience: int | None, stalled: bool) -> None:
    assert is_stalled(reached, patience) == stalled


@settings_of_test(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=12), st.integers(1, 4))
def test_the_best_epoch_is_as_long_ago_as_the_patience(reached: Sequence[float], patience: int) -> None:
    stops = [number for number in range(1, len(reached) + 1) if is_stalled(reached[:number], patience)]
    if stops:
        seen = reached[: stops[0]]
        assert len(seen) - 1 - seen.index(max(seen)) == patience
    else:
        best = reached.index(max(reached))
        assert len(reached) - 1 - best < patience


@pytest.mark.parametrize(("choice", "expected"), [("last", 3), ("ema", 5)])
def test_training_ends_where_the_metric_of_its_weights_stalls(
    choice: Select, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, averaged = [0.5, 0.4, 0.3, 0.6, 0.2, 0.1], [0.1, 0.2, 0.3, 0.3, 0.2, 0.9]
    training, epochs = training_of(plain(), ema=0.9, epochs=6), []

    def measured(training: Training, *_: object) -> dict[str, float]:
        now = training.epoch - 1
        names = ("accuracy", "balanced_accuracy", "macro_f1")
        return {f"val/{name}{end}": of[now] for name in names for end, of in (("", trained), ("_ema", averaged))}

    monkeypatch.setattr(loop, "measure", measured)
    recipe = Recipe(6, batch_size=50, seed=0, select=choice, early_stop=2)
    ended = fit(training, some_digits(), recipe, Hooks(lambda epoch, metrics: epochs.append(epoch)))
    assert epochs == list(range(1, expected + 1))
    assert ended[LAST_EPOCH] == ended["selected/epoch"] == expected
    # As a process that continues from here.
    assert fit(training, some_digits(), recipe, Hooks(lambda epoch, metrics: epochs.append(epoch))) == ended
    assert len(epochs) == expected


# Scaled gradients


def test_in_float16_gradients_are_scaled_and_clipped_as_they_are() -> None:
    data, norms = some_digits(), []
    training = training_of(plain(), precision="float16")
    training.optimizer.register_step_pre_hook(
        lambda *_: norms.append(nn.utils.get_total_norm([weight.grad for weight in training.model.parameters()]))
    )
    fit(training, data, Recipe(2, batch_size=50, seed=0, clip_norm=0.1), Hooks())
    assert max(norms).item() == pytest.approx(0.1, rel=1e-3)
    whole = plain()
    fit(training_of(whole), data, Recipe(2, batch_size=50, seed=0, clip_norm=0.1), Hooks())
    torch.testing.assert_close(weights_of(training.model), weights_of(whole), rtol=0, atol=5e-3)


def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_is_kept() -> None:
    training = training_of(plain(), precision="float16")
    before = weights_of(training.model)
    training.scaler.scale(torch.tensor(0.0))  # as of a loss
    for weight in training.model.parameters():
        weight.grad = torch.full_like(weight, float("inf"))
    training.take_step(clip_norm=None)
    assert torch.equal(weights_of(training.model), before)
    assert training.scaler.get_scale() == 2.0**15  # half of the first one
    again = training_of(plain(), precision="float16")
    again.restore(training.state())
    assert again.scaler.get_scale() == 2.0**15
