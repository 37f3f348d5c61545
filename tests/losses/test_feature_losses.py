"""The losses on features against values computed without PyTorch, and invariants for any features."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from scipy.stats import norm, ortho_group
from torch import Tensor, nn

from kdpipe.assembly.building import build
from kdpipe.losses import (
    PKT,
    RKD,
    VID,
    Attention,
    Correlation,
    HiddenCosine,
    Hint,
    MapMSE,
    Similarity,
    WeightedLoss,
    attention,
    correlation,
    cross_entropy,
    hidden_cosine,
    hint,
    pkt,
    rkd,
    rkd_angle,
    rkd_distance,
    similarity,
    vid,
)
from kdpipe.losses.outputs import Outputs
from kdpipe.models.resnet import ResNet
from kdpipe.settings.errors import as_typed
from kdpipe.settings.schema import Settings
from kdpipe.training.observed import Observed

any_invariant = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def maps(seed: int, images: int = 4, channels: int = 3, size: int = 4) -> Tensor:
    return normal(seed, images, channels, size, size)


def embeddings(seed: int, images: int = 6, dimensions: int = 5) -> Tensor:
    return normal(seed, images, dimensions)


def rotation(seed: int, dimensions: int) -> Tensor:
    return torch.from_numpy(ortho_group.rvs(dimensions, random_state=seed))


def vid_at(variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda student, teacher: vid(student, teacher, torch.full((student.shape[1],), variance).to(student))


@dataclass
class Method:
    """What the tests that all methods share need to know of one."""

    term: Callable[..., Tensor]
    module: type[WeightedLoss]
    arguments: dict[str, float]
    example: Callable[..., Tensor]
    weight: float
    ce_weight: float = 1


METHODS = {
    "hint": Method(hint, Hint, {"stage": 2}, maps, 100),
    "attention": Method(attention, Attention, {"p": 2}, maps, 1000),
    "similarity": Method(similarity, Similarity, {}, maps, 3000),
    "rkd": Method(rkd, RKD, {"distance_weight": 25, "angle_weight": 50}, embeddings, 1),
    "pkt": Method(pkt, PKT, {}, embeddings, 30000),
    "vid": Method(vid_at(5), VID, {}, maps, 1),
    "correlation": Method(correlation, Correlation, {"dimensions": 8}, embeddings, 0.02),
    "hidden_cosine": Method(hidden_cosine, HiddenCosine, {}, embeddings, 0.25, 0.75),
    "map_mse": Method(hint, MapMSE, {}, maps, 0.25, 0.75),
}
each_method = pytest.mark.parametrize("name", METHODS)


def loss_of(name: str, weight: float = 1, ce_weight: float = 1, **arguments: object) -> WeightedLoss:
    method = METHODS[name]
    return method.module(weight=weight, ce_weight=ce_weight, **{**method.arguments, **arguments})


def network_outputs(seed: int, shapes: list[tuple[int, int]], images: int = 4, classes: int = 10) -> Outputs:
    """Of a network whose stages give so many channels at such a size."""
    sizes = enumerate(shapes)
    stages = tuple(normal(seed + number, images, channels, size, size).float() for number, (channels, size) in sizes)
    return Outputs(normal(seed, images, classes).float(), stages, (), stages[-1].mean(dim=(2, 3)))


NARROW = [(4, 8), (6, 4), (8, 2)]
WIDE_AND_LONG = [(5, 32), (7, 16), (9, 8), (11, 4)]


def fitted(name: str, student: Outputs, teacher: Outputs, **arguments: object) -> WeightedLoss:
    torch.manual_seed(0)
    loss = loss_of(name, **arguments)
    loss.fit_to(student, teacher, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    return loss


def parts(loss: WeightedLoss, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    labels = torch.arange(len(student.logits)) % student.logits.shape[1]
    return loss(student, teacher, labels, torch.arange(len(labels)), 1)


# Values


def test_hint_is_the_mean_of_squared_differences() -> None:
    student, teacher = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 0, 3, 3])
    assert hint(student.view(1, 2, 1, 2), teacher.view(1, 2, 1, 2)).item() == (2**2 + 1**2) / 4


def test_attention_by_hand() -> None:
    # Over the channels the student's |x| is 3 and 4 on the mean, (3/5, 4/5) at length 1; the teacher's (4/5, 3/5).
    student = torch.tensor([[[[1.0, -8]], [[-5.0, 0]]]])
    teacher = torch.tensor([[[[4.0, 3]]]])
    assert attention(student, teacher, p=1).item() == pytest.approx(1 / 5**2)
    # The squares' mean is (13, 32) there.
    length = math.hypot(13, 32)
    by_hand = ((13 / length - 16 / math.hypot(16, 9)) ** 2 + (32 / length - 9 / math.hypot(16, 9)) ** 2) / 2
    assert attention(student, teacher).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize(("student_size", "teacher_size"), [(4, 4), (4, 8), (8, 4)])
def test_attention_is_numpy_s(p: int, student_size: int, teacher_size: int) -> None:
    student, teacher = maps(1, channels=3, size=student_size), maps(2, channels=5, size=teacher_size)
    attentions = []
    for features in (student.numpy(), teacher.numpy()):
        images, channels, size, _ = features.shape
        pooled = features.reshape(images, channels, 4, size // 4, 4, size // 4).mean(axis=(3, 5))
        rows = (np.abs(pooled) ** p).mean(axis=1).reshape(images, -1)
        attentions.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    expected = np.mean((attentions[0] - attentions[1]) ** 2)
    assert attention(student, teacher, p).item() == pytest.approx(expected)


def test_similarity_by_hand() -> None:
    # The student tells the two images apart, rows (1, 0) and (0, 1); the teacher does not, rows (1, 1) / √2.
    student, teacher = torch.eye(2), torch.ones(2, 3)
    by_hand = 2 * ((1 - 1 / math.sqrt(2)) ** 2 + 1 / 2) / 2**2
    assert similarity(student, teacher).item() == pytest.approx(by_hand)


def test_similarity_is_numpy_s() -> None:
    student, teacher = maps(1, images=5, channels=2), maps(2, images=5, channels=3, size=6)
    rows = []
    for features in (student.numpy(), teacher.numpy()):
        products = np.einsum("ichw,jchw->ij", features, features)
        rows.append(products / np.linalg.norm(products, axis=1, keepdims=True))
    expected = np.linalg.norm(rows[1] - rows[0], "fro") ** 2 / 5**2
    assert similarity(student, teacher).item() == pytest.approx(expected)


def test_rkd_distance_by_hand() -> None:
    # Distances 1, 2, 3 with the mean 2 against 1, 1, 2 with the mean 4/3: relative (1/2, 1, 3/2) and (3/4, 3/4, 3/2).
    student, teacher = torch.tensor([[0.0], [1], [3]]), torch.tensor([[0.0], [1], [2]])
    by_hand = 2 * (0.5 * 0.25**2 + 0.5 * 0.25**2 + 0) / 9
    assert rkd_distance(student, teacher).item() == pytest.approx(by_hand)


def test_rkd_angle_by_hand() -> None:
    # On a line each image sees the other two in the same direction, but the middle one, cosine −1; in a right
    # triangle it is 0 there and 1/√2 at the other two. Two orders of the two others, of 27 triplets.
    student, teacher = torch.tensor([[1.0, 0], [0, 0], [-1, 0]]), torch.tensor([[1.0, 0], [0, 0], [0, 1]])
    by_hand = 2 * (0.5 * 1**2 + 2 * 0.5 * (1 - 1 / math.sqrt(2)) ** 2) / 27
    assert rkd_angle(student, teacher).item() == pytest.approx(by_hand)


def smooth_l1(one: np.ndarray, other: np.ndarray) -> float:
    difference = np.abs(one - other)
    return float(np.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean())


def cosines(points: np.ndarray) -> np.ndarray:
    number = len(points)
    found = np.zeros((number,) * 3)
    for i, j, k in np.ndindex(*found.shape):
        to_j, to_k = points[j] - points[i], points[k] - points[i]
        if i not in (j, k):
            found[i, j, k] = to_j @ to_k / np.linalg.norm(to_j) / np.linalg.norm(to_k)
    return found


def test_rkd_is_scipy_s() -> None:
    # An outlier, so that some differences are in the linear part of the smooth L1.
    student, teacher = embeddings(1) + 20 * torch.eye(6, 5), embeddings(2, dimensions=7)
    points = [student.numpy(), teacher.numpy()]
    distances = [cdist(some, some) for some in points]
    relative = [found / found[found > 0].mean() for found in distances]
    by_distance, by_angle = smooth_l1(*relative), smooth_l1(cosines(points[0]), cosines(points[1]))
    assert rkd_distance(student, teacher).item() == pytest.approx(by_distance)
    assert rkd_angle(student, teacher).item() == pytest.approx(by_angle)
    assert rkd(student, teacher).item() == pytest.approx(25 * by_distance + 50 * by_angle)
    assert rkd(student, teacher, distance_weight=1, angle_weight=2).item() == pytest.approx(by_distance + 2 * by_angle)


def test_pkt_by_hand() -> None:
    # Cosines (1, 0) are similarities (1, 1/2) and probabilities (2/3, 1/3); the teacher's (1, 1) are (1/2, 1/2).
    by_hand = (math.log((1 / 2) / (2 / 3)) / 2 + math.log((1 / 2) / (1 / 3)) / 2) / 2
    assert pkt(torch.eye(2), torch.ones(2, 3)).item() == pytest.approx(by_hand, rel=1e-5)


def test_pkt_is_numpy_s() -> None:
    student, teacher = embeddings(1), embeddings(2, dimensions=7)
    probabilities = []
    for points in (student.numpy(), teacher.numpy()):
        similarities = 1 - cdist(points, points, "cosine") / 2
        probabilities.append(similarities / similarities.sum(axis=1, keepdims=True))
    outputs, targets = probabilities
    expected = np.mean(targets * np.log((targets + 1e-7) / (outputs + 1e-7)))
    assert pkt(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_vid_is_scipy_s() -> None:
    student, teacher, variance = maps(1), maps(2), torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    spread = np.sqrt(variance.numpy()).reshape(1, 3, 1, 1)
    likelihood = norm.logpdf(teacher.numpy(), loc=student.numpy(), scale=spread)
    expected = -likelihood.mean() - math.log(2 * math.pi) / 2
    assert vid(student, teacher, variance).item() == pytest.approx(expected)


def test_correlation_by_hand() -> None:
    student = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    teacher = torch.tensor([[0.0, 4], [3, 1], [7, 7]])  # differences (1, 2), (0, 3), (2, 1)
    assert correlation(student, teacher).item() == ((0 + 6) + (0 + 3)) / 2


def test_hidden_cosine_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[0.0, 3], [2, 2]])  # at 90° and at 0°
    assert hidden_cosine(student, teacher).item() == pytest.approx((1 + 0) / 2)


# Invariants


@any_invariant
@given(seeds, st.permutations(range(5)), st.permutations(range(3)))
def test_attention_knows_no_order_sign_or_scale_of_channels(seed: int, order: list[int], other: list[int]) -> None:
    student, teacher = maps(seed, channels=5), maps(seed + 1, channels=3)
    scale = torch.linspace(0.1, 10, len(student)).view(-1, 1, 1, 1)
    changed = attention(-scale * student[:, order], teacher[:, other] / scale)
    torch.testing.assert_close(changed, attention(student, teacher))
    torch.testing.assert_close(attention(torch.cat([student, student], dim=1), teacher), attention(student, teacher))


@any_invariant
@given(seeds, st.permutations(range(4)))
def test_similarity_knows_no_rotation_or_scale_of_features(seed: int, order: list[int]) -> None:
    student, teacher = maps(seed), maps(seed + 1, size=2)
    rotated = (student.flatten(1) @ rotation(seed, 48)).view(4, 48, 1, 1)
    torch.testing.assert_close(similarity(3 * rotated, teacher / 7), similarity(student, teacher))
    torch.testing.assert_close(similarity(student[order], teacher[order]), similarity(student, teacher))


@any_invariant
@given(seeds, st.floats(0.01, 100), st.permutations(range(6)))
def test_rkd_knows_no_rotation_translation_or_scale(seed: int, scale: float, order: list[int]) -> None:
    student, teacher = embeddings(seed), embeddings(seed + 1, dimensions=7)
    moved = scale * student @ rotation(seed, 5) + normal(seed, 5)
    moved_teacher = teacher @ rotation(seed, 7) / scale - normal(seed, 7)
    for term in (rkd, rkd_distance, rkd_angle):
        torch.testing.assert_close(term(moved, moved_teacher), term(student, teacher), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(term(student[order], teacher[order]), term(student, teacher))


@any_invariant
@given(seeds, st.permutations(range(6)))
def test_pkt_knows_no_rotation_or_length_of_embeddings(seed: int, order: list[int]) -> None:
    student, teacher = embeddings(seed), embeddings(seed + 1, dimensions=7)
    lengths = torch.linspace(1, 100, 6, dtype=torch.float64)[:, None]
    changed = pkt(lengths * student @ rotation(seed, 5), teacher / lengths)
    torch.testing.assert_close(changed, pkt(student, teacher), rtol=1e-4, atol=1e-7)  # 1e-7 is added to each length
    torch.testing.assert_close(pkt(student[order], teacher[order]), pkt(student, teacher))


@any_invariant
@given(seeds)
def test_the_best_variance_of_vid_is_the_mean_squared_difference(seed: int) -> None:
    student, teacher = maps(seed), maps(seed + 1)
    best = ((student - teacher) ** 2).mean(dim=(0, 2, 3))
    least = vid(student, teacher, best)
    torch.testing.assert_close(least, (1 + best.log()).mean() / 2)
    for factor in (0.9, 1.1):
        assert vid(student, teacher, factor * best) > least
    order = [2, 0, 1]
    torch.testing.assert_close(vid(student[:, order], teacher[:, order], best[order]), least)


@any_invariant
@given(seeds)
def test_correlation_and_hint_know_no_common_shift_and_no_side(seed: int) -> None:
    for term, example in ((correlation, embeddings), (hint, maps)):
        student, teacher = example(seed), example(seed + 1)
        torch.testing.assert_close(term(student + 3, teacher + 3), term(student, teacher))
        torch.testing.assert_close(term(teacher, student), term(student, teacher))
        torch.testing.assert_close(term(student.flip(0), teacher.flip(0)), term(student, teacher))


@each_method
def test_a_student_like_its_teacher_costs_least(name: str) -> None:
    method = METHODS[name]
    teacher = method.example(1)
    least = method.term(teacher.clone(), teacher).item()
    assert least == pytest.approx(math.log(5) / 2 if name == "vid" else 0, abs=1e-12)
    for seed in range(2, 6):
        assert method.term(method.example(seed), teacher).item() > least


# Gradients, precision, and what is at the edges


@each_method
def test_gradients_are_the_derivatives(name: str) -> None:
    method = METHODS[name]
    student, teacher = method.example(1).requires_grad_(), method.example(2)
    assert torch.autograd.gradcheck(lambda features: method.term(features, teacher), student)


def test_gradients_of_what_vid_and_correlation_learn() -> None:
    variance = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda variance: vid(maps(1), maps(2), variance), variance)
    teacher = embeddings(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda teacher: correlation(embeddings(1), teacher), teacher)


@each_method
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, precision: torch.dtype) -> None:
    method = METHODS[name]
    student, teacher = ((300 * method.example(seed)).to(precision) for seed in (1, 2))
    found = method.term(student, teacher)
    assert found.dtype == torch.float32 and found.isfinite()
    torch.testing.assert_close(found, method.term(student.float(), teacher.float()), rtol=0, atol=0)
    assert found.item() == pytest.approx(method.term(student.double(), teacher.double()).item(), rel=1e-4)


def edges() -> list[tuple[str, str, Callable[[Tensor], Tensor]]]:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "one image": lambda features: features[:1],
        "two images": lambda features: features[:2],
        "the same image twice": lambda features: features[[0, 0, 1, 2]],
        "the same image everywhere": lambda features: features[[0, 0, 0]],
        "opposite images": lambda features: torch.cat([features, -features]),
        "zeros": torch.zeros_like,
        "one image of zeros": lambda features: torch.cat([features[:3], torch.zeros_like(features[:1])]),
        "the largest half": lambda features: 65504 * features.sign(),
        "small": lambda features: 1e-6 * features,
    }
    return [(name, edge, change) for name in METHODS for edge, change in changes.items()]


@pytest.mark.parametrize(("name", "edge", "change"), edges(), ids=lambda value: value if isinstance(value, str) else "")
def test_finite_at_the_edges(name: str, edge: str, change: Callable[[Tensor], Tensor]) -> None:
    method = METHODS[name]
    student = change(method.example(1).float())
    others = method.example(2, images=len(student)).float()
    for one, teacher in ((student, others), (others, student), (student, student.clone())):
        learner = one.clone().requires_grad_()
        found = method.term(learner, teacher)
        found.backward()
        assert found.isfinite(), edge
        assert learner.grad is not None and learner.grad.isfinite().all(), edge


@pytest.mark.parametrize("name", ["rkd", "pkt", "similarity", "correlation"])
def test_one_image_has_no_relations(name: str) -> None:
    method = METHODS[name]
    expected = pytest.approx(0, abs=1e-12)
    assert method.term(method.example(1, images=1), method.example(2, images=1)).item() == expected


def test_rounding_of_opposite_embeddings_has_a_logarithm() -> None:
    for seed in range(100):
        embedding = 100 * normal(seed, 1, 64).float()
        opposite = torch.cat([embedding, -embedding])
        assert pkt(opposite, embeddings(0, images=2).float()).isfinite()


def test_distances_of_images_that_all_coincide_are_their_mean() -> None:
    # As in the authors' code, where none is smaller than 1e-6.
    teacher = torch.tensor([[0.0], [1], [3]])  # relative distances 1/2, 1, 3/2
    assert rkd_distance(torch.ones(3, 2), teacher).item() == pytest.approx(2 * (0.5 * 0.5**2 + 0.5 * 0.5**2) / 9)


def test_images_that_coincide_do_not_pull_each_other_apart_with_all_force() -> None:
    # A direction of length 0 would be divided by 1e-12 otherwise.
    student = embeddings(1)[[0, 0, 1, 2]].requires_grad_()
    rkd(student, embeddings(2)[:4]).backward()
    assert student.grad is not None and student.grad.abs().max() < 100


@each_method
def test_inputs_stay_as_they_are_and_the_teacher_learns_nothing(name: str) -> None:
    method = METHODS[name]
    student, teacher = method.example(1).requires_grad_(), method.example(2)
    before = student.detach().clone(), teacher.clone()
    method.term(student, teacher).backward()
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("name", ["hint", "attention", "similarity", "vid"])
def test_channels_last_is_the_same(name: str) -> None:
    method = METHODS[name]
    student, teacher = method.example(1), method.example(2)
    rearranged = [maps.contiguous(memory_format=torch.channels_last) for maps in (student, teacher)]
    torch.testing.assert_close(method.term(*rearranged), method.term(student, teacher))


# Modules


@each_method
def test_networks_of_other_shapes_and_stages(name: str) -> None:
    student, teacher = network_outputs(1, NARROW), network_outputs(20, WIDE_AND_LONG)
    loss = fitted(name, student, teacher, weight=3, ce_weight=0.5)
    found = parts(loss, student, teacher)
    assert set(found) == {"loss", "ce", name}
    assert all(value.shape == () for value in found.values())
    torch.testing.assert_close(found["ce"], cross_entropy(student.logits, torch.arange(4)))
    torch.testing.assert_close(found["loss"], 0.5 * found["ce"] + 3 * found[name])
    student.logits.requires_grad_()
    parts(loss, student, teacher)["loss"].backward()
    weights = list(loss.named_parameters())
    assert {name for name, weight in weights if weight.grad is None or not weight.grad.abs().sum() > 0} <= {
        # BatchNorm takes it away again.
        "regressor.0.bias"
    }
    assert bool(weights) == (name in ("hint", "vid", "correlation", "map_mse"))
    # And back, where the teacher is the smaller one and has fewer stages.
    found = parts(fitted(name, teacher, student), teacher, student)
    assert found["loss"].isfinite()


@each_method
def test_1000_classes_one_image_and_images_without_labels(name: str) -> None:
    student, teacher = (network_outputs(seed, NARROW, images=1, classes=1000) for seed in (1, 2))
    loss = fitted(name, student, teacher)
    found = loss(student, teacher, torch.tensor([-1]), torch.arange(1), 1)
    assert all(value.isfinite() for value in found.values())
    assert found["ce"] == 0


@each_method
def test_the_first_values_are_the_term_s(name: str) -> None:
    """What the modules take of two networks; those with regressors have tests of their own."""
    student, teacher = network_outputs(1, NARROW), network_outputs(20, WIDE_AND_LONG)
    assert student.embedding is not None and teacher.embedding is not None
    expected = {
        "attention": sum(attention(*pair) for pair in zip(student.stages, teacher.stages[1:], strict=True)),
        "similarity": similarity(student.stages[2], teacher.stages[3]),
        "rkd": rkd(student.embedding, teacher.embedding),
        "pkt": pkt(student.embedding, teacher.embedding),
    }
    if name in expected:
        torch.testing.assert_close(parts(fitted(name, student, teacher), student, teacher)[name], expected[name])


def test_other_powers_and_weights_of_the_parts() -> None:
    student, teacher = network_outputs(1, NARROW[-1:]), network_outputs(20, NARROW[-1:])
    found = parts(loss_of("attention", p=4), student, teacher)["attention"]
    torch.testing.assert_close(found, attention(student.stages[0], teacher.stages[0], 4))
    assert student.embedding is not None and teacher.embedding is not None
    found = parts(loss_of("rkd", distance_weight=1, angle_weight=0), student, teacher)["rkd"]
    torch.testing.assert_close(found, rkd_distance(student.embedding, teacher.embedding))


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [((4, 8), (5, 8), (1, 1)), ((4, 16), (5, 8), (3, 3)), ((4, 4), (5, 8), (4, 4)), ((4, 11), (5, 8), (4, 4))],
)
def test_hint_brings_the_student_s_maps_to_the_teacher_s_shape(
    student: tuple[int, int], teacher: tuple[int, int], kernel: tuple[int, int]
) -> None:
    # The second of the three that both have, counted from the last.
    outputs = network_outputs(1, [(3, 9), student, (8, 2)])
    targets = network_outputs(20, [(2, 2), (3, 9), teacher, (8, 2)])
    loss = fitted("hint", outputs, targets)
    convolution, normalisation, activation = loss.regressor
    assert convolution.kernel_size == kernel
    assert sum(weight.numel() for weight in loss.parameters()) == 4 * 5 * math.prod(kernel) + 5 + 2 * 5
    assert isinstance(normalisation, nn.BatchNorm2d) and isinstance(activation, nn.ReLU)
    regressed = loss.regressor(outputs.stages[1])
    assert regressed.shape == targets.stages[2].shape
    torch.testing.assert_close(parts(loss, outputs, targets)["hint"], hint(regressed, targets.stages[2]))


@pytest.mark.parametrize(("stage", "exists"), [(1, True), (3, True), (4, False)])
def test_hint_s_stage_is_one_that_both_networks_have(stage: int, exists: bool) -> None:
    student, teacher = network_outputs(1, NARROW), network_outputs(20, WIDE_AND_LONG)
    if exists:
        assert parts(fitted("hint", student, teacher, stage=stage), student, teacher)["hint"].isfinite()
    else:
        with pytest.raises(ValueError) as error:
            fitted("hint", student, teacher, stage=stage)
        assert str(error.value) == "stage=4: expected a whole number from 1 to 3"


@pytest.mark.parametrize(("size", "to_size"), [(7, 16), (3, 4), (4, 16)])
def test_hint_averages_the_teacher_s_maps_down_to_a_student_s_that_are_not_half_as_large(
    size: int, to_size: int
) -> None:
    student, teacher = network_outputs(1, [(4, size)]), network_outputs(2, [(5, to_size)])
    loss = fitted("hint", student, teacher, stage=1)
    assert loss.regressor[0].kernel_size == (1, 1)
    averaged = nn.functional.adaptive_avg_pool2d(teacher.stages[0], size)
    expected = hint(loss.regressor(student.stages[0]), averaged)
    torch.testing.assert_close(parts(loss, student, teacher)["hint"], expected)


def test_hidden_cosine_and_map_mse_are_the_pytorch_tutorial_s_own_recipe() -> None:
    student, teacher = network_outputs(1, [(4, 16), (16, 8)]), network_outputs(20, [(8, 16), (32, 8)])
    hidden, longer = student.stages[-1].flatten(1), teacher.stages[-1].flatten(1)
    recipe = nn.CosineEmbeddingLoss()(hidden, nn.functional.avg_pool1d(longer, 2), target=torch.ones(4))
    torch.testing.assert_close(
        parts(fitted("hidden_cosine", student, teacher), student, teacher)["hidden_cosine"], recipe
    )

    loss = fitted("map_mse", student, teacher)
    assert isinstance(loss, MapMSE)
    assert sum(weight.numel() for weight in loss.parameters()) == 16 * 32 * 3 * 3 + 32
    recipe = nn.MSELoss()(loss.regressor(student.stages[-1]), teacher.stages[-1])
    torch.testing.assert_close(parts(loss, student, teacher)["map_mse"], recipe)


def test_vid_learns_means_and_variances() -> None:
    student, teacher = network_outputs(1, NARROW), network_outputs(20, WIDE_AND_LONG)
    loss = fitted("vid", student, teacher)
    # Three 1×1 convolutions without bias, and a variance for each of the teacher's channels.
    expected = sum(of * to + 2 * to**2 + to for of, to in ((4, 7), (6, 9), (8, 11)))
    assert sum(weight.numel() for weight in loss.parameters()) == expected
    with torch.no_grad():
        for regressor in loss.regressors:
            regressor[-1].weight.zero_()
    # Means of 0, variances of 5, and the teacher's last maps averaged down by 2.
    by_hand = 0.0
    for features in teacher.stages[1:]:
        images, channels, size, _ = features.shape
        blocks = features.double().numpy().reshape(images, channels, size // 2, 2, size // 2, 2)
        by_hand += ((blocks.mean(axis=(3, 5)) ** 2).mean() / 5 + math.log(5)) / 2
    assert parts(loss, student, teacher)["vid"].item() == pytest.approx(by_hand, rel=1e-5)


def test_correlation_is_that_of_both_projections() -> None:
    student, teacher = network_outputs(1, NARROW), network_outputs(20, WIDE_AND_LONG)
    loss = fitted("correlation", student, teacher, dimensions=3)
    state = {key: value.double().numpy() for key, value in loss.state_dict().items()}
    vectors = [
        outputs.embedding.double().numpy() @ state[f"{side}_projection.weight"].T + state[f"{side}_projection.bias"]
        for side, outputs in (("student", student), ("teacher", teacher))
    ]
    differences = np.abs(vectors[0] - vectors[1])
    expected = np.mean([differences[i] @ differences[i + 1] for i in range(3)])
    assert parts(loss, student, teacher)["correlation"].item() == pytest.approx(expected, rel=1e-5)


def test_the_same_seed_gives_the_same_projections() -> None:
    student, teacher = network_outputs(1, NARROW), network_outputs(20, WIDE_AND_LONG)
    for name in ("hint", "vid", "correlation", "map_mse"):
        one, other = (fitted(name, student, teacher).state_dict() for _ in range(2))
        assert all(torch.equal(one[key], other[key]) for key in one)


def keys() -> list[tuple[str, str]]:
    return [(name, key) for name, method in METHODS.items() for key in ("weight", "ce_weight", *method.arguments)]


@pytest.mark.parametrize(("name", "key"), keys())
@pytest.mark.parametrize("value", [-1, "abc", None, math.nan, math.inf, True])
def test_bad_values_are_refused(name: str, key: str, value: object) -> None:
    least = 1 if key in ("stage", "dimensions", "p") else 0
    noun = "a whole number" if key in ("stage", "dimensions") else "a number"
    with pytest.raises(ValueError) as error:
        loss_of(name, **{key: value})
    assert str(error.value) == f"{key}={as_typed(value)}: expected {noun} from {least}"


@each_method
def test_the_defaults_are_the_benchmark_s_or_the_tutorial_s(name: str, composed: Callable[..., Settings]) -> None:
    loss = build("loss", composed(f"loss={name}").loss)
    assert isinstance(loss, METHODS[name].module)
    assert (loss.weight, loss.ce_weight) == (METHODS[name].weight, METHODS[name].ce_weight)
    for key, value in {**METHODS[name].arguments, **({"dimensions": 128} if name == "correlation" else {})}.items():
        assert getattr(loss, key) == value


# With networks, on images


class Stages(nn.Module):
    """A small network with as many stages as widths; each halves the size."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(of, to, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(to), nn.ReLU())
            for of, to in zip((3, *widths), widths, strict=False)
        )
        self.linear = nn.Linear(widths[-1], 10)
        self.roles = {"stages": [f"layers.{number}" for number in range(len(widths))], "embedding": "linear"}

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images)
        return self.linear(images.mean(dim=(2, 3)))


