"""Epochs that draw all classes alike: `dataset.sampler=balanced`."""

import pytest
import torch
from helpers import classifier, fit_for_test, some_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdpipe.data import ImageDataset
from kdpipe.data.balancing import balanced_draw
from kdpipe.losses import KD, CrossEntropy, Loss
from kdpipe.losses.base import Parts
from kdpipe.losses.outputs import Outputs
from kdpipe.system.hardware import Hardware
from kdpipe.system.interruption import Interrupted
from kdpipe.system.randomness import generator
from kdpipe.training.checkpoint import copy_state
from kdpipe.training.loop import Hooks, Recipe, fit
from kdpipe.training.observed import Observed
from kdpipe.training.schedules import constant
from kdpipe.training.state import Training
from kdpipe.training.teacher import FrozenTeacher, Teacher

CPU = Hardware(torch.device("cpu"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 4), max_size=60), st.integers(0, 1000))
def test_as_many_positions_come_out_and_each_without_a_label_once(labels: list[int], seed: int) -> None:
    truth = torch.tensor([0, *labels])  # images to learn from have labels
    positions = torch.arange(len(truth)) + 100
    drawn = balanced_draw(positions, truth, generator(seed, "sampler/1"))
    assert len(drawn) == len(positions) and torch.isin(drawn, positions).all()
    of_drawn = truth[drawn - 100]
    assert torch.equal(drawn[of_drawn < 0].sort().values, positions[truth < 0])
    assert torch.equal(drawn, balanced_draw(positions, truth, generator(seed, "sampler/1")))


def test_rare_classes_are_as_likely_as_common_ones_and_images_of_a_class_alike() -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    draws = [balanced_draw(torch.arange(1000), labels, generator(0, f"sampler/{epoch}")) for epoch in range(30)]
    counts = torch.cat(draws).bincount(minlength=1000)
    by_class = torch.stack([counts[labels == label].sum() for label in range(3)]).double()
    assert by_class.sum() == 30_000
    assert (by_class / 10_000 - 1).abs().max() < 0.03  # four standard deviations
    rare = counts[labels == 2].double()
    assert (rare / 1000 - 1).abs().max() < 0.15
    assert not torch.equal(draws[0], draws[1])


class Noting:
    """Mixed into a loss: notes the images that it is shown."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        self.__dict__.setdefault("seen", []).append(indices)
        return super().forward(student, teacher, labels, indices, epoch)


class NotingCrossEntropy(Noting, CrossEntropy):
    pass


class NotingKD(Noting, KD):
    pass


def skewed_digits() -> ImageDataset:
    """Of the digits from 5 on, two training images each."""
    data = some_digits()
    train = data.splits["train"]
    rank = [int((data.labels[train[:place]] == data.labels[image]).sum()) for place, image in enumerate(train)]
    kept = (data.labels[train] < 5) | (torch.tensor(rank) < 2)
    data.splits["train"] = train[kept]
    return data


def seen_by(loss: Loss, data: ImageDataset, teacher: Teacher | None = None) -> Tensor:
    torch.manual_seed(0)
    student = classifier()
    fit_for_test(
        student, data, loss, torch.optim.SGD(student.parameters(), lr=0.01), epochs=2, teacher=teacher, balanced=True
    )
    return torch.cat(loss.seen)


def test_both_arms_of_a_seed_see_the_same_images() -> None:
    data = skewed_digits()
    alone = seen_by(NotingCrossEntropy(), data)
    assert torch.equal(seen_by(NotingKD(0.5, 4), data, FrozenTeacher(classifier())), alone)
    assert len(alone) == 2 * len(data.splits["train"])  # an epoch has as many as without the sampler
    shares = data.labels[alone].bincount() / len(alone)
    assert data.labels[data.splits["train"]].bincount().min() == 2
    assert shares.min() > 0.05 and shares.max() < 0.16


def test_an_interrupted_epoch_goes_on_with_the_images_that_it_had_drawn() -> None:
    data, recipe = skewed_digits(), Recipe(2, batch_size=50, seed=0, balanced=True)

    def begin() -> tuple[nn.Module, Training]:
        torch.manual_seed(0)
        model = classifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, Training(Observed(model), CrossEntropy(), optimizer, constant(optimizer, 2, 1), CPU)

    whole, training = begin()
    fit(training, data, recipe, Hooks())
    _, training = begin()

    def interrupt() -> None:
        if training.steps == 2:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        fit(training, data, recipe, Hooks(on_step=interrupt))
    state = training.state()
    again, training = begin()
    training.restore(state)
    fit(training, data, recipe, Hooks())
    expected, found = copy_state(whole), copy_state(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
