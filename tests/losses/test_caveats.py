"""Settings in which a method teaches nothing, or less: said before training, held against gradients."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import Outcome, assert_refused
from torch import Tensor, nn

from kdpipe.assembly.objectives import build_loss
from kdpipe.losses import DIST, Attention, Loss, dist, dkd, kd, kd_tutorial
from kdpipe.losses.base import Plan, warmup_caveats
from kdpipe.losses.outputs import Outputs
from kdpipe.models import Classifier, Ensemble
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Settings

METHODS = {
    **{name: [f"loss={name}"] for name in ("kd", "kd_tutorial", "logit_mse", "dkd", "dist", "hint", "attention")},
    **{name: [f"loss={name}"] for name in ("similarity", "rkd", "pkt", "vid", "correlation", "crd", "reviewkd")},
    "standardised kd": ["loss=kd", "loss.standardize=true"],
    "standardised kd_tutorial": ["loss=kd_tutorial", "+loss.standardize=true"],
    "crd of one dimension": ["loss=crd", "loss.dimensions=1"],
    "distances": ["loss=rkd", "loss.angle_weight=0"],
    "angles": ["loss=rkd", "loss.distance_weight=0"],
    "between classes": ["loss=dist", "loss.gamma=0"],
    "within classes": ["loss=dist", "loss.beta=0"],
}


def answers(seed: int, classes: int, images: int, side: int, width: int) -> Outputs:
    """Of a network of two stages."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    stages = (normal(width, 2 * side, 2 * side), normal(width, side, side))
    return Outputs(normal(classes), stages, stages, normal(width))


def mixture(one: Outputs, other: Outputs, share: float) -> Outputs:
    mixed = [(1 - share) * ours + share * theirs for ours, theirs in zip(one.tensors, other.tensors, strict=True)]
    logits, *stages, embedding = mixed
    return Outputs(logits, tuple(stages[:2]), tuple(stages[2:]), embedding)


