"""ReviewKD against its authors' formulas computed without PyTorch, for maps of any size."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.data.digits import digits
from kdpipe.losses import ReviewKD, cross_entropy, reviewkd
from kdpipe.losses.outputs import Outputs
from kdpipe.losses.reviewkd import Fusion
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.settings.schema import Settings
from kdpipe.training.observed import Observed
from kdpipe.training.teacher import FrozenTeacher


def maps(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def pooled(values: NDArray, size: int) -> NDArray:
    """Means over size×size windows that cover the maps, as evenly as whole pixels let them."""
    images, channels, height, width = values.shape
    result = np.empty((images, channels, size, size))
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, math.ceil((i + 1) * height / size))
            columns = slice(j * width // size, math.ceil((j + 1) * width / size))
            result[:, :, i, j] = values[:, :, rows, columns].mean(axis=(2, 3))
    return result


def hierarchical(student: NDArray, teacher: NDArray) -> float:
    """The authors' hierarchical context loss of one pair."""
    total, weights, weight = ((student - teacher) ** 2).mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= student.shape[2]:
            continue
        weight /= 2
        total += weight * ((pooled(student, size) - pooled(teacher, size)) ** 2).mean()
        weights += weight
    return float(total / weights)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 9), (4, 4), (3, 3), (2, 2), (1, 1)])
def test_reviewkd_is_its_authors_formula(size: tuple[int, int]) -> None:
    student, teacher = maps(1, 3, 5, *size), maps(2, 3, 5, *size)
    expected = hierarchical(student.numpy(), teacher.numpy())
    assert reviewkd(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert reviewkd(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)


def test_weights_halve_and_are_divided_by_their_sum() -> None:
    # A constant difference is the same at each size; one that pooling averages out counts as it is alone.
    zeros = torch.zeros(1, 1, 8, 8)
    assert reviewkd(zeros + 3, zeros).item() == pytest.approx(9)
    checkered = torch.tensor([[1.0, -1], [-1, 1]]).repeat(4, 4)[None, None]
    assert reviewkd(checkered, zeros).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4 + 1 / 8))
    assert reviewkd(checkered[:, :, :2, :2], zeros[:, :, :2, :2]).item() == pytest.approx(1 / (1 + 1 / 2))
    assert reviewkd(checkered[:, :, :1, :1], zeros[:, :, :1, :1]).item() == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(-3, 3), st.permutations(range(4)))
def test_what_changes_nothing(height: int, width: int, shift: float, order: list[int]) -> None:
    student, teacher = maps(1, 2, 4, height, width), maps(2, 2, 4, height, width)
    value = reviewkd(student, teacher)
    for same in (
        reviewkd(teacher, student),
        reviewkd(student + shift, teacher + shift),
        reviewkd(student[:, order], teacher[:, order]),
        reviewkd(student.flip(0), teacher.flip(0)),
        torch.stack([reviewkd(student[i : i + 1], teacher[i : i + 1]) for i in range(2)]).mean(),
    ):
        torch.testing.assert_close(same, value)
    torch.testing.assert_close(reviewkd(shift * student, shift * teacher), shift**2 * value)
    assert reviewkd(student, student).item() == 0


@pytest.mark.parametrize("size", [1, 3, 5])
def test_gradients_are_the_derivatives(size: int) -> None:
    teacher = maps(2, 2, 3, size, size)
    assert torch.autograd.gradcheck(
        lambda values: reviewkd(values, teacher), maps(1, 2, 3, size, size).requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 8])
def test_one_image_with_extreme_values_is_finite(dtype: torch.dtype, size: int) -> None:
    student, teacher = (2e4 * maps(seed, 1, 1000, size, size).clamp(-3, 3).to(dtype) for seed in (1, 2))
    value = reviewkd(student.requires_grad_(), teacher)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite()
    assert value.item() == pytest.approx(
        hierarchical(student.detach().double().numpy(), teacher.double().numpy()), 1e-4
    )
    assert student.grad is not None and student.grad.isfinite().all()


# The module.

STUDENT, TEACHER = [(4, 8), (6, 4)], [(3, 16), (5, 8), (7, 2)]  # channels and size of each stage


def outputs(seed: int, stages: list[tuple[int, int]], dimensions: int, images: int = 3, classes: int = 10) -> Outputs:
    made = [maps(seed + number, images, channels, size, size) for number, (channels, size) in enumerate(stages)]
    return Outputs(
        maps(seed + 10, images, classes),
        stages=tuple(made),
        preactivations=tuple(stage - 1 for stage in made),
        embedding=maps(seed + 20, images, dimensions),
    )


