"""Metrics of predictions, and of a student compared with its teacher."""

import math
import warnings

import pytest
import torch
from helpers import classifier, some_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from kdpipe.evaluation.inference import evaluate, logits_of
from kdpipe.evaluation.metrics import (
    class_means,
    classification_metrics,
    confusion,
    divergence,
    reliability,
    scaling_temperature,
    teacher_agreement,
)
from kdpipe.settings.metric_names import METRICS
from kdpipe.system.hardware import Hardware

ANSWERS = st.tuples(st.integers(2, 12), st.integers(1, 60), st.integers(0, 10_000)).map(
    lambda drawn: some_answers(*drawn)
)


def some_answers(classes: int, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits and labels that are correlated."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=draw)
    return 2 * torch.randn(images, classes, generator=draw) + torch.eye(classes)[labels], labels


def test_a_case_computed_by_hand() -> None:
    """Two images, two classes: 80 % for the right class, then 60 % for the wrong one."""
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    found = classification_metrics(logits, torch.tensor([0, 1]))
    assert found == {
        "accuracy": 0.5,
        "loss": pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2),
        "brier": pytest.approx((2 * 0.2**2 + 2 * 0.6**2) / 2),
        "ece": pytest.approx((abs(0.8 - 1) + abs(0.6 - 0)) / 2),
        "balanced_accuracy": 0.5,  # all of one class, none of the other
        "macro_f1": pytest.approx((2 / 3 + 0) / 2),
    }


@settings(deadline=None)
@given(ANSWERS)
def test_metrics_match_torchmetrics(answers: tuple[Tensor, Tensor]) -> None:
    logits, labels = answers
    classes = logits.shape[1]
    found = classification_metrics(logits, labels)
    theirs = multiclass_calibration_error(logits.double().softmax(dim=1), labels, classes, n_bins=15)
    assert found["ece"] == pytest.approx(theirs.item(), abs=1e-6)
    assert found["accuracy"] == pytest.approx(multiclass_accuracy(logits, labels, classes, average="micro").item())
    if classes > 5:
        top = multiclass_accuracy(logits, labels, classes, average="micro", top_k=5)
        assert found["top5_accuracy"] == pytest.approx(top.item())
    else:
        assert "top5_accuracy" not in found


@settings(deadline=None)
@given(ANSWERS)
def test_invariants(answers: tuple[Tensor, Tensor]) -> None:
    logits, labels = answers
    found = classification_metrics(logits, labels)
    assert 0 <= found["ece"] <= 1 and 0 <= found["brier"] <= 2 and found["loss"] >= 0
    assert reliability(logits, labels).share.sum() == pytest.approx(1)
    counts = confusion(logits, labels)
    assert counts.sum() == len(labels) and counts.trace() / len(labels) == pytest.approx(found["accuracy"])
    agreement = teacher_agreement(logits, logits, labels)
    assert agreement["agreement"] == 1 and agreement["kl"] == pytest.approx(0, abs=1e-9)
    other = logits.roll(1, dims=0)
    apart = divergence(logits, other)
    assert torch.equal(apart, divergence(other, logits))
    assert (apart > -1e-12).all() and (apart <= math.log(2) + 1e-12).all()


def test_metrics_that_count_all_classes_alike_are_scikit_learns() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 0])
    found = class_means(labels, predicted)
    assert found["balanced_accuracy"] == pytest.approx((7 / 8 + 1 / 2) / 2)
    assert found["macro_f1"] == pytest.approx((14 / 16 + 2 / 4) / 2)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")  # scikit-learn's, of classes without images
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30))
def test_also_where_classes_are_missing(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = torch.tensor(pairs).T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = class_means(labels, predicted)
    if len(set(labels.tolist())) > 1:  # of one class scikit-learn warns
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_an_epoch_and_the_exam_measure_the_same() -> None:
    torch.manual_seed(0)
    model, data, hardware = classifier(), some_digits(), Hardware(torch.device("cpu"))
    measured = evaluate(model, data, "test", hardware)
    labels = data.labels[data.splits["test"]]
    of_exam = classification_metrics(logits_of(model, data, "test", hardware), labels)
    assert measured == pytest.approx({name: of_exam[name] for name in measured}, rel=1e-5)
    assert {*METRICS} <= measured.keys()


def test_agreement_of_a_student_with_its_teacher() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    teacher = torch.eye(3)[torch.tensor([0, 1, 0, 1])]  # two right, two wrong
    student = torch.eye(3)[torch.tensor([0, 2, 0, 2])]  # agrees on one that is right and one that is wrong
    found = teacher_agreement(student, teacher, labels)
    assert (found["agreement"], found["agreement_where_wrong"]) == (0.5, 0.5)
    assert "agreement_where_wrong" not in teacher_agreement(student, torch.eye(3)[labels], labels)


def test_overconfident_probabilities_are_scaled_back() -> None:
    """Labels drawn from softmax(logits), then logits three times as large: the temperature undoes it."""
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=draw)
    labels = logits.softmax(dim=1).multinomial(1, generator=draw).squeeze(1)
    temperature = scaling_temperature(3 * logits, labels)
    assert temperature == pytest.approx(3, rel=0.05)
    assert reliability(3 * logits, labels).error > 0.2
    assert reliability(3 * logits, labels, temperature).error < 0.02


def test_no_temperature_if_the_optimum_is_at_a_limit() -> None:
    labels = torch.tensor([0, 1, 2] * 10)
    right = torch.eye(3)[labels]
    assert scaling_temperature(right, labels) is None  # the sharper the better
    assert scaling_temperature(-9 * right, labels) is None  # the flatter the better
