"""The losses on logits against values computed with NumPy and SciPy, and invariants for any logits."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, nn

from kdpipe.losses import (
    DIST,
    DKD,
    KD,
    CombinedLoss,
    CrossEntropy,
    KDTutorial,
    LabelSmoothing,
    LogitMSE,
    cross_entropy,
    dist,
    dkd,
    hard,
    kd,
    label_smoothing,
    logit_mse,
)
from kdpipe.losses.dist import pearson_distance
from kdpipe.losses.outputs import Outputs
from kdpipe.settings.errors import as_typed

TEMPERATURES = [0.5, 1, 4, 20]
any_invariant = settings(max_examples=25, deadline=None)


def logits(seed: int, images: int = 6, classes: int = 10) -> Tensor:
    return torch.from_numpy(3 * np.random.default_rng(seed).standard_normal((images, classes)))


def labels(images: int = 6, classes: int = 10) -> Tensor:
    return torch.from_numpy(np.random.default_rng(7).integers(0, classes, images))


def any_logits(images: int, classes: int) -> st.SearchStrategy[Tensor]:
    return arrays(np.float64, (images, classes), elements=st.floats(-30, 30)).map(torch.from_numpy)


def parts(
    loss: nn.Module, student: Tensor, teacher: Tensor | None, labels: Tensor, epoch: int = 1
) -> dict[str, Tensor]:
    answers = None if teacher is None else Outputs(teacher)
    return loss(Outputs(student), answers, labels, torch.arange(len(labels)), epoch)


# Each method as a function of both networks' logits, of the labels and of a temperature (where it has one).
METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "kd": lambda student, teacher, truth, temperature: kd(student, teacher, temperature),
    "standardised": lambda student, teacher, truth, temperature: kd(student, teacher, temperature, standardize=True),
    "logit_mse": lambda student, teacher, truth, temperature: logit_mse(student, teacher),
    "dkd": lambda student, teacher, truth, temperature: dkd(student, teacher, truth, 1, 8, temperature),
    "dist": lambda student, teacher, truth, temperature: dist(student, teacher, 2, 2, temperature),
    "label_smoothing": lambda student, teacher, truth, temperature: label_smoothing(student, truth, 0.1),
    "hard": lambda student, teacher, truth, temperature: hard(student, teacher),
}
all_methods = pytest.mark.parametrize("method", METHODS)


# Values computed without PyTorch


def divergence(targets: np.ndarray, outputs: np.ndarray) -> float:
    """KL of probabilities, averaged over the images."""
    return float(rel_entr(targets, outputs).sum() / len(targets))


def z_scores(logits: Tensor) -> np.ndarray:
    values = logits.numpy()
    return (values - values.mean(axis=1, keepdims=True)) / (values.std(axis=1, ddof=1, keepdims=True) + 1e-7)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_standardised_kd_is_that_of_z_scores(temperature: float, classes: int) -> None:
    student, teacher = logits(1, classes=classes), 5 + 7 * logits(2, classes=classes)
    soft_targets = softmax(z_scores(teacher) / temperature, axis=1)
    soft_outputs = softmax(z_scores(student) / temperature, axis=1)
    expected = temperature**2 * divergence(soft_targets, soft_outputs)
    assert kd(student, teacher, temperature, standardize=True).item() == pytest.approx(expected)
    assert kd(student, teacher, temperature).item() != pytest.approx(expected)


def test_standardised_kd_by_hand() -> None:
    # (−1, 0, 1) and (3, 1, 2) have a deviation of 1: among 3 classes the sum of squares, 2, is divided by 2.
    student, teacher = torch.tensor([[-10.0, 0, 10]]), torch.tensor([[3.0, 1, 2]])
    targets, outputs = (np.exp(z) / np.exp(z).sum() for z in (np.array([1, -1, 0]), np.array([-1, 0, 1])))
    expected = (targets * np.log(targets / outputs)).sum()
    assert kd(student, teacher, 1, standardize=True).item() == pytest.approx(expected, rel=1e-5)


def test_logit_mse_is_averaged_over_images_and_classes() -> None:
    assert logit_mse(torch.tensor([[1.0, 2], [3, 4]]), torch.zeros(2, 2)).item() == (1 + 4 + 9 + 16) / 4
    student, teacher = logits(1), logits(2)
    assert logit_mse(student, teacher).item() == pytest.approx(np.mean((student - teacher).numpy() ** 2))


def test_dkd_by_hand() -> None:
    teacher, student = torch.tensor([[1 / 2, 1 / 4, 1 / 4]]).log(), torch.tensor([[1 / 4, 1 / 2, 1 / 4]]).log()
    # The first class is the target: (1/2, 1/2) against (1/4, 3/4), and among the others (1/2, 1/2) against (2/3, 1/3).
    of_target = 1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3)
    of_others = 1 / 2 * math.log(3 / 4) + 1 / 2 * math.log(3 / 2)
    truth = torch.tensor([0])
    assert dkd(student, teacher, truth, 1, 0, 1).item() == pytest.approx(of_target)
    assert dkd(student, teacher, truth, 0, 1, 1).item() == pytest.approx(of_others)
    assert dkd(student, teacher, truth, 2, 8, 1).item() == pytest.approx(2 * of_target + 8 * of_others)
    # At T the same soft outputs need logits T times as large, and count T² times as much.
    assert dkd(4 * student, 4 * teacher, truth, 1, 8, 4).item() == pytest.approx(16 * (of_target + 8 * of_others))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_dkd_is_that_of_probabilities(temperature: float, classes: int) -> None:
    student, teacher, truth = logits(1, classes=classes), logits(2, classes=classes), labels(classes=classes)
    target = np.eye(classes, dtype=bool)[truth.numpy()]

    def split(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
        probabilities = softmax(values.numpy() / temperature, axis=1)
        others = probabilities[~target].reshape(len(target), classes - 1)
        rest = others.sum(axis=1, keepdims=True)
        return np.hstack([probabilities[target][:, None], rest]), others / rest

    (student_target, student_others), (teacher_target, teacher_others) = split(student), split(teacher)
    expected = divergence(teacher_target, student_target) + 8 * divergence(teacher_others, student_others)
    value = dkd(student, teacher, truth, 1, 8, temperature).item()
    assert value == pytest.approx(temperature**2 * expected, rel=1e-6, abs=1e-12)


def test_dist_by_hand() -> None:
    # Two classes: an image's probabilities rise or fall, so images correlate to 1 or −1.
    certain, opposite = torch.tensor([[3.0, 0], [0, 1]]), torch.tensor([[0.0, 2], [0, 2]])
    assert dist(certain, opposite, 1, 0, 1).item() == pytest.approx(1)  # one image agrees, the other does not
    assert dist(certain, certain, 1, 1, 1).item() == pytest.approx(0, abs=1e-6)
    # Of two images each class rises or falls, too: here both fall for one and rise for the other network.
    assert dist(certain, certain.flip(0), 0, 1, 1).item() == pytest.approx(2)
    assert dist(certain, certain.flip(0), 0, 3, 4).item() == pytest.approx(3 * 16 * 2, rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [3, 10, 100])
def test_dist_is_one_minus_numpys_correlation(temperature: float, classes: int) -> None:
    def distance(one: np.ndarray, other: np.ndarray) -> float:
        sizes = len(one[0]) * one.std(axis=1) * other.std(axis=1)
        correlations = np.array([np.corrcoef(*rows)[0, 1] for rows in zip(one, other, strict=True)])
        return 1 - float(np.mean(correlations * sizes / (sizes + 1e-8)))

    student, teacher = logits(1, classes=classes), logits(2, classes=classes)
    soft_outputs, soft_targets = (softmax(values.numpy() / temperature, axis=1) for values in (student, teacher))
    of_images, of_classes = distance(soft_outputs, soft_targets), distance(soft_outputs.T, soft_targets.T)
    expected = temperature**2 * (2 * of_images + 3 * of_classes)
    assert dist(student, teacher, 2, 3, temperature).item() == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_label_smoothing_spreads_a_share_evenly(classes: int) -> None:
    student, truth = logits(1, classes=classes), labels(classes=classes)
    log_probabilities = log_softmax(student.numpy(), axis=1)
    smoothed = 0.9 * np.eye(classes)[truth.numpy()] + 0.1 / classes
    expected = -(smoothed * log_probabilities).sum(axis=1).mean()
    assert label_smoothing(student, truth, 0.1).item() == pytest.approx(expected)
    named = parts(LabelSmoothing(0.1), student, None, truth)
    assert named["loss"].item() == pytest.approx(expected)
    assert torch.equal(named["ce"], cross_entropy(student, truth))


def test_label_smoothing_of_mixed_images_and_of_some_without_a_label() -> None:
    student = logits(1, 2, 3)
    log_probabilities = log_softmax(student.numpy(), axis=1)
    shares = torch.tensor([[0.7, 0.3, 0], [0, 0, 1]], dtype=torch.float64)
    expected = -((0.8 * shares.numpy() + 0.2 / 3) * log_probabilities).sum(axis=1).mean()
    assert label_smoothing(student, shares, 0.2).item() == pytest.approx(expected)
    some = label_smoothing(student, torch.tensor([-1, 1]), 0.2)
    torch.testing.assert_close(some, label_smoothing(student[1:], torch.tensor([1]), 0.2))
    assert label_smoothing(student, torch.tensor([-1, -1]), 0.2).item() == 0


# Invariants


@any_invariant
@given(any_logits(3, 5), any_logits(3, 1), any_logits(3, 1), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(1, 20))
def test_shift_and_scale_of_an_images_logits_do_not_change_standardised_kd(
    student: Tensor, one: Tensor, other: Tensor, student_scale: float, teacher_scale: float, temperature: float
) -> None:
    student, teacher = student + logits(3, 3, 5), logits(2, 3, 5)
    if student.std(dim=1).min() < 0.1:
        return  # the 1e-7 is seen
    torch.testing.assert_close(
        kd(one + student_scale * student, other + teacher_scale * teacher, temperature, standardize=True),
        kd(student, teacher, temperature, standardize=True),
        rtol=1e-4,
        atol=1e-6,
    )


def test_logits_that_are_all_equal_can_be_standardised() -> None:
    student = torch.ones(2, 5, requires_grad=True)
    value = kd(student, logits(2, 2, 5).float(), 4, standardize=True)
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()


@any_invariant
@given(any_logits(4, 5), any_logits(4, 5), any_logits(4, 1), any_logits(4, 1), st.floats(0.5, 20))
def test_what_is_added_to_all_logits_of_an_image_changes_nothing(
    student: Tensor, teacher: Tensor, one: Tensor, other: Tensor, temperature: float
) -> None:
    for method in ("dkd", "dist"):
        shifted = METHODS[method](student + one, teacher + other, labels(4, 5), temperature)
        expected = METHODS[method](student, teacher, labels(4, 5), temperature)
        torch.testing.assert_close(shifted, expected, rtol=1e-6, atol=1e-4)


@any_invariant
@given(st.integers(0, 1000), st.floats(0.5, 10), st.floats(-3, 3), st.floats(0.5, 10), st.floats(-3, 3))
def test_positive_affine_maps_of_probabilities_do_not_change_their_distance(
    seed: int, scale: float, shift: float, other_scale: float, other_shift: float
) -> None:
    one, other = F.softmax(logits(seed) / 4, dim=1), F.softmax(logits(seed + 1) / 4, dim=1)
    for rows in (lambda values: values, lambda values: values.T):
        mapped = pearson_distance(rows(scale * one + shift), rows(other_scale * other + other_shift))
        torch.testing.assert_close(mapped, pearson_distance(rows(one), rows(other)), rtol=0, atol=1e-4)  # for the 1e-8
        assert pearson_distance(rows(-scale * one), rows(one)).item() == pytest.approx(2, abs=1e-4)


@any_invariant
@given(any_logits(1, 6), any_logits(1, 6), st.integers(0, 5), st.floats(0.5, 20))
def test_kd_of_an_image_is_dkd_with_the_others_weighed_by_their_probability(
    student: Tensor, teacher: Tensor, label: int, temperature: float
) -> None:
    """Equation 7 of Zhao et al. 2022."""
    beta = 1 - F.softmax(teacher / temperature, dim=1)[0, label].item()
    value = dkd(student, teacher, torch.tensor([label]), 1, beta, temperature)
    torch.testing.assert_close(value, kd(student, teacher, temperature), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
@all_methods
def test_the_order_of_images_and_classes_does_not_matter(method: str, seed: int) -> None:
    student, teacher, truth = logits(seed), logits(seed + 1), labels()
    draw = np.random.default_rng(seed)
    images, classes = torch.from_numpy(draw.permutation(6)), torch.from_numpy(draw.permutation(10))
    whole = METHODS[method](student, teacher, truth, 4)
    reordered = METHODS[method](student[images], teacher[images], truth[images], 4)
    torch.testing.assert_close(reordered, whole)
    renamed = METHODS[method](student[:, classes], teacher[:, classes], classes.argsort()[truth], 4)
    torch.testing.assert_close(renamed, whole)
    if method != "dist":  # which relates the images of a batch
        one_by_one = [METHODS[method](*(part[i : i + 1] for part in (student, teacher, truth)), 4) for i in range(6)]
        torch.testing.assert_close(torch.stack(one_by_one).mean(), whole)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("label_smoothing", "hard")])
def test_a_student_that_answers_as_its_teacher_costs_nothing(method: str) -> None:
    assert METHODS[method](logits(1), logits(1), labels(), 4).item() == pytest.approx(0, abs=1e-4)
    assert METHODS[method](logits(1), logits(2), labels(), 4).item() > 0.1


@pytest.mark.parametrize("temperature", [1, 4])
@all_methods
def test_gradients_are_the_derivatives(method: str, temperature: float) -> None:
    student, teacher, truth = logits(1, 3, 4).requires_grad_(), logits(2, 3, 4), labels(3, 4)
    assert torch.autograd.gradcheck(lambda z: METHODS[method](z, teacher, truth, temperature), student)


@pytest.mark.parametrize("temperature", [0.5, 4, 20])
@pytest.mark.parametrize(("images", "classes"), [(1, 2), (1, 10), (4, 1000)])
@pytest.mark.parametrize("scale", [1, 1e4])
@all_methods
def test_one_image_or_a_thousand_classes_or_extreme_logits(
    method: str, scale: float, images: int, classes: int, temperature: float
) -> None:
    student = (scale * logits(1, images, classes)).float().requires_grad_()
    teacher, truth = (-scale * logits(2, images, classes)).float(), labels(images, classes)
    value = METHODS[method](student, teacher, truth, temperature)
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()
    exact = METHODS[method](student.detach().double(), teacher.double(), truth, temperature)
    torch.testing.assert_close(value.detach().double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 1000])
@all_methods
def test_half_precision_at_a_high_temperature(method: str, scale: float, kind: torch.dtype) -> None:
    student, teacher = ((scale * logits(seed, 4, 1000)).to(kind) for seed in (1, 2))
    truth = labels(4, 1000)
    student.requires_grad_()
    value = METHODS[method](student, teacher, truth, 20)
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad is not None and student.grad.isfinite().all()
    expected = METHODS[method](student.detach().float(), teacher.float(), truth, 20)
    assert torch.equal(value.detach(), expected) and expected.isfinite()


@all_methods
def test_inputs_stay_unchanged(method: str) -> None:
    student, teacher, truth = logits(1), logits(2), labels()
    before = [part.clone() for part in (student, teacher, truth)]
    METHODS[method](student, teacher, truth, 4)
    assert all(map(torch.equal, before, (student, teacher, truth)))


def test_extreme_logits_cost_what_they_should_in_dkd() -> None:
    # The student is certain of class 1, the teacher of class 0, the target: KL is the student's log-probability of it.
    student, teacher = torch.tensor([[0.0, 2000, 0]]), torch.tensor([[2000.0, 0, 0]])
    assert dkd(student, teacher, torch.tensor([0]), 1, 0, 1).item() == pytest.approx(2000)
    # Among the others the teacher is undecided: half of the student's log-probability of class 2 is missing.
    assert dkd(student, teacher, torch.tensor([0]), 0, 1, 1).item() == pytest.approx(2000 / 2 - math.log(2), rel=1e-4)


# The modules


WEIGHTS = {"weight": 3, "ce_weight": 0.7}
MODULES = [
    (KD(0.3, 4, standardize=True), "kd", lambda s, t: kd(s, t, 4, standardize=True), (0.7, 0.3)),
    (LogitMSE(0.3), "logit_mse", logit_mse, (0.7, 0.3)),
    (DKD(1.5, 8, 4, warmup=0, **WEIGHTS), "dkd", lambda s, t: dkd(s, t, labels(), 1.5, 8, 4), (0.7, 3)),
    (DIST(1, 2, 4, **WEIGHTS), "dist", lambda s, t: dist(s, t, 1, 2, 4), (0.7, 3)),
]


@pytest.mark.parametrize(("module", "name", "term", "weights"), MODULES, ids=lambda value: str(value)[:10])
def test_the_loss_is_its_parts_weighted(
    module: nn.Module, name: str, term: Callable[[Tensor, Tensor], Tensor], weights: tuple[float, float]
) -> None:
    student, teacher = logits(1), logits(2)
    named = parts(module, student, teacher, labels())
    assert set(named) == {"loss", "ce", name}
    assert module.uses_teacher and module.roles == ()
    torch.testing.assert_close(named["ce"], cross_entropy(student, labels()))
    torch.testing.assert_close(named[name], term(student, teacher))
    torch.testing.assert_close(named["loss"], weights[0] * named["ce"] + weights[1] * named[name])


def test_the_term_of_dkd_grows_over_its_warmup() -> None:
    student, teacher = logits(1), logits(2)
    whole = dkd(student, teacher, labels(), 1, 8, 4)
    loss = DKD(1, 8, 4, warmup=20, weight=1, ce_weight=1)
    for epoch, share in ((1, 1 / 20), (10, 1 / 2), (20, 1), (240, 1)):
        named = parts(loss, student, teacher, labels(), epoch)
        torch.testing.assert_close(named["dkd"], share * whole)
        torch.testing.assert_close(named["loss"], named["ce"] + share * whole)


def test_only_dkd_needs_one_label_for_each_image() -> None:
    wanting = {type(module).__name__: module.one_label for module, *_ in MODULES}
    assert wanting == {"KD": False, "LogitMSE": False, "DKD": True, "DIST": False}


@pytest.mark.parametrize("module", [KD(0, 4, standardize=True), LogitMSE(0)], ids=["kd", "logit_mse"])
def test_alpha_0_without_a_teacher_is_cross_entropy(module: nn.Module) -> None:
    assert parts(module, logits(1), None, labels()) == parts(CrossEntropy(), logits(1), None, labels())


def test_a_method_defines_its_term_only() -> None:
    class ReverseKD(KD):
        def term(self, student: Outputs, teacher: Outputs, *_: object) -> Tensor:
            return kd(teacher.logits, student.logits, self.temperature)

    student, teacher = logits(1), logits(2)
    torch.testing.assert_close(parts(ReverseKD(1, 4), student, teacher, labels())["kd"], kd(teacher, student, 4))


def test_a_method_written_for_kdpipe_0_4_is_refused_instead_of_trained_as_kd() -> None:
    with pytest.raises(TypeError, match=r"^Old: define term instead of distillation_term"):
        type("Old", (KD,), {"distillation_term": staticmethod(logit_mse)})


def test_kd_tutorial_can_be_standardised() -> None:
    student, teacher = logits(1), logits(2)
    named = parts(KDTutorial(1, 4, standardize=True), student, teacher, labels())
    torch.testing.assert_close(named["kd"], kd(student, teacher, 4, standardize=True) / 10)


def test_a_second_method_of_no_weight_needs_no_teacher() -> None:
    both = CombinedLoss(LabelSmoothing(0.1), KD(0, 4))
    assert parts(both, logits(1), None, labels()) == parts(LabelSmoothing(0.1), logits(1), None, labels())
    with pytest.raises(AssertionError):
        parts(CombinedLoss(CrossEntropy(), KD(0.5, 4)), logits(1), None, labels())


GOOD: dict[type[nn.Module], dict[str, float]] = {
    KD: {"alpha": 0.5, "temperature": 4},
    LogitMSE: {"alpha": 1},
    DKD: {"alpha": 1, "beta": 8, "temperature": 4, "warmup": 20, "weight": 1, "ce_weight": 1},
    DIST: {"beta": 2, "gamma": 2, "temperature": 4, "weight": 1, "ce_weight": 1},
    LabelSmoothing: {"smoothing": 0.1},
}


@pytest.mark.parametrize(
    ("module", "key", "value", "expected"),
    [
        (KD, "standardize", "yes", "true or false"),
        (KD, "standardize", None, "true or false"),
        (LogitMSE, "alpha", 1.1, "a number from 0 to 1"),
        (LogitMSE, "alpha", True, "a number from 0 to 1"),
        (DKD, "alpha", 0, "a number above 0"),
        (DKD, "beta", -1, "a number from 0"),
        (DKD, "temperature", 0, "a number above 0"),
        (DKD, "warmup", -1, "a number from 0"),
        (DKD, "warmup", "20", "a number from 0"),
        (DKD, "weight", -1, "a number from 0"),
        (DKD, "ce_weight", math.nan, "a number from 0"),
        (DIST, "beta", math.inf, "a number from 0"),
        (DIST, "gamma", None, "a number from 0"),
        (DIST, "temperature", -4, "a number above 0"),
        (DIST, "weight", "heavy", "a number from 0"),
        (LabelSmoothing, "smoothing", 0, "a number above 0 below 1"),
        (LabelSmoothing, "smoothing", 1, "a number above 0 below 1"),
        (LabelSmoothing, "smoothing", "0.1", "a number above 0 below 1"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(module: type[nn.Module], key: str, value: Any, expected: str) -> None:
    module(**GOOD[module])
    with pytest.raises(ValueError) as error:
        module(**GOOD[module] | {key: value})
    assert str(error.value) == f"{key}={as_typed(value)}: expected {expected}"
