"""The losses against values computed without PyTorch, and invariants for any logits."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, nn

from kdpipe.losses import KD, CrossEntropy, KDTutorial, cross_entropy, kd, kd_tutorial
from kdpipe.losses.outputs import Outputs
from kdpipe.settings.errors import as_typed

TEMPERATURES = [0.5, 1, 2, 5, 20]
METHODS = pytest.mark.parametrize(("module", "term"), [(KD, kd), (KDTutorial, kd_tutorial)])
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
any_invariant = settings(max_examples=25, deadline=None)


def logits(seed: int, images: int = 6, classes: int = 10) -> Tensor:
    return torch.from_numpy(3 * np.random.default_rng(seed).standard_normal((images, classes)))


def labels(images: int = 6, classes: int = 10) -> Tensor:
    return torch.from_numpy(np.random.default_rng(7).integers(0, classes, images))


def parts(loss: nn.Module, student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    answers = None if teacher is None else Outputs(teacher)
    return loss(Outputs(student), answers, labels, torch.arange(len(labels)), 1)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T²·KL(teacher ‖ student), averaged over the images, by SciPy."""
    soft_targets = softmax(teacher.double().numpy() / temperature, axis=1)
    soft_outputs = softmax(student.double().numpy() / temperature, axis=1)
    return temperature**2 * rel_entr(soft_targets, soft_outputs).sum() / len(student)


def any_logits(images: int, classes: int) -> st.SearchStrategy[Tensor]:
    return arrays(np.float64, (images, classes), elements=st.floats(-30, 30)).map(torch.from_numpy)


def test_kd_of_two_classes_by_hand() -> None:
    # Teacher (3/4, 1/4), student (1/2, 1/2).
    teacher, student = torch.tensor([[math.log(3), 0]]), torch.tensor([[0.0, 0]])
    by_hand = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert kd(student, teacher, 1).item() == pytest.approx(by_hand)
    assert kd_tutorial(student, teacher, 1).item() == pytest.approx(by_hand / 2)
    # At T the same soft outputs need logits T times as large, and count T² times as much.
    assert kd(4 * student, 4 * teacher, 4).item() == pytest.approx(16 * by_hand)