@each_method
def test_a_student_gets_closer_to_a_teacher_of_another_shape(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = Stages(8, 12, 16), Stages(6, 10, 14, 20).eval().requires_grad_(False)
    images, labels = normal(0, 16, 3, 16, 16).float(), torch.arange(16) % 10
    loss = loss_of(name, METHODS[name].weight, ce_weight=0)
    observed_student, observed_teacher = Observed(student, student, loss.roles), Observed(teacher, teacher, loss.roles)
    with torch.no_grad():
        loss.fit_to(observed_student(images[:2]), observed_teacher(images[:2]), torch.arange(16), labels)
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=0.003)
    values = []
    for _ in range(15):
        found = loss(observed_student(images), observed_teacher(images), labels, torch.arange(16), 1)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        values.append(found[name].item())
    assert values[-1] < 0.995 * values[0]


def test_whole_runs_on_digits(kdpipe: Callable) -> None:
    small = ["dataset=digits", "train.threads=1", "train.batch_size=50", "train.epochs=2"]
    student = ["model=resnet20", "model.depth=8"]
    # Its maps are twice as large as the student's.
    teacher = ["experiment=teacher", *student, "model.image_size=16"]
    distill = ["experiment=distill", *student, "model@teacher=resnet20", "teacher.depth=8", "teacher.image_size=16"]
    assert kdpipe(*small, *teacher).status == 0
    names_of_weights = set(ResNet(8, 10).state_dict())
    for name in METHODS:
        before = set(Path("outputs/runs").iterdir())
        outcome = kdpipe(*small, *distill, "dataset.train_fraction=0.3", f"loss={name}")
        assert outcome.status == 0, outcome.errors
        (folder,) = (folder for folder in Path("outputs/runs").iterdir() if folder not in before)
        first, second, *_ = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
        assert second[f"train/{name}"] < first[f"train/{name}"], name
        assert set(load_file(folder / "model.safetensors")) == names_of_weights
