"""CRD against its authors' formulas computed image by image, the negatives that it draws, and its memory."""

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import chi2
from torch import Tensor

from kdpipe.data import ImageDataset, split
from kdpipe.data.digits import digits
from kdpipe.losses import CRD, crd, cross_entropy
from kdpipe.losses.crd import crd_log_normalizers
from kdpipe.losses.outputs import Outputs
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.settings.errors import ConfigError
from kdpipe.system.hardware import Hardware
from kdpipe.system.interruption import Interrupted
from kdpipe.training.loop import Hooks, Recipe, fit
from kdpipe.training.observed import Observed
from kdpipe.training.schedules import constant
from kdpipe.training.state import Training
from kdpipe.training.teacher import FrozenTeacher

TEMPERATURE = 0.07


def embeddings(seed: int, number: int, dimensions: int = 8) -> Tensor:
    """Of length 1, float64 [number, dimensions]."""
    values = np.random.default_rng(seed).standard_normal((number, dimensions))
    return F.normalize(torch.from_numpy(values), dim=1)


def some_candidates(images: int, rows: int, negatives: int) -> Tensor:
    draw = np.random.default_rng(3)
    return torch.from_numpy(np.stack([draw.permutation(rows)[: 1 + negatives] for _ in range(images)]))


def arguments(images: int = 4, rows: int = 30, negatives: int = 12) -> tuple[Tensor, ...]:
    return (
        *(embeddings(1, images), embeddings(2, images), embeddings(3, rows), embeddings(4, rows)),
        some_candidates(images, rows, negatives),
    )


def scores(anchors: NDArray, memory: NDArray, candidates: NDArray, temperature: float) -> NDArray:
    """exp(embedding·row / T), one at a time."""
    found = np.empty(candidates.shape)
    for i, rows in enumerate(candidates):
        for j, row in enumerate(rows):
            found[i, j] = math.exp(sum(a * m for a, m in zip(anchors[i], memory[row], strict=True)) / temperature)
    return found


def authors(
    tensors: tuple[Tensor, ...], constants: tuple[float, float] | None = None, temperature: float = TEMPERATURE
) -> tuple[float, tuple[float, float]]:
    """The value of the loss, as the authors' code has it, and its constants Z."""
    student, teacher, student_memory, teacher_memory, candidates = (tensor.numpy() for tensor in tensors)
    of_student = scores(student, teacher_memory, candidates, temperature)
    of_teacher = scores(teacher, student_memory, candidates, temperature)
    n, negatives = len(student_memory), candidates.shape[1] - 1
    if constants is None:
        constants = of_student.mean() * n, of_teacher.mean() * n
    total, noise = 0.0, negatives * (1 / n)
    for found, constant_of_it in zip((of_student, of_teacher), constants, strict=True):
        for own, *others in found / constant_of_it:
            total -= math.log(own / (own + noise + 1e-7)) / len(candidates)
            for other in others:
                total -= math.log(noise / (other + noise + 1e-7)) / len(candidates)
    return total, constants


@pytest.mark.parametrize("rows", [30, 1000], ids=["whole memory multiplied", "rows fetched"])
@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.0])
def test_crd_is_its_authors_formula(rows: int, temperature: float) -> None:
    tensors = arguments(rows=rows)
    value, constants = authors(tensors, temperature=temperature)
    assert crd(*tensors, temperature=temperature).item() == pytest.approx(value, rel=1e-12)
    log_normalizers = crd_log_normalizers(*tensors, temperature=temperature)
    assert log_normalizers.tolist() == pytest.approx(np.log(constants).tolist(), rel=1e-12)
    # With the constants of an earlier batch.
    value, _ = authors(tensors, (5.0, 70.0), temperature)
    frozen = torch.tensor([5.0, 70.0], dtype=torch.float64).log()
    assert crd(*tensors, frozen, temperature).item() == pytest.approx(value, rel=1e-12)
    assert crd(*(tensor.float() for tensor in tensors[:4]), tensors[4], frozen.float(), temperature).item() == (
        pytest.approx(value, rel=1e-5)
    )