def test_the_divergence_is_the_students_from_the_teacher_and_not_the_other_way_round() -> None:
    teacher, student = torch.tensor([[math.log(3), 0]]), torch.tensor([[0.0, 0]])
    other_way_round = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)
    assert kd(teacher, student, 1).item() == pytest.approx(other_way_round)
    assert kd(student, teacher, 1).item() != pytest.approx(other_way_round)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kd_is_scipys_relative_entropy(temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    expected = divergence(student, teacher, temperature)
    assert kd(student, teacher, temperature).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_precision_of_training_is_enough(temperature: float) -> None:
    student, teacher = logits(1).float(), logits(2).float()
    expected = divergence(student, teacher, temperature)
    assert kd(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_kd_tutorial_is_kd_divided_by_the_number_of_classes(classes: int) -> None:
    student, teacher = logits(1, classes=classes), logits(2, classes=classes)
    for temperature in TEMPERATURES:
        expected = kd(student, teacher, temperature) / classes
        torch.testing.assert_close(kd_tutorial(student, teacher, temperature), expected)


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("temperature", [1, 5])
def test_kd_tutorial_is_the_tutorials_own_recipe(alpha: float, temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    log_outputs = F.log_softmax(student / temperature, dim=1)
    soft = nn.KLDivLoss()(log_outputs, F.softmax(teacher / temperature, dim=1))
    recipe = soft * (alpha * temperature * temperature) + F.cross_entropy(student, labels()) * (1 - alpha)
    loss = parts(KDTutorial(alpha, temperature), student, teacher, labels())["loss"]
    torch.testing.assert_close(loss, recipe)


def test_kd_tutorial_is_silent_where_the_recipe_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd_tutorial(logits(1), logits(2), 5)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_cross_entropy_is_the_mean_of_minus_log_probabilities(classes: int) -> None:
    student, truth = logits(1, classes=classes), labels(classes=classes)
    log_probabilities = log_softmax(student.numpy(), axis=1)
    expected = -np.mean([row[label] for row, label in zip(log_probabilities, truth, strict=True)])
    assert cross_entropy(student, truth).item() == pytest.approx(expected)


def synchronising_cross_entropy(student: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """The formula of kdpipe 0.4, which makes a GPU wait for `labelled.all()`."""
    labelled = labels >= 0
    if labelled.all():
        return F.cross_entropy(student, labels, label_smoothing=label_smoothing)
    total = F.cross_entropy(student, labels, ignore_index=-1, label_smoothing=label_smoothing, reduction="sum")
    return total / labelled.sum().clamp(min=1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("share_unlabelled", [0, 0.3, 1])
@pytest.mark.parametrize("label_smoothing", [0, 0.1, 0.7])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_cross_entropy_without_waiting_is_the_same_to_the_last_bit(
    classes: int, label_smoothing: float, share_unlabelled: float, device: str
) -> None:
    for seed in range(20):
        draw = np.random.default_rng([seed, classes])
        images = int(draw.integers(1, 130))
        truth = torch.from_numpy(draw.integers(0, classes, images))
        truth[torch.from_numpy(draw.random(images) < share_unlabelled)] = -1
        found = []
        for function in (cross_entropy, synchronising_cross_entropy):
            student = logits(seed, images, classes).float().to(device).requires_grad_()
            value = function(student, truth.to(device), label_smoothing)
            (0.3 * value).backward()
            found.append((value, student.grad))
        (value, gradient), (expected, expected_gradient) = found
        assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)
        assert value.isfinite()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_are_the_derivatives(temperature: float) -> None:
    student, teacher = logits(1, 3, 4).requires_grad_(), logits(2, 3, 4)
    for term in (kd, kd_tutorial):
        assert torch.autograd.gradcheck(lambda z, term=term: term(z, teacher, temperature), student)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels(3, 4)), student)
    for loss in (KD(0.3, temperature), KDTutorial(0.3, temperature)):
        whole = lambda z, loss=loss: parts(loss, z, teacher, labels(3, 4))["loss"]  # noqa: E731
        assert torch.autograd.gradcheck(whole, student)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_is_T_times_the_difference_of_soft_outputs(temperature: float) -> None:  # noqa: N802
    student, teacher = logits(1).requires_grad_(), logits(2)
    kd(student, teacher, temperature).backward()
    difference = F.softmax(student / temperature, dim=1) - F.softmax(teacher / temperature, dim=1)
    torch.testing.assert_close(student.grad, temperature * difference.detach() / len(student))


def test_at_a_high_temperature_kd_matches_logits() -> None:
    """Equation 4 of the paper, times T²: the gradient is (z − v) / classes for logits without a mean."""
    student, teacher = logits(1), logits(2)
    student, teacher = (z - z.mean(dim=1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    kd(student, teacher, 1e5).backward()
    expected = (student - teacher).detach() / 10 / len(student)
    torch.testing.assert_close(student.grad, expected, rtol=1e-3, atol=1e-5)


@METHODS
@pytest.mark.parametrize("alpha", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [1, 5])
def test_the_loss_is_its_parts_weighted_by_alpha(
    module: type[KD], term: Callable[..., Tensor], alpha: float, temperature: float
) -> None:
    student, teacher = logits(1), logits(2)
    named = parts(module(alpha, temperature), student, teacher, labels())
    assert set(named) == {"loss", "ce", "kd"}
    torch.testing.assert_close(named["ce"], cross_entropy(student, labels()))
    torch.testing.assert_close(named["kd"], term(student, teacher, temperature))
    expected = (1 - alpha) * named["ce"] + alpha * named["kd"]
    torch.testing.assert_close(named["loss"], expected)


@METHODS
def test_alpha_0_without_a_teacher_is_cross_entropy_to_the_last_bit(
    module: type[KD], term: Callable[..., Tensor]
) -> None:
    student = logits(1).float()
    named = parts(module(0, 5), student, None, labels())
    alone = parts(CrossEntropy(), student, None, labels())
    assert named == {"loss": cross_entropy(student, labels()), "ce": cross_entropy(student, labels())}
    assert named == alone


@METHODS
def test_alpha_1_ignores_the_labels(module: type[KD], term: Callable[..., Tensor]) -> None:
    gradients = []
    for truth in (labels(), (labels() + 1) % 10):
        student = logits(1).requires_grad_()
        loss = parts(module(1, 5), student, logits(2), truth)["loss"]
        torch.testing.assert_close(loss, term(student, logits(2), 5))
        loss.backward()
        gradients.append(student.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_a_missing_teacher_is_noticed_where_it_counts() -> None:
    with pytest.raises(AssertionError):
        parts(KD(0.5, 5), logits(1), None, labels())


def test_only_distillation_needs_a_teacher() -> None:
    assert (KD.uses_teacher, KDTutorial.uses_teacher, CrossEntropy.uses_teacher) == (True, True, False)
    with_teacher = parts(CrossEntropy(), logits(1), logits(2), labels())
    assert with_teacher == parts(CrossEntropy(), logits(1), None, labels())


@any_invariant
@given(any_logits(3, 5), any_logits(3, 5), any_logits(3, 1), any_logits(3, 1), st.floats(0.5, 20))
def test_what_is_added_to_all_logits_of_an_image_changes_nothing(
    student: Tensor, teacher: Tensor, student_shift: Tensor, teacher_shift: Tensor, temperature: float
) -> None:
    for term in (kd, kd_tutorial):
        torch.testing.assert_close(
            term(student + student_shift, teacher + teacher_shift, temperature),
            term(student, teacher, temperature),
            rtol=1e-9,
            atol=1e-9,
        )
    truth = labels(3, 5)
    torch.testing.assert_close(
        cross_entropy(student + student_shift, truth), cross_entropy(student, truth), rtol=1e-9, atol=1e-9
    )


@any_invariant
@given(any_logits(3, 5), any_logits(3, 5), st.floats(0.5, 20))
def test_kd_is_0_for_equal_outputs_only(student: Tensor, teacher: Tensor, temperature: float) -> None:
    for term in (kd, kd_tutorial):
        assert abs(term(teacher.clone(), teacher, temperature).item()) < 1e-12
    # Pinsker's inequality gives a lower bound.
    difference = F.softmax(student / temperature, dim=1) - F.softmax(teacher / temperature, dim=1)
    total_variation = difference.abs().sum(dim=1) / 2
    least = temperature**2 * (2 * total_variation**2).mean().item()
    assert kd(student, teacher, temperature).item() >= least * (1 - 1e-9) - 1e-12


@any_invariant
@given(any_logits(4, 5), any_logits(4, 5), st.permutations(range(5)), st.floats(0.5, 20))
def test_the_order_of_classes_and_the_split_into_batches_do_not_matter(
    student: Tensor, teacher: Tensor, order: list[int], temperature: float
) -> None:
    for term in (kd, kd_tutorial):
        whole = term(student, teacher, temperature)
        reordered = term(student[:, order], teacher[:, order], temperature)
        torch.testing.assert_close(reordered, whole, rtol=1e-9, atol=1e-9)
        one_by_one = [term(student[i : i + 1], teacher[i : i + 1], temperature) for i in range(4)]
        torch.testing.assert_close(torch.stack(one_by_one).mean(), whole, rtol=1e-9, atol=1e-9)


@METHODS
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("images", "classes"), [(1, 2), (1, 1000), (4, 1000)])
def test_extreme_logits_do_not_overflow(
    module: type[KD], term: Callable[..., Tensor], temperature: float, images: int, classes: int
) -> None:
    student = (1e4 * logits(1, images, classes)).float().requires_grad_()
    teacher = (-1e4 * logits(2, images, classes)).float()
    named = parts(module(0.5, temperature), student, teacher, labels(images, classes))
    named["loss"].backward()
    assert all(math.isfinite(value.item()) for value in named.values())
    assert student.grad is not None and student.grad.isfinite().all()
    # SciPy's rel_entr of probabilities that underflow is infinite; their logarithms are not.
    log_outputs = log_softmax(student.detach().double().numpy() / temperature, axis=1)
    log_targets = log_softmax(teacher.double().numpy() / temperature, axis=1)
    expected = temperature**2 * (np.exp(log_targets) * (log_targets - log_outputs)).sum() / images
    divisor = classes if term is kd_tutorial else 1
    assert named["kd"].item() == pytest.approx(expected / divisor, rel=1e-4)


@METHODS
@pytest.mark.parametrize("alpha", [2, -0.1, "abc", "0.5", math.nan, math.inf, -math.inf, True, None])
def test_a_bad_alpha_is_refused(module: type[KD], term: Callable[..., Tensor], alpha: object) -> None:
    with pytest.raises(ValueError) as error:
        module(alpha, 5)
    assert str(error.value) == f"alpha={as_typed(alpha)}: expected a number from 0 to 1"


@METHODS
@pytest.mark.parametrize("value", [0, -2, "abc", "5", math.nan, math.inf, True, None])
def test_a_bad_temperature_is_refused(module: type[KD], term: Callable[..., Tensor], value: object) -> None:
    with pytest.raises(ValueError) as error:
        module(0.5, value)
    assert str(error.value) == f"temperature={as_typed(value)}: expected a number above 0"


@METHODS
@pytest.mark.parametrize(("alpha", "temperature"), [(0, 1), (1, 1e-3), (0.25, 1000), (1.0, np.float32(5))])
def test_the_ends_of_the_ranges_are_accepted(
    module: type[KD], term: Callable[..., Tensor], alpha: float, temperature: float
) -> None:
    loss = module(alpha, temperature)
    assert (loss.alpha, loss.temperature) == (alpha, temperature)
