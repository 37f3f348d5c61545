"""Weights of classes in the cross-entropy: PyTorch's weighted mean, in every loss that has labels."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from kdpipe import losses
from kdpipe.losses import BCE, DKD, KD, CrossEntropy, LabelSmoothing, Loss, Mutual, cross_entropy
from kdpipe.losses.outputs import Outputs

any_weights = settings(max_examples=40, deadline=None)
WEIGHTS = arrays(np.float64, 4, elements=st.floats(0.01, 100)).map(torch.from_numpy)
LOGITS = arrays(np.float64, (6, 4), elements=st.floats(-20, 20)).map(torch.from_numpy)
LABELS = arrays(np.int64, 6, elements=st.integers(0, 3)).map(torch.from_numpy)
SMOOTHING = st.sampled_from([0.0, 0.1, 0.5])
GIVEN = {"student": LOGITS, "labels": LABELS, "weights": WEIGHTS, "smoothing": SMOOTHING}


@any_weights
@given(**GIVEN)
def test_of_labels_it_is_pytorchs(student: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> None:
    expected = F.cross_entropy(student, labels, weights, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(student, labels, smoothing, weights), expected)


@any_weights
@given(**GIVEN)
def test_shares_that_are_whole_labels_count_like_them(
    student: Tensor, labels: Tensor, weights: Tensor, smoothing: float
) -> None:
    found = cross_entropy(student, F.one_hot(labels, 4).double(), smoothing, weights)
    torch.testing.assert_close(found, cross_entropy(student, labels, smoothing, weights))


@any_weights
@given(**GIVEN, first=st.floats(0, 1))
def test_only_the_ratios_of_the_weights_matter(
    student: Tensor, labels: Tensor, weights: Tensor, smoothing: float, first: float
) -> None:
    one_hot = F.one_hot(labels, 4).double()
    for truth in (labels, first * one_hot + (1 - first) * one_hot.roll(1, 0)):
        found = cross_entropy(student, truth, smoothing, weights)
        torch.testing.assert_close(cross_entropy(student, truth, smoothing, 10 * weights), found)
        alike = cross_entropy(student, truth, smoothing, torch.full((4,), 3.0))
        torch.testing.assert_close(alike, cross_entropy(student, truth, smoothing))


@any_weights
@given(**GIVEN)
def test_images_without_a_label_do_not_count(
    student: Tensor, labels: Tensor, weights: Tensor, smoothing: float
) -> None:
    some = torch.where(torch.arange(6) < 4, labels, -1)
    expected = cross_entropy(student[:4], labels[:4], smoothing, weights)
    torch.testing.assert_close(cross_entropy(student, some, smoothing, weights), expected)


def test_a_batch_without_labels_teaches_nothing() -> None:
    student = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = cross_entropy(student, torch.full((3,), -1), class_weights=torch.tensor([1e-3, 1, 2, 3]))
    loss.backward()
    assert loss == 0 and not student.grad.any()


TAUGHT = torch.tensor([[2.0, 0], [0, 1], [1, 1], [0.5, 0]])
ANSWERS = torch.tensor([[1.0, 0], [0, 2], [1, 3], [-1, 0]])
TRUTH = torch.tensor([0, 0, 0, 1])


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (CrossEntropy(), 1),
        (LabelSmoothing(0.1), None),  # of which the cross-entropy is a measure alone
        (BCE(), None),
        (KD(0, 4), 1),
        (KD(0.3, 4), 0.7),
        (DKD(alpha=1, beta=0, temperature=4, warmup=0, weight=1, ce_weight=0.5), 0.5),
        (Mutual(1), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_loss_weighs_its_cross_entropy_and_nothing_else(loss: Loss, weight: float | None) -> None:
    def parts() -> dict[str, Tensor]:
        teacher = None if isinstance(loss, KD) and loss.alpha == 0 else Outputs(TAUGHT)
        return loss(Outputs(ANSWERS), teacher, TRUTH, torch.arange(4), 1)

    before = parts()
    loss.class_weights = torch.tensor([0.5, 2])
    after = parts()
    expected = F.cross_entropy(ANSWERS, TRUTH, torch.tensor([0.5, 2]))
    torch.testing.assert_close(after["ce"], expected)
    assert after["ce"] != before["ce"] and after["loss"] != before["loss"]
    assert {name: after[name] for name in after.keys() - {"loss", "ce", "peer_ce"}} == {
        name: before[name] for name in before.keys() - {"loss", "ce", "peer_ce"}
    }
    change = after["ce"] - before["ce"] + after.get("peer_ce", 0) - before.get("peer_ce", 0)
    if weight is not None:
        torch.testing.assert_close(after["loss"] - before["loss"], weight * change)
    assert "class_weights" not in loss.state_dict()


def test_all_other_methods_inherit_it() -> None:
    own = {
        name
        for name, found in vars(losses).items()
        if inspect.isclass(found) and issubclass(found, Loss) and "forward" in vars(found)
    }
    tested = {"BCE", "CrossEntropy", "LabelSmoothing", "Mutual", "WeightedLoss", "AlphaLoss"}
    assert own == tested | {"Loss", "CombinedLoss"}  # which has that of its first loss
