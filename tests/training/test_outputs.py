"""What frozen networks say of the images, worked out once: the right answers, each one once, and never a wrong one."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fit_for_test
from torch import Tensor, nn

from kdpipe.data import ImageDataset, PerImageValues, split
from kdpipe.data.augmentation import CropFlip, Views
from kdpipe.data.digits import digits
from kdpipe.losses import KD, CrossEntropy
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.models.torchvision import classifier as torchvision_classifier
from kdpipe.system.hardware import Hardware
from kdpipe.training.precomputed import (
    OutputRequest,
    TooLargeError,
    is_intact,
    precomputed_features,
    precomputed_outputs,
)
from kdpipe.training.teacher import FrozenTeacher

CPU = Hardware(torch.device("cpu"))


def some_digits(**changed: float) -> ImageDataset:
    fractions = {"train_fraction": 0.2, "val_fraction": 0.1, "test_fraction": 0.25, "split_seed": 0} | changed
    return split(digits(), "digits", **fractions)


def network(seed: int = 0, image_size: int = 8, mean: float = 0.5, freeze: str = "none") -> Classifier:
    torch.manual_seed(seed)
    return Classifier(ResNet(8, 10), image_size, [mean] * 3, [0.5] * 3, freeze)


def crops(number: int | None, seed: int = 0) -> Views:
    return Views(CropFlip(), "crop_flip", len(some_digits().labels), seed, number)


def logits_of(teacher: FrozenTeacher, data: ImageDataset, views: Views | None = None) -> OutputRequest:
    return OutputRequest("logits", "resnet8", teacher.classifier, teacher.classifier, data, data.splits["train"], views)


def taught(folder: Path, teacher: FrozenTeacher, data: ImageDataset, views: Views | None = None) -> FrozenTeacher:
    teacher.remember(precomputed_outputs(logits_of(teacher, data, views), folder, 10, CPU))
    return teacher


class Runs:
    """How many images a network looked at, once it is watched."""

    def __init__(self, watched: Classifier) -> None:
        self.images = 0
        watched.register_forward_hook(self.count)

    def count(self, module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.images += len(output)


def train_on(
    learner: nn.Module,
    data: ImageDataset,
    loss: nn.Module,
    teacher: FrozenTeacher | None = None,
    views: Views | None = None,
) -> list[dict[str, float]]:
    """The metrics of three epochs."""
    optimizer = torch.optim.SGD([weight for weight in learner.parameters() if weight.requires_grad], lr=0.05)
    return fit_for_test(learner, data, loss, optimizer, epochs=3, teacher=teacher, views=views)


def test_cached_answers_are_those_of_the_network(tmp_path: Path) -> None:
    data = some_digits()
    some = data.splits["train"][torch.randperm(len(data.splits["train"]))[:50]]
    online, cached = FrozenTeacher(network()), taught(tmp_path, FrozenTeacher(network()), data)
    torch.testing.assert_close(cached(data.images[some], some, 1).logits, online(data.images[some], some, 1).logits)


def test_cached_and_online_training_give_the_same_losses(tmp_path: Path) -> None:
    data = some_digits()
    cached = train_on(network(1), data, KD(0.5, 4), taught(tmp_path, FrozenTeacher(network()), data))
    online = train_on(network(1), data, KD(0.5, 4), FrozenTeacher(network()))
    assert cached == [pytest.approx(epoch, rel=1e-4) for epoch in online]


def test_views_from_the_cache_and_online_give_the_same_losses(tmp_path: Path) -> None:
    data, views = some_digits(), crops(2)
    cached = train_on(network(1), data, KD(0.5, 4), taught(tmp_path, FrozenTeacher(network()), data, views), views)
    online = train_on(network(1), data, KD(0.5, 4), FrozenTeacher(network()), views)
    assert cached == [pytest.approx(epoch, rel=1e-4) for epoch in online]


def test_each_view_has_its_own_answer(tmp_path: Path) -> None:
    data, views = some_digits(), crops(2)
    teacher = taught(tmp_path, FrozenTeacher(network()), data, views)
    some = data.splits["train"][:20]
    first, second, third = (teacher(data.images[some], some, epoch).logits for epoch in (1, 2, 3))
    assert torch.equal(first, third) and not torch.allclose(first, second)


def test_the_network_looks_at_the_training_images_once_in_all(tmp_path: Path) -> None:
    data = some_digits()
    seen = []
    for _ in range(3):
        teacher = FrozenTeacher(network())
        runs = Runs(teacher.classifier)
        taught(tmp_path, teacher, data)(data.images[data.splits["train"]], data.splits["train"], 1)
        seen.append(runs.images - 2)  # two tell the answers' shape
    assert seen == [len(data.splits["train"]), 0, 0]


def test_whatever_an_answer_depends_on_gives_another_entry() -> None:
    data = some_digits()

    def question(data: ImageDataset = data, views: Views | None = None, **teacher: float) -> OutputRequest:
        return logits_of(FrozenTeacher(network(**teacher)), data, views)

    questions = [
        question(),
        question(seed=1),
        question(image_size=16),
        question(mean=0.4),
        question(replace(data, fingerprint="other images")),
        question(some_digits(split_seed=1)),
        question(views=crops(2)),
        question(views=crops(3)),
        question(views=replace(crops(2), described="another augmentation")),
        replace(question(), name="features"),
    ]
    keys = [asked.key(CPU) for asked in questions] + [
        question().key(replace(CPU, precision="bfloat16")),
        question().key(Hardware(torch.device("cuda"))),
    ]
    assert len(set(keys)) == len(keys)
    assert question().key(CPU) == keys[0]
    assert question(views=crops(2, seed=1)).key(CPU) == question(views=crops(2)).key(CPU)


def test_an_entry_of_another_version_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_digits()
    monkeypatch.setattr("kdpipe.training.precomputed.RESULTS", "0.0.1")
    taught(tmp_path, FrozenTeacher(network()), data)
    monkeypatch.undo()
    taught(tmp_path, FrozenTeacher(network()), data)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("damage", ["cut off", "changed", "empty", "of another program", "no meta", "meta torn"])
def test_a_damaged_entry_is_noticed_and_worked_out_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = some_digits()
    positions = data.splits["train"]
    right = taught(tmp_path, FrozenTeacher(network()), data)(data.images, positions, 1).logits.clone()
    (file,) = tmp_path.glob("*/outputs.npy")
    content, meta, shape = file.read_bytes(), file.with_name("meta.json"), np.load(file).shape
    if damage == "no meta":
        meta.unlink()
    elif damage == "meta torn":
        meta.write_text(meta.read_text()[:20])
    else:
        file.write_bytes(
            {
                "cut off": content[:-10],
                "changed": content[:-1] + bytes([content[-1] ^ 1]),
                "empty": b"",
                "of another program": b"PK\x03\x04 no array",
            }[damage]
        )
    assert not is_intact(file.parent, shape)
    with caplog.at_level(logging.WARNING, "kdpipe"):
        again = taught(tmp_path, FrozenTeacher(network()), data)(data.images, positions, 1).logits
    assert torch.equal(right, again)
    assert is_intact(file.parent, shape)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"{file.parent} is damaged and will be rebuilt"]


def test_the_entry_says_what_it_is(tmp_path: Path) -> None:
    data = some_digits()
    taught(tmp_path, FrozenTeacher(network()), data, crops(2))
    (meta,) = tmp_path.glob("*/meta.json")
    count = len(data.splits["train"])
    assert json.loads(meta.read_text())["about"] == f"logits of resnet8 for {count} images of digits, 2 views"


def test_what_would_be_too_large_is_not_worked_out(tmp_path: Path) -> None:
    teacher, data = FrozenTeacher(network()), some_digits()
    runs = Runs(teacher.classifier)
    gigabytes = len(data.splits["train"]) * 10 * 4 / 1e9
    with pytest.raises(TooLargeError, match="would take"):
        precomputed_outputs(logits_of(teacher, data), tmp_path, gigabytes * 0.99, CPU)
    assert runs.images == 2 and not list(tmp_path.iterdir())
    precomputed_outputs(logits_of(teacher, data), tmp_path, gigabytes * 1.01, CPU)


def test_a_head_learns_the_same_from_features_as_from_images(tmp_path: Path) -> None:
    data = some_digits()
    whole, split_up = network(freeze="backbone"), network(freeze="backbone")
    through_all = train_on(whole, data, CrossEntropy())
    features = precomputed_features(split_up, "resnet8", data, tmp_path, 10, CPU)
    runs = Runs(split_up)
    from_features = train_on(split_up.head, features, CrossEntropy())
    assert from_features == [pytest.approx(epoch, rel=1e-4) for epoch in through_all]
    assert runs.images == 0
    torch.testing.assert_close(whole.head.state_dict(), split_up.head.state_dict(), rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_the_head(tmp_path: Path) -> None:
    data, model = some_digits(), network(freeze="backbone")
    precomputed_features(model, "resnet8", data, tmp_path, 10, CPU)
    with torch.no_grad():
        model.head.weight.add_(1)
    runs = Runs(model)
    precomputed_features(model, "resnet8", data, tmp_path, 10, CPU)
    assert runs.images == 2  # which tell the features' shape


@pytest.mark.parametrize(
    ("build", "ends"),
    [
        (lambda: ResNet(8, 10), True),
        (lambda: torchvision_classifier("mobilenet_v3_small", 10), True),
        (lambda: torchvision_classifier("squeezenet1_1", 10), False),  # averages what its head says of each place
    ],
)
def test_whether_a_network_ends_with_its_head(build: Callable[[], nn.Module], ends: bool) -> None:
    model = Classifier(build(), 64, [0.5] * 3, [0.5] * 3, freeze="backbone")
    assert model.ends_with_head(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)) == ends


def test_asking_whether_the_head_is_last_leaves_the_mode_as_it_was() -> None:
    model = Classifier(ResNet(8, 10), 32, [0.5] * 3, [0.5] * 3).train()
    with pytest.raises(ValueError, match="images have 2 channels"):
        model.ends_with_head(torch.zeros(2, 2, 32, 32, dtype=torch.uint8))
    assert model.training


def test_rows_are_found_by_position() -> None:
    rows = PerImageValues(torch.tensor([2, 5, 9]), torch.tensor([20, 50, 90]))
    assert rows[torch.tensor([9, 2, 2])].tolist() == [90, 20, 20]