@torch.no_grad()
def sensitivity(loss: Loss, seed: int, labels: Tensor, *size: int) -> float:
    """How much of the way from one student's term to another's is made by a hundredth of the way between their answers;
    next to nothing where only the sign of an answer counts."""
    student, other, teacher = (answers(number, *size) for number in (seed, seed + 1, seed + 2))
    terms = [
        loss.term(mixture(student, other, share), teacher, labels, torch.arange(len(labels)), 1).item()
        for share in (0, 0.01, 1)
    ]
    assert all(map(math.isfinite, terms))
    return abs(terms[1] - terms[0]) / max(abs(terms[2] - terms[0]), 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_refused_where_its_term_is_constant_and_nowhere_else(
    composed: Callable[..., Settings], method: str
) -> None:
    config = composed(*METHODS[method], "dataset=digits")
    for classes, images, side, width, same_label in itertools.product([2, 3], [1, 2, 3], [1, 4], [1, 5], [True, False]):
        if method == "vid" and width == 1:
            continue  # a regressor of one ReLU may be dead
        loss = build_loss(config)
        size = (classes, images, side, width)
        student, teacher = answers(1, *size), answers(2, *size)
        torch.manual_seed(0)
        stored = torch.arange(max(images, 4))
        loss.fit_to(student, teacher, stored, stored % classes)
        loss.double().eval()  # BatchNorm of one number, and a memory that stays as it is
        labels = torch.zeros(images, dtype=torch.int64) if same_label else torch.arange(images) % classes
        try:
            loss.caveats(Plan(classes, images, epochs=100), student, teacher)
            is_refused = False
        except ConfigError:
            is_refused = True
        found = [sensitivity(loss, 10 * seed, labels, *size) for seed in range(6)]
        # Even of a constant term, a pair of students may be on two sides of a change of sign, or within an epsilon.
        if is_refused:
            assert sorted(found)[1] < 4e-3, (found, size)
        else:
            assert max(found) > 4e-3, (found, size)


@pytest.mark.parametrize("method", METHODS)
def test_equal_networks_give_no_nan(composed: Callable[..., Settings], method: str) -> None:
    loss = build_loss(composed(*METHODS[method], "dataset=digits"))
    student = answers(1, 3, 4, 2, 5)
    torch.manual_seed(0)
    loss.fit_to(student, student, torch.arange(4), torch.arange(4) % 3)
    loss.double()
    term = loss.term(student, student, torch.arange(4) % 3, torch.arange(4), 1)
    gradients = torch.autograd.grad(term, [student.logits, *student.stages, student.embedding], allow_unused=True)
    assert term.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


# Before a run


@pytest.fixture
def two_digits(tmp_path: object, kdpipe: Callable[..., Outcome]) -> list[str]:
    """A command on images of two classes, with a teacher that is there."""
    from pathlib import Path

    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits(n_class=2)
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = Path("two") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{number:03}.png")
    words = ["dataset=image_folder", "dataset.root=two", "dataset.image_size=null", "train.threads=1"]
    trained = kdpipe(*words, "experiment=teacher", "model=resnet20", "train.epochs=1", "train.batch_size=50")
    assert trained.status == 0, trained.errors
    return [*words, "model@teacher=resnet20"]


def test_methods_that_need_more_classes_or_images_are_refused_or_warn(
    kdpipe: Callable[..., Outcome], two_digits: list[str]
) -> None:
    refused = {
        ("loss=kd", "loss.standardize=true"): "loss.standardize=true: standardised logits of two classes are 0.71 and",
        (
            "loss=rkd",
            "train.batch_size=2",
        ): "loss.distance_weight=25: it compares the images of a batch, 3 or more, and",
        ("loss=pkt", "train.batch_size=1"): "loss.weight=30000: it compares the images of a batch, 2 or more, and",
        (
            "loss=kd",
            "loss@also=similarity",
            "train.batch_size=1",
        ): "also.weight=3000: it compares the images of a batch",
        ("loss=dist", "train.batch_size=2"): "loss.beta=2: there are 2 classes, and two numbers always correlate by",
        ("loss=kd", "loss.temperature=1e-20"): "loss.temperature=1e-20: the term would be lost in rounding; expected a",
    }
    for words, said in refused.items():
        assert_refused(kdpipe(*two_digits, *words), said)
    done = kdpipe(*two_digits, "loss=dist", "loss@also=dkd", "train.epochs=1", "train.batch_size=50")
    assert done.status == 0, done.errors
    assert "loss.beta=2: there are 2 classes, and two numbers always correlate by 1 or -1" in done.output
    assert "also.beta=8: of two classes only one is not the target, so that its part is 0" in done.output
    assert "also.warmup=20: train.epochs=1, so that the term ends at 5% of its weight" in done.output
    assert "loss.warmup" not in done.output


@pytest.mark.parametrize(
    ("warmup", "epochs", "said"),
    [
        (20, 10, "the term ends at 50% of its weight; expected a number up to 5, 0 for none"),
        (20, 20, "the term has its weight from epoch 20 on only; expected a number up to 10, 0 for none"),
        (20, 39, "from epoch 20 on only"),
        (20, 40, ""),
        (0, 1, ""),
    ],
)
def test_a_warm_up_of_most_of_the_training_is_said(warmup: float, epochs: int, said: str) -> None:
    caveats = warmup_caveats(warmup, epochs)
    assert len(caveats) == bool(said) and said in " ".join(map(str, caveats))
    assert all(str(caveat).startswith(f"warmup={warmup}: train.epochs={epochs}, ") for caveat in caveats)


def test_stages_of_one_position_have_no_attention() -> None:
    loss, plan = Attention(2, 1000, 1), Plan(10, 100, 10)
    small, large = answers(1, 10, 2, 1, 3), answers(2, 10, 2, 4, 3)
    (caveat,) = loss.caveats(plan, small, large)
    assert str(caveat) == "weight=1000: maps of 1×1, of stages 2 of 2, show no place where activations are large"
    assert loss.caveats(plan, large, large) == []


def test_a_large_power_of_activations_stays_finite() -> None:
    maps = (30 * torch.rand(2, 3, 4, 4)).requires_grad_()
    for scale in (1e-3, 1, 1e3):
        term = Attention(60, 1, 1).term(Outputs(maps, (scale * maps,)), Outputs(maps, (maps.flip(3),)), *[maps] * 2, 1)
        (gradient,) = torch.autograd.grad(term, maps)
        assert term > 0 and gradient.isfinite().all()


# Large temperatures


def float64_reference(term: Callable[..., Tensor], student: Tensor, teacher: Tensor, *rest: object) -> float:
    """With 200 bits by mpmath would be the same; at these temperatures float64 has digits to spare."""
    return term(student.double(), teacher.double(), *rest).item()


def some_logits(seed: int, classes: int = 10) -> Tensor:
    return torch.from_numpy(3 * np.random.default_rng(seed).standard_normal((6, classes))).float()


LABELS = torch.arange(6) % 2
TERMS = {
    "kd": kd,
    "kd_tutorial": kd_tutorial,
    "dkd": lambda student, teacher, temperature: dkd(student, teacher, LABELS, 1, 8, temperature),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("temperature", [101, 1e3, 1e5, 1e8, 1e20, 1e200])
def test_divergences_at_large_temperatures_do_not_cancel(name: str, temperature: float) -> None:
    term, student, teacher = TERMS[name], some_logits(1).requires_grad_(), some_logits(2)
    value = term(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(value, student)
    # The usual form in float64, at a temperature where that has the digits.
    usual = usual_forms(min(temperature, 1e4))[name]
    reference = some_logits(1).double().requires_grad_()
    expected = usual(reference, teacher.double())
    (expected_gradient,) = torch.autograd.grad(expected, reference)
    tolerance = 1e-5 if temperature <= 1e4 else 2e-3  # from there on it hardly depends on T
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


def usual_forms(temperature: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        log_student, log_teacher = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
        return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1).mean()

    def decoupled(student: Tensor, teacher: Tensor) -> Tensor:
        is_target = nn.functional.one_hot(LABELS, student.shape[1]).bool()
        binary, others = [], []
        for logits in (student, teacher):
            probabilities = (logits / temperature).softmax(dim=1)
            target = probabilities[is_target]
            binary.append(torch.stack([target, 1 - target], dim=1).log())
            others.append((logits / temperature)[~is_target].reshape(len(logits), -1))
        return divergence(*binary) + 8 * divergence(*others)

    return {
        "kd": lambda student, teacher: divergence(student / temperature, teacher / temperature),
        "kd_tutorial": lambda student, teacher: (
            divergence(student / temperature, teacher / temperature) / student.shape[1]
        ),
        "dkd": decoupled,
    }


def test_the_divergence_at_a_very_large_temperature_is_half_the_variance_of_the_differences() -> None:
    student, teacher = some_logits(1), some_logits(2)
    half_variance = (student - teacher).var(dim=1, correction=0).mean().item() / 2
    assert kd(student, teacher, 1e5).item() == pytest.approx(half_variance, rel=1e-3)


def test_extreme_logits_at_a_large_temperature() -> None:
    student, teacher = (1e6 * some_logits(1)).requires_grad_(), -1e6 * some_logits(2)
    for name, term in TERMS.items():
        value = term(student, teacher, 1000)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == pytest.approx(usual_forms_of_extremes(name), rel=1e-4)
        assert gradient.isfinite().all()


def usual_forms_of_extremes(name: str) -> float:
    """In float64, where nothing cancels since the softened logits are far apart."""
    student, teacher = 1e6 * some_logits(1).double() / 1000, -1e6 * some_logits(2).double() / 1000
    scaled = {"kd": kd, "kd_tutorial": kd_tutorial, "dkd": lambda *logits: dkd(*logits[:2], LABELS, 1, 8, 1)}[name]
    return 1000**2 * scaled(student, teacher, 1).item()


@pytest.mark.parametrize("temperature", [101, 1e3, 1e6])
def test_correlations_at_large_temperatures_are_those_of_the_logits(temperature: float) -> None:
    student, teacher = some_logits(1).requires_grad_(), some_logits(2)
    value = dist(student, teacher, 1, 0, temperature) / temperature**2
    rows = [np.corrcoef(ours, theirs)[0, 1] for ours, theirs in zip(student.detach(), teacher, strict=True)]
    assert value.item() == pytest.approx(1 - np.mean(rows), rel=5 / temperature)


def test_a_temperature_that_drowns_the_labels_is_said() -> None:
    student = answers(1, 10, 2, 2, 3)
    (caveat,) = DIST(2, 2, 1000, 1, 1).caveats(Plan(10, 100, 10), student, student)
    assert "temperature=1000: the term is multiplied by T²" in str(caveat)
    with pytest.raises(ConfigError, match=r"temperature=1e\+200: the term would be lost in rounding"):
        DIST(2, 2, 1e200, 1, 1).caveats(Plan(10, 100, 10), student, student)


@pytest.mark.parametrize("temperature", [101, 1e5, 1e8])
def test_the_mean_of_teachers_at_a_large_temperature(temperature: float) -> None:
    class Answers(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, images: Tensor) -> Tensor:
            return self.logits

    given = [some_logits(seed) for seed in (1, 2)]
    members = [Classifier(Answers(logits), 8, [0.5], [0.5]) for logits in given]
    mean = Ensemble(members, [1, 3], temperature)(torch.zeros(6, 1, 8, 8, dtype=torch.uint8))
    # For T → ∞ the mean of the logits, but for what is added to all of an image.
    expected = sum(
        share * (logits - logits.mean(dim=1, keepdim=True)) for share, logits in zip((0.25, 0.75), given, strict=True)
    )
    ours = mean - mean.mean(dim=1, keepdim=True)
    tolerance = 30 / temperature + 1e-5
    assert (ours - expected).abs().max() < tolerance * 10 and math.isfinite(ours.sum().item())