def test_crd_by_hand() -> None:
    # One image, one negative, two rows, T 1: the own row's product is 1, the negative's 0; Z = (e + 1) / 2 · 2.
    row, other = [1.0, 0], [0.0, 1]
    memory = torch.tensor([row, other])
    anchor = torch.tensor([row])
    own, negative = math.e / (math.e + 1), 1 / (math.e + 1)
    expected = -math.log(own / (own + 1 / 2)) - math.log(1 / 2 / (negative + 1 / 2))
    value = crd(anchor, anchor, memory, memory, torch.tensor([[0, 1]]), temperature=1)
    assert value.item() == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize("rows", [30, 1000], ids=["whole memory multiplied", "rows fetched"])
def test_gradients_are_the_derivatives_with_memory_and_negatives_frozen(rows: int) -> None:
    student, teacher, *frozen = arguments(3, rows, 5)
    student.requires_grad_(), teacher.requires_grad_()
    normalizers = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s, t: crd(s, t, *frozen, normalizers), (student, teacher))


@pytest.mark.parametrize("rows", [30, 1000], ids=["whole memory multiplied", "rows fetched"])
def test_the_memory_may_be_overwritten_before_the_backward_pass(rows: int) -> None:
    gradients = []
    for write in (False, True):
        student, teacher, *memories, candidates = arguments(rows=rows)
        value = crd(student.requires_grad_(), teacher, *memories, candidates)
        if write:
            for memory in memories:
                memory.zero_()
        value.backward()
        gradients.append(student.grad)
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_order_of_negatives_and_the_split_into_batches_do_not_matter() -> None:
    student, teacher, *memories, candidates = arguments()
    normalizers = torch.tensor([3.0, 4.0])
    whole = crd(student, teacher, *memories, candidates, normalizers)
    reordered = torch.cat([candidates[:, :1], candidates[:, 1:].flip(1)], dim=1)
    torch.testing.assert_close(crd(student, teacher, *memories, reordered, normalizers), whole)
    ones = [
        crd(student[i : i + 1], teacher[i : i + 1], *memories, candidates[i : i + 1], normalizers) for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(ones).mean(), whole)


