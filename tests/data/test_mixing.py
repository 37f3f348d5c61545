"""MixUp and CutMix: what is mixed, and that student and teacher see the same images."""

from collections.abc import Callable

import pytest
import torch
from helpers import classifier, fit_for_test, some_digits
from torch import Tensor

from kdpipe.data.mixing import Mixing
from kdpipe.losses import KD
from kdpipe.losses.outputs import Outputs
from kdpipe.training.teacher import NetworkTeacher

IMAGES = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def shares_of_the_first(labels: Tensor) -> Tensor:
    """The share of the first of both images in each mixed one, from labels that differ."""
    return labels[torch.arange(6), LABELS]


def test_mixup_weighs_both_images_and_both_labels_alike() -> None:
    images, labels = Mixing(mixup=0.8, cutmix=None, num_classes=4, seed=0)(IMAGES, LABELS, epoch=1, step=0)
    share = shares_of_the_first(labels)[0]
    assert 0 < share < 1
    torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES.roll(1, 0))
    one_hot = torch.eye(4)[LABELS]
    torch.testing.assert_close(labels, share * one_hot + (1 - share) * one_hot.roll(1, 0))


def test_cutmix_pastes_a_rectangle_and_weights_the_labels_by_its_area() -> None:
    mixing = Mixing(mixup=None, cutmix=1, num_classes=4, seed=0)
    found = set()
    for step in range(20):
        images, labels = mixing(IMAGES, LABELS, epoch=1, step=step)
        pasted = (images != IMAGES).any(dim=(0, 1))
        rows, columns = pasted.any(dim=1), pasted.any(dim=0)
        assert torch.equal(pasted, rows[:, None] & columns)
        assert torch.equal(images, torch.where(pasted, IMAGES.roll(1, 0), IMAGES).float())
        torch.testing.assert_close(shares_of_the_first(labels), (1 - pasted.float().mean()).expand(6))
        found.add(int(pasted.sum()))
    assert len(found) > 5


def test_with_both_each_step_uses_one_of_them() -> None:
    mixing = Mixing(mixup=1, cutmix=1, num_classes=4, seed=0)
    cut = 0
    for step in range(40):
        images, _ = mixing(IMAGES, LABELS, epoch=1, step=step)
        cut += bool(((images == IMAGES) | (images == IMAGES.roll(1, 0))).all())
    assert 10 < cut < 30


def test_the_shares_depend_on_seed_epoch_and_step_alone() -> None:
    def drawn(seed: int, epoch: int, step: int) -> Tensor:
        torch.rand(step + 1)  # what else is drawn does not matter
        return Mixing(0.5, 1, 4, seed)(IMAGES, LABELS, epoch, step)[0]

    assert torch.equal(drawn(0, 1, 2), drawn(0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(drawn(0, 1, 2), drawn(*other))


def test_mixing_does_not_change_the_global_generators() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Mixing(0.5, 1, 4, 0)(IMAGES, LABELS, 1, 1)
    assert torch.equal(torch.rand(2), expected)


def test_student_and_teacher_see_the_same_mixed_images() -> None:
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    given: list[Tensor] = []

    class Kept(KD):
        def forward(
            self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
        ) -> dict[str, Tensor]:
            given.append(labels)
            return super().forward(student, teacher, labels, indices, epoch)

    model, teacher = classifier(), NetworkTeacher(classifier())
    for name, module in (("student", model), ("teacher", teacher.classifier)):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = some_digits()
    mixing = Mixing(0.5, 1, 10, 0)
    (metrics,) = fit_for_test(model, data, Kept(0.5, 4), optimizer, epochs=1, teacher=teacher, mixing=mixing)
    steps = len(given)
    for student, taught in zip(seen["student"], seen["teacher"], strict=False):
        assert student.is_floating_point() and torch.equal(student, taught)
    assert len(seen["teacher"]) == steps
    for labels in given:
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(len(labels)))
    assert any(((labels > 0).sum(dim=1) == 2).any() for labels in given)
    assert 0 <= metrics["train/accuracy"] <= 1


def test_a_run_with_mixing_computes_the_teachers_outputs_in_each_epoch(kdpipe: Callable) -> None:
    small = ["dataset=digits", "dataset.train_fraction=0.3", "train.threads=1", "train.epochs=1"]
    assert kdpipe(*small, "experiment=teacher", "model=resnet20").status == 0
    done = kdpipe(*small, "model@teacher=resnet20", "train.mixup=0.2", "train.cutmix=1")
    assert done.status == 0, done.errors
    assert "logits of resnet20 for 1,078 images" not in done.errors + done.output


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.mixup=0"], "train.mixup=0: expected a number above 0 or null"),
        (["train.cutmix=yes"], "train.cutmix=yes: expected a number above 0 or null"),
        (
            ["train.mixup=0.2", "distillation.outputs=cached"],
            "train.mixup and train.cutmix give each epoch other images; expected auto or online",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_combined_with_mixing_is_an_error(kdpipe: Callable, overrides: list[str], expected: str) -> None:
    done = kdpipe("dataset=digits", *overrides)
    assert done.status == 1 and expected in done.errors
