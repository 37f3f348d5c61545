"""What losses make of labels: smoothed in every method, one question for each class, those that a teacher gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax
from torch import Tensor

from kdpipe.losses import BCE, DIST, KD, CombinedLoss, CrossEntropy, Hard, Loss, Mutual, bce, hard
from kdpipe.losses.outputs import Outputs

DRAW = np.random.default_rng(0)
STUDENT, TEACHER = (torch.from_numpy(3 * DRAW.standard_normal((6, 4))) for _ in range(2))
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
MIXED = 0.7 * F.one_hot(LABELS, 4).double() + 0.3 * F.one_hot(LABELS.flip(0), 4).double()


def parts(loss: Loss, labels: Tensor = LABELS) -> dict[str, Tensor]:
    return loss(Outputs(STUDENT), Outputs(TEACHER), labels, torch.arange(6), 1)


# Binary cross-entropy


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["labels", "mixed"])
def test_bce_asks_for_each_class_whether_it_is_there(labels: Tensor, smoothing: float) -> None:
    shares = (labels if labels.is_floating_point() else F.one_hot(labels, 4)).numpy()
    targets = shares * (1 - smoothing) + smoothing / 4
    there = expit(STUDENT.numpy())
    expected = -(targets * np.log(there) + (1 - targets) * np.log(1 - there)).mean()
    assert bce(STUDENT, labels, smoothing).item() == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [None, 0.2, 0.02])
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_bce_is_timm_s(smoothing: float, threshold: float | None) -> None:
    theirs = pytest.importorskip("timm.loss").BinaryCrossEntropy(smoothing, threshold)
    torch.testing.assert_close(bce(STUDENT, LABELS, smoothing, threshold), theirs(STUDENT, LABELS))
    # Mixed images are smoothed beforehand there, as timm's Mixup does.
    smoothed = (1 - smoothing) * MIXED + smoothing / 4
    torch.testing.assert_close(bce(STUDENT, MIXED, smoothing, threshold), theirs(STUDENT, smoothed))


def test_above_the_threshold_both_classes_of_a_mixed_image_are_there() -> None:
    both = (MIXED > 0).double()
    torch.testing.assert_close(bce(STUDENT, MIXED, threshold=0.2), F.binary_cross_entropy_with_logits(STUDENT, both))
    assert bce(STUDENT, MIXED, threshold=0.5) == bce(STUDENT, LABELS, threshold=0.5)


def test_bce_leaves_out_images_without_a_label_and_weighs_the_others() -> None:
    some = torch.where(torch.arange(6) < 4, LABELS, -1)
    torch.testing.assert_close(bce(STUDENT, some), bce(STUDENT[:4], LABELS[:4]))
    assert bce(STUDENT, torch.full((6,), -1)) == 0
    weights = torch.tensor([1.0, 2, 3, 4])
    each = torch.stack([bce(STUDENT[i : i + 1], LABELS[i : i + 1]) for i in range(6)])
    expected = (each * weights[LABELS]).sum() / weights[LABELS].sum()
    torch.testing.assert_close(bce(STUDENT, LABELS, class_weights=weights), expected)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_the_gradient_of_bce_is_its_derivative(threshold: float | None) -> None:
    student = STUDENT.clone().requires_grad_()
    for labels in (LABELS, MIXED):
        assert torch.autograd.gradcheck(lambda z, labels=labels: bce(z, labels, 0.1, threshold), student)


# Hard labels of a teacher


def test_hard_is_the_cross_entropy_with_the_teacher_s_decision() -> None:
    decided = TEACHER.numpy().argmax(axis=1)
    expected = -log_softmax(STUDENT.numpy(), axis=1)[np.arange(6), decided].mean()
    assert hard(STUDENT, TEACHER).item() == pytest.approx(expected)
    named = parts(Hard(0.3))
    assert named["hard"].item() == pytest.approx(expected)
    assert named["loss"].item() == pytest.approx(0.7 * F.cross_entropy(STUDENT, LABELS).item() + 0.3 * expected)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 10))
def test_how_certain_the_teacher_is_does_not_matter_to_hard(factor: float) -> None:
    assert hard(STUDENT, factor * TEACHER) == hard(STUDENT, TEACHER)


# Label smoothing


@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["labels", "mixed"])
@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        KD(0.3, 4),
        Hard(0.5),
        DIST(2, 2, 4, 1, 0.5),
        Mutual(1),
        CombinedLoss(KD(0.3, 4), DIST(1, 1, 1, 1, 1)),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_every_loss_smooths_the_labels_of_its_cross_entropy_and_nothing_else(loss: Loss, labels: Tensor) -> None:
    before = parts(loss, labels)
    loss.components["loss"].label_smoothing = 0.1
    after = parts(loss, labels)
    torch.testing.assert_close(after["ce"], F.cross_entropy(STUDENT, labels, label_smoothing=0.1))
    assert after["ce"] != before["ce"] and after["loss"] != before["loss"]
    unchanged = after.keys() - {"loss", "ce", "peer_ce"}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    loss.components["loss"].label_smoothing = 0


def test_bce_smooths_its_labels() -> None:
    loss = BCE()
    loss.label_smoothing = 0.1
    torch.testing.assert_close(parts(loss)["loss"], bce(STUDENT, LABELS, 0.1))