def fitted(student: Outputs, teacher: Outputs, **values: Any) -> ReviewKD:
    loss = ReviewKD(**values)
    torch.manual_seed(0)
    loss.fit_to(student, teacher, torch.arange(2), torch.arange(2))
    for norm in (module for module in loss.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return loss.double()


def nearest(values: NDArray, height: int, width: int) -> NDArray:
    rows = [i * values.shape[2] // height for i in range(height)]
    columns = [j * values.shape[3] // width for j in range(width)]
    return values[:, :, rows][:, :, :, columns]


def convolved(values: NDArray, convolution: nn.Conv2d) -> NDArray:
    weight = convolution.weight.detach().numpy()
    edge = weight.shape[2] // 2
    padded = np.pad(values, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    height, width = values.shape[2:]
    result = np.zeros((len(values), len(weight), height, width))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            result += np.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
    return result if convolution.bias is None else result + convolution.bias.detach().numpy()[:, None, None]


def normed(values: NDArray, norm: nn.BatchNorm2d) -> NDArray:
    mean, variance = values.mean(axis=(0, 2, 3), keepdims=True), values.var(axis=(0, 2, 3), keepdims=True)
    weight, bias = (part.detach().numpy()[:, None, None] for part in (norm.weight, norm.bias))
    return weight * (values - mean) / np.sqrt(variance + 1e-5) + bias


def reviewed(loss: ReviewKD, student: Outputs, teacher: Outputs) -> float:
    """The authors' walk from the deepest level up."""
    number = min(len(student.stages), len(teacher.preactivations))
    assert student.embedding is not None and teacher.embedding is not None
    ours = [student.embedding[:, :, None, None], *student.stages[-number:][::-1]]
    theirs = [teacher.embedding[:, :, None, None], *teacher.preactivations[-number:][::-1]]
    total, handed_on = 0.0, None
    for fusion, our, their in zip(loss.fusions, ours, theirs, strict=True):
        assert isinstance(fusion, Fusion)
        mixed = normed(convolved(our.numpy(), fusion.inward), fusion.inward_norm)
        if handed_on is not None:
            handed_on = nearest(handed_on, *mixed.shape[2:])
            attention = 1 / (1 + np.exp(-convolved(np.concatenate([mixed, handed_on], axis=1), fusion.attention)))
            mixed = mixed * attention[:, :1] + handed_on * attention[:, 1:]
        handed_on = nearest(mixed, *their.shape[2:])
        total += hierarchical(normed(convolved(handed_on, fusion.outward), fusion.outward_norm), their.numpy())
    return total


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(STUDENT, TEACHER), (TEACHER, STUDENT), (STUDENT, STUDENT), ([(4, 7)], [(4, 5)]), ([(2, 4), (2, 4)], [(3, 4)])],
    ids=["teacher has more stages", "student has more stages", "alike", "odd sizes", "same size twice"],
)
def test_the_walk_through_the_stages_is_the_authors(
    student: list[tuple[int, int]], teacher: list[tuple[int, int]]
) -> None:
    of_student, of_teacher = outputs(1, student, 9), outputs(2, teacher, 11)
    loss = fitted(of_student, of_teacher, warmup=20)
    expected = reviewed(loss, of_student, of_teacher)
    truth = torch.tensor([1, 0, 9])
    for epoch, share in ((1, 1 / 20), (5, 1 / 4), (20, 1), (200, 1)):
        parts = loss(of_student, of_teacher, truth, torch.arange(3), epoch)
        assert parts["reviewkd"].item() == pytest.approx(share * expected, rel=1e-9)
        torch.testing.assert_close(parts["ce"], cross_entropy(of_student.logits, truth))
        torch.testing.assert_close(parts["loss"], parts["ce"] + parts["reviewkd"])


def test_the_weights_and_no_warmup() -> None:
    student, teacher = outputs(1, STUDENT, 9), outputs(2, TEACHER, 11)
    loss = fitted(student, teacher, weight=5, ce_weight=0.5, warmup=0)
    parts = loss(student, teacher, torch.tensor([1, 0, 9]), torch.arange(3), 1)
    assert parts["reviewkd"].item() == pytest.approx(reviewed(loss, student, teacher))
    torch.testing.assert_close(parts["loss"], 0.5 * parts["ce"] + 5 * parts["reviewkd"])


@pytest.mark.parametrize(("dimensions", "mixed"), [(64, 64), (1280, 512)])
def test_the_fusions_are_the_authors(dimensions: int, mixed: int) -> None:
    """The channels of ResNet-8x4; an embedding as long as MobileNetV2's, 1,280."""
    stages = [(64, 4), (128, 2), (256, 1)]
    loss = ReviewKD()
    loss.fit_to(outputs(1, stages, dimensions), outputs(2, stages, 256), torch.arange(2), torch.arange(2))
    deepest, *others = loss.fusions
    assert deepest.attention is None and [part.attention.in_channels for part in others] == [2 * mixed] * 3
    assert [part.inward.in_channels for part in loss.fusions] == [dimensions, 256, 128, 64]
    assert [part.outward.out_channels for part in loss.fusions] == [256, 256, 128, 64]
    assert {part.inward.out_channels for part in loss.fusions} == {mixed}
    # Kaiming's uniform weights with a = 1 reach ±√(3 / inputs).
    for convolution in (deepest.inward, deepest.outward):
        bound = math.sqrt(3 / convolution.weight[0].numel())
        assert convolution.weight.abs().max().item() == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_single_image_and_half_precision(dtype: torch.dtype) -> None:
    student, teacher = (
        Outputs(
            of.logits.to(dtype),
            tuple(stage.to(dtype).requires_grad_() for stage in of.stages),
            tuple(stage.to(dtype) for stage in of.preactivations),
            of.embedding.to(dtype),
        )
        for of in (outputs(1, STUDENT, 9, images=1), outputs(2, TEACHER, 11, images=1))
    )
    loss = fitted(student, teacher).float()
    part = loss(student, teacher, torch.tensor([1]), torch.arange(1), 20)["reviewkd"]
    part.backward()
    assert part.isfinite()
    assert all(stage.grad is not None and stage.grad.isfinite().all() for stage in student.stages)


def test_gradients_of_the_module_are_the_derivatives() -> None:
    student, teacher = outputs(1, [(2, 4)], 3), outputs(2, [(3, 2)], 2)
    loss = fitted(student, teacher, warmup=0)

    def value(stage: Tensor, embedding: Tensor) -> Tensor:
        answers = Outputs(student.logits, (stage,), (), embedding)
        return loss.term(answers, teacher, torch.arange(3), torch.arange(3), 1)

    assert student.embedding is not None
    inputs = (student.stages[0].requires_grad_(), student.embedding.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


def test_the_teacher_s_preactivations_and_the_student_s_stages_are_compared() -> None:
    student, teacher = outputs(1, STUDENT, 9), outputs(2, TEACHER, 11)
    loss = fitted(student, teacher)

    def value(student: Outputs, teacher: Outputs) -> float:
        return loss.term(student, teacher, torch.arange(3), torch.arange(3), 20).item()

    expected = value(student, teacher)
    assert value(Outputs(student.logits, student.stages, (), student.embedding), teacher) == expected
    assert value(student, Outputs(teacher.logits, (), teacher.preactivations, teacher.embedding)) == expected


def test_a_student_is_taught_by_a_larger_network_and_its_term_falls() -> None:
    data = digits()
    torch.manual_seed(0)
    student, teacher = (Classifier(ResNet(depth, 10, shortcut="B"), 8, [0.5] * 3, [0.5] * 3) for depth in (8, 14))
    for classifier in (student, teacher):
        classifier.network.roles = {"stages": ["layer1", "layer2", "layer3"]}
    loss, answering = ReviewKD(warmup=0), FrozenTeacher(teacher)
    answering.observe(loss.roles)
    observed = Observed(student, student.network, loss.roles)
    indices = torch.arange(40)
    images, truth = data.images[indices], data.labels[indices]
    with torch.no_grad():
        student.eval()
        loss.fit_to(observed(images[:2]), answering.answer(images[:2]), indices, truth)
    student.train()
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.05)
    values = []
    for epoch in range(1, 11):
        parts = loss(observed(images), answering(images, indices, epoch), truth, indices, epoch)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        values.append(parts["reviewkd"].item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("key", ["weight", "ce_weight", "warmup"])
@pytest.mark.parametrize("value", [-1, "much", math.nan])
def test_a_bad_value_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        ReviewKD(**{key: value})
    assert str(error.value) == f"{key}={value}: expected a number from 0"


def test_the_weight_is_that_of_a_pair_of_the_benchmark_or_1(composed: Callable[..., Settings]) -> None:
    assert composed("loss=reviewkd").loss.weight == 1
    assert composed("loss=reviewkd", "+benchmark.reviewkd_weight=5").loss.weight == 5
    assert composed("loss=reviewkd", "+benchmark.reviewkd_weight=5", "loss.weight=2").loss.weight == 2
    assert composed("loss=kd", "loss@also=reviewkd", "+benchmark.reviewkd_weight=5").also.weight == 5
