"""Which weights a training ends with, and the test accuracy of the others."""

import pytest
import torch
from helpers import classifier, some_digits
from torch import nn

from kdpipe.losses import CrossEntropy
from kdpipe.settings.metric_names import METRICS, Metric, Select
from kdpipe.system.hardware import Hardware
from kdpipe.system.interruption import Interrupted
from kdpipe.training import loop
from kdpipe.training.checkpoint import copy_state
from kdpipe.training.loop import Hooks, Recipe, fit, select
from kdpipe.training.observed import Observed
from kdpipe.training.schedules import constant
from kdpipe.training.state import Training


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 1), ("balanced_accuracy", 2), ("macro_f1", 3)])
def test_the_best_weights_are_those_of_the_metric_that_was_asked_for(metric: Metric, best: int) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = Training(
        Observed(model), CrossEntropy(), optimizer, constant(optimizer, 3, 1), Hardware(torch.device("cpu"))
    )
    recipe = Recipe(3, batch_size=50, seed=0, select="best", metric=metric)
    # By accuracy the first epoch is best, by balanced accuracy the second, by macro F1 the third.
    measured = [(0.9, 0.5, 0.4), (0.8, 0.7, 0.5), (0.7, 0.6, 0.6)]
    for epoch, values in enumerate(measured, start=1):
        training.begin_epoch(epoch)
        select(training, {f"val/{name}": value for name, value in zip(METRICS, values, strict=True)}, recipe)
    reached = {f"selected/{name}": value for name, value in zip(METRICS, measured[best - 1], strict=True)}
    assert training.selected == {"selected/epoch": best, **reached}
    assert training.highest == reached[f"selected/{metric}"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("choice", ["last", "best"])
def test_an_interruption_while_the_other_weights_are_tested_loses_nothing(
    choice: Select, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, data = classifier(), some_digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    training = Training(
        Observed(model), CrossEntropy(), optimizer, constant(optimizer, 3, 1), Hardware(torch.device("cpu"))
    )
    recipe, last = Recipe(3, batch_size=50, seed=0, select=choice), {}

    def evaluate_once(network: nn.Module, *arguments: object) -> dict[str, float]:
        if "test" in arguments:
            raise Interrupted(15)
        return evaluate(network, *arguments)

    def keep() -> None:
        last.update(copy_state(model))
        # Others than the last ones, whatever the validation images say.
        training.best = {name: tensor + 1 for name, tensor in last.items()}

    evaluate = loop.evaluate
    with monkeypatch.context() as interrupted, pytest.raises(Interrupted):
        interrupted.setattr(loop, "evaluate", evaluate_once)
        fit(training, data, recipe, Hooks(on_checkpoint=keep))
    assert equal(training.state()["learner"], last)  # what is kept to continue from

    other = "test/accuracy_last" if choice == "best" else "test/accuracy_best"
    assert other in fit(training, data, recipe, Hooks())
    assert equal(copy_state(model), training.best if choice == "best" else last)