def test_the_roles_of_the_networks_can_be_exchanged_and_a_rotation_changes_nothing() -> None:
    student, teacher, student_memory, teacher_memory, candidates = arguments()
    value = crd(student, teacher, student_memory, teacher_memory, candidates)
    torch.testing.assert_close(crd(teacher, student, teacher_memory, student_memory, candidates), value)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    rotated = [tensor @ rotation for tensor in (student, teacher, student_memory, teacher_memory)]
    torch.testing.assert_close(crd(*rotated, candidates), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_enough(dtype: torch.dtype) -> None:
    student, teacher, *memories, candidates = arguments()
    expected = crd(*(tensor.to(dtype).double() for tensor in (student, teacher, *memories)), candidates)
    value = crd(*(tensor.to(dtype) for tensor in (student, teacher, *memories)), candidates)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("length", "temperature"), [(1, 1e-3), (1e4, TEMPERATURE), (1e4, 20), (0, TEMPERATURE)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_batch_of_1_and_extreme_embeddings_are_finite(length: float, temperature: float, dtype: torch.dtype) -> None:
    student, teacher, *memories, candidates = arguments(images=1)
    student = (length * student).to(dtype).requires_grad_()
    memories = [memory.float() for memory in memories]
    value = crd(student, (length * teacher).to(dtype), *memories, candidates, None, temperature)
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()


# The module.

CLASSES = 4


def fitted(
    images: int = 40, seed: int = 0, classes: int = CLASSES, dtype: torch.dtype = torch.float32, **values: Any
) -> tuple[CRD, Tensor, Tensor]:
    """A loss for some of the images of a data set, their positions and labels."""
    loss = CRD(**{"negatives": 10, **values})
    positions, labels = torch.arange(images) ** 2 + 5, torch.arange(images) % classes
    torch.manual_seed(seed)
    loss.fit_to(outputs(1, 2, 16), outputs(2, 2, 24), positions, labels)
    return loss.to(dtype), positions, labels


def outputs(seed: int, images: int, dimensions: int, classes: int = CLASSES) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    return Outputs(
        torch.randn(images, classes, generator=draw), embedding=torch.randn(images, dimensions, generator=draw)
    )


def test_the_defaults_are_the_authors() -> None:
    loss = CRD()
    assert (loss.weight, loss.ce_weight, loss.negatives) == (0.8, 1, 16384)
    assert (loss.contrast_temperature, loss.momentum, loss.dimensions) == (0.07, 0.5, 128)


def test_a_step_is_the_authors_and_so_is_the_memory_after_it() -> None:
    loss, positions, labels = fitted(dimensions=6, dtype=torch.float64)
    rows = torch.tensor([7, 0, 22])
    constants = None
    for epoch in (1, 2):
        answers = [outputs(10 + epoch, 3, 16), outputs(20 + epoch, 3, 24)]
        student, teacher = (Outputs(of.logits.double(), embedding=of.embedding.double()) for of in answers)
        projected = []
        for of, projection in ((student, loss.student_projection), (teacher, loss.teacher_projection)):
            weight, bias = projection.weight.detach().numpy(), projection.bias.detach().numpy()
            values = of.embedding.numpy() @ weight.T + bias
            projected.append(values / np.sqrt((values**2).sum(axis=1, keepdims=True)))
        memories = [loss.student_memory.clone(), loss.teacher_memory.clone()]
        tensors = (*map(torch.from_numpy, projected), *memories, loss.candidates(positions[rows], epoch))
        expected, constants = authors(tensors, constants)

        parts = loss(student, teacher, labels[rows], positions[rows], epoch)
        assert parts["crd"].item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(parts["ce"], cross_entropy(student.logits, labels[rows]))
        torch.testing.assert_close(parts["loss"], parts["ce"] + 0.8 * parts["crd"])
        assert loss.log_normalizers.tolist() == pytest.approx(np.log(constants).tolist())
        for memory, before, values in zip((loss.student_memory, loss.teacher_memory), memories, projected, strict=True):
            expected_memory = before.numpy().copy()
            for row, value in zip(rows, values, strict=True):
                moved = 0.5 * expected_memory[row] + 0.5 * value
                expected_memory[row] = moved / np.linalg.norm(moved)
            np.testing.assert_allclose(memory.numpy(), expected_memory, rtol=1e-12)


def test_the_memory_begins_as_the_authors_begin_it() -> None:
    loss, _, _ = fitted(images=4000, dimensions=32)
    for memory in (loss.student_memory, loss.teacher_memory):
        bound = 1 / math.sqrt(32 / 3)
        assert memory.shape == (4000, 32) and memory.abs().max() <= bound
        assert memory.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert not torch.equal(loss.student_memory, loss.teacher_memory)


def test_a_student_learns_to_find_its_teacher_s_embeddings() -> None:
    loss, positions, labels = fitted(dimensions=16, negatives=25)
    teacher = outputs(2, 40, 24)
    embedding = torch.randn(40, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    optimizer = torch.optim.Adam([embedding, *loss.parameters()], lr=0.05)
    values = []
    for epoch in range(1, 41):
        part = loss(Outputs(teacher.logits, embedding=embedding), teacher, labels, positions, epoch)["crd"]
        optimizer.zero_grad()
        part.backward()
        optimizer.step()
        values.append(part.item())
    assert values[-1] < values[0] / 4
    found = F.normalize(loss.student_projection(embedding)) @ loss.teacher_memory.t()
    # Images of one class are never contrasted with each other.
    assert torch.equal(labels[found.argmax(dim=1)], labels)


def test_the_teacher_s_projection_learns_too_and_the_memory_does_not() -> None:
    loss, positions, labels = fitted()
    assert {name for name, _ in loss.named_parameters()} == {
        f"{of}_projection.{what}" for of in ("student", "teacher") for what in ("weight", "bias")
    }
    loss(outputs(1, 5, 16), outputs(2, 5, 24), labels[:5], positions[:5], 1)["loss"].backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in loss.parameters())


def test_in_evaluation_mode_the_memory_stays_as_it_is() -> None:
    loss, positions, labels = fitted()
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    values = {loss(outputs(1, 5, 16), outputs(2, 5, 24), labels[:5], positions[:5], 1)["crd"].item() for _ in range(2)}
    assert len(values) == 1
    assert torch.equal(loss.state_dict()["student_memory"], before["student_memory"])


@pytest.mark.parametrize("classes", [2, 1000])
def test_one_image_or_a_thousand_classes_or_half_precision(classes: int) -> None:
    loss, positions, labels = fitted(2 * classes, classes=classes, negatives=2 * classes - 2)
    answers = [outputs(1, 1, 16, classes), outputs(2, 1, 24, classes)]
    student, teacher = (Outputs(of.logits, embedding=(1e3 * of.embedding).bfloat16()) for of in answers)
    student.embedding.requires_grad_()
    parts = loss(student, teacher, labels[:1], positions[:1], 1)
    parts["loss"].backward()
    assert all(value.isfinite() for value in parts.values()) and student.embedding.grad.isfinite().all()


def test_negatives_are_of_other_classes_each_once_and_not_by_position_but_by_row() -> None:
    loss, positions, labels = fitted()
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    candidates = loss.candidates(positions[shuffled], epoch=1)
    assert candidates.shape == (40, 11) and candidates.dtype == torch.int64
    assert torch.equal(candidates[:, 0], shuffled)
    for own, *negatives in candidates.tolist():
        assert len(set(negatives)) == 10
        assert all(labels[negative] != labels[own] for negative in negatives)


def test_all_images_of_other_classes_can_be_the_negatives() -> None:
    loss, positions, labels = fitted(negatives=30)
    (_, *negatives) = loss.candidates(positions[5:6], epoch=1)[0].tolist()
    assert sorted(negatives) == [row for row in range(40) if labels[row] != labels[5]]


def test_more_negatives_than_there_are_come_with_replacement() -> None:
    loss, positions, labels = fitted(negatives=300)
    candidates = loss.candidates(positions, epoch=1)
    for own, *negatives in candidates.tolist():
        assert set(labels[negatives].tolist()) == set(range(CLASSES)) - {int(labels[own])}
        assert len(set(negatives)) > 25


def test_negatives_are_uniform_and_each_image_s_are_its_own() -> None:
    loss, positions, labels = fitted()
    epochs, chosen, others = 600, 10, 30
    counts, shared = np.zeros((2, 40)), 0
    for epoch in range(epochs):
        # Rows 4 and 8, of one class.
        drawn = [row[1:] for row in loss.candidates(positions[[4, 8]], epoch).tolist()]
        for count, rows in zip(counts, drawn, strict=True):
            count[rows] += 1
        shared += len(set(drawn[0]) & set(drawn[1]))
    expected = epochs * chosen / others
    for count in counts:
        of_others = count[labels.numpy() != 0]
        assert of_others.sum() == count.sum() == epochs * chosen
        # Draws without replacement vary less than those with it.
        statistic = (others - 1) / (others - chosen) * ((of_others - expected) ** 2 / expected).sum()
        assert 0.005 < chi2.sf(statistic, others - 1) < 0.995
    # Two sets of 10 of 30 share 10/3 on average, with a variance of 10/9 · 2/3 · 20/29 (hypergeometric) · 3.
    assert shared / epochs == pytest.approx(10 / 3, abs=3 * math.sqrt(10 / 3 * 2 / 3 * 20 / 29 / epochs))


def test_negatives_depend_on_seed_epoch_and_image_alone() -> None:
    loss, positions, _ = fitted()
    first = loss.candidates(positions[:8], epoch=1)
    assert torch.equal(fitted()[0].candidates(positions[:8], epoch=1), first)
    assert not torch.equal(loss.candidates(positions[:8], epoch=2), first)
    assert not torch.equal(fitted(seed=1)[0].candidates(positions[:8], epoch=1), first)
    # In another batch, wherever other generators are; which stay there.
    torch.manual_seed(5)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(loss.candidates(positions[[20, 3]], epoch=1)[1], first[3])
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]


def test_a_saved_and_loaded_state_gives_the_same_next_losses() -> None:
    loss, positions, labels = fitted()

    def two_steps(loss: CRD) -> list[float]:
        return [
            loss(outputs(1, 8, 16), outputs(2, 8, 24), labels[:8], positions[:8], epoch)["crd"].item()
            for epoch in (2, 3)
        ]

    two_steps(loss)
    kept = io.BytesIO()
    torch.save(loss.state_dict(), kept)
    expected = two_steps(loss)
    again, _, _ = fitted(seed=1)
    assert two_steps(copy.deepcopy(again)) != expected
    again.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
    assert two_steps(again) == expected


def some_digits() -> ImageDataset:
    return split(digits(), "digits", train_fraction=0.1, val_fraction=0, test_fraction=0.25, split_seed=0)


def training(data: ImageDataset) -> tuple[Training, FrozenTeacher]:
    """A student with CRD, before its first step, as a run with `loss=crd loss.negatives=64` has it."""
    torch.manual_seed(0)
    student, teacher = (Classifier(ResNet(8, data.num_classes), 8, [0.5] * 3, [0.5] * 3) for _ in range(2))
    observed, answering = Observed(student, student.network, CRD.roles), FrozenTeacher(teacher)
    answering.observe(CRD.roles)
    loss = CRD(negatives=64)
    positions = data.splits["train"].sort().values
    images = data.images[positions[:2]]
    with torch.no_grad():
        student.eval()
        loss.fit_to(observed(images), answering.answer(images), positions, data.labels[positions])
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
    scheduler = constant(optimizer, 3, 1)
    return Training(observed, loss, optimizer, scheduler, Hardware(torch.device("cpu"))), answering


def run(training: Training, teacher: FrozenTeacher, data: ImageDataset, stop_after: int | None = None) -> list[float]:
    """Train to the end, or through so many steps; the loss of each epoch that ended."""
    values: list[float] = []
    steps = 0

    def on_step() -> None:
        nonlocal steps
        steps += 1
        if steps == stop_after:
            raise Interrupted(2)

    hooks = Hooks(on_epoch=lambda epoch, metrics: values.append(metrics["train/crd"]), on_step=on_step)
    fit(training, data, Recipe(epochs=3, batch_size=50, seed=0, teacher=teacher), hooks)
    return values


def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one() -> None:
    data = some_digits()
    assert len(data.splits["train"]) == 135  # three steps in an epoch
    whole, teacher = training(data)
    expected = run(whole, teacher, data)

    interrupted, teacher = training(data)
    with pytest.raises(Interrupted):
        run(interrupted, teacher, data, stop_after=4)  # in the second epoch
    checkpoint = io.BytesIO()
    torch.save(interrupted.state(), checkpoint)
    rest, teacher = training(data)
    torch.manual_seed(99)
    rest.restore(torch.load(io.BytesIO(checkpoint.getvalue()), weights_only=True))
    assert (rest.epoch, rest.steps) == (2, 1)
    assert run(rest, teacher, data) == expected[1:]
    for mine, others in ((rest.learner, whole.learner), (rest.loss, whole.loss)):
        expected = others.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in mine.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("negatives", 0, "a whole number from 1"),
        ("negatives", 1.5, "a whole number from 1"),
        ("contrast_temperature", 0, "a number above 0"),
        ("momentum", 1, "a number from 0 below 1"),
        ("momentum", -0.5, "a number from 0 below 1"),
        ("dimensions", 0, "a whole number from 1"),
        ("weight", -1, "a number from 0"),
        ("ce_weight", "much", "a number from 0"),
    ],
)
def test_a_bad_value_is_refused(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        CRD(**{key: value})
    assert str(error.value) == f"{key}={value}: expected {expected}"


def test_images_of_one_class_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        fitted(classes=1)
    assert str(error.value) == (
        "negatives=10: the training images are all of one class; expected images of two or more classes"
    )
