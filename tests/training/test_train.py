"""The training loop by itself: what the arms of one seed share, and what a teacher cannot do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import classifier, fit_for_test, some_digits
from torch import Tensor, nn

from kdpipe.data.augmentation import CropFlip, Views
from kdpipe.losses import KD, CrossEntropy
from kdpipe.losses.outputs import Outputs
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.training.loop import batches
from kdpipe.training.teacher import FrozenTeacher


class Kept(nn.Module):
    """A loss that keeps what it is given."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.indices: list[Tensor] = []
        self.epochs: list[int] = []

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        self.indices.append(indices)
        self.epochs.append(epoch)
        return self.loss(student, teacher, labels, indices, epoch)


class Seen(CropFlip):
    """An augmentation that keeps the views that it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.views: list[Tensor] = []

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        self.views.append(super().__call__(images, draws))
        return self.views[-1]


def trained(loss: nn.Module, teacher: FrozenTeacher | None, seed: int = 0) -> tuple[Kept, Seen]:
    torch.manual_seed(0)
    model, kept, seen = classifier(), Kept(loss), Seen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    views = Views(seen, "seen", len(some_digits().labels), seed)
    fit_for_test(model, some_digits(), kept, optimizer, epochs=2, teacher=teacher, views=views, seed=seed)
    return kept, seen


def test_the_arms_of_one_seed_share_batches_and_views_teacher_or_not() -> None:
    alone, alone_seen = trained(CrossEntropy(), None)
    taught, taught_seen = trained(KD(0.5, 4), FrozenTeacher(classifier()))
    assert alone.epochs == taught.epochs
    assert all(torch.equal(one, other) for one, other in zip(alone.indices, taught.indices, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(alone_seen.views, taught_seen.views, strict=True))
    other_seed, _ = trained(CrossEntropy(), None, seed=1)
    assert not torch.equal(torch.cat(alone.indices), torch.cat(other_seed.indices))


def test_each_epoch_sees_each_training_image_once_in_another_order() -> None:
    kept, _ = trained(CrossEntropy(), None)
    first, second = torch.cat(kept.indices).chunk(2)
    assert not torch.equal(first, second)
    assert first.sort().values.tolist() == second.sort().values.tolist() == some_digits().splits["train"].tolist()


def test_a_teacher_stays_as_it_is() -> None:
    teacher = FrozenTeacher(classifier())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trained(KD(1.0, 4), teacher)
    teacher.train()
    assert not any(module.training for module in teacher.classifier.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not teacher(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1).long(), 1).logits.requires_grad


def test_a_last_image_by_itself_joins_the_batch_before() -> None:
    assert [len(batch) for batch in batches(torch.arange(401), 100)] == [100, 100, 100, 101]
    assert [len(batch) for batch in batches(torch.arange(402), 100)] == [100, 100, 100, 100, 2]
    assert [len(batch) for batch in batches(torch.arange(3), 1)] == [1, 1, 1]
    assert [len(batch) for batch in batches(torch.arange(1), 100)] == [1]


def test_the_fast_step_is_the_plain_one_but_for_rounding() -> None:
    """Against a loop as anybody would write it: images resized by one call, no channels-last, no fused kernels."""
    data, size = some_digits(), 20
    fast = Classifier(ResNet(8, 10), size, [0.5] * 3, [0.25] * 3)
    plain = copy.deepcopy(fast.network).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(fast.parameters(), lr=1e-3, fused=True)
    kept = Kept(CrossEntropy())
    (told,) = fit_for_test(fast, data, kept, optimizer, epochs=1)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=False)
    plain.train()
    total = 0.0
    for batch in kept.indices:
        pixels = F.interpolate(data.images[batch].float() / 255, size=(size, size), mode="bilinear", antialias=True)
        loss = F.cross_entropy(plain((pixels.expand(-1, 3, -1, -1) - 0.5) / 0.25), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    assert told["train/loss"] == pytest.approx(total / len(torch.cat(kept.indices)), rel=1e-4)
