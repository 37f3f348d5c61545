"""Teachers that are not worth listening to are named before a student listens to them."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import fit_for_test
from torch import Tensor, nn

from kdpipe.data import ImageDataset, Source, split
from kdpipe.data.digits import digits
from kdpipe.losses import CrossEntropy
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.settings.errors import ConfigError
from kdpipe.system.hardware import Hardware
from kdpipe.system.once import log_once
from kdpipe.training.teacher import FrozenTeacher
from kdpipe.training.teacher_check import check_teacher, correct_by_chance, mean_entropy, no_better_than_chance

CPU = Hardware(torch.device("cpu"))
DIGITS = split(digits(), "digits", train_fraction=1, val_fraction=0.2, test_fraction=0.2, split_seed=0)


@pytest.fixture(autouse=True)
def nothing_warned() -> None:
    log_once.cache_clear()


def untrained() -> Classifier:
    torch.manual_seed(1)
    return Classifier(ResNet(8, 10), 8, [0.5] * 3, [0.5] * 3, "none")


@pytest.fixture(scope="module")
def trained() -> Classifier:
    learner = untrained()
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    accuracy = fit_for_test(learner, DIGITS, CrossEntropy(), optimizer, epochs=4)[-1]["val/accuracy"]
    assert accuracy > 0.9
    return learner


class Told:
    """What a look at a teacher says: one line, and its warnings."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.folder, self.caplog = folder, caplog

    def of(
        self, classifier: nn.Module, temperature: float | None, data: ImageDataset = DIGITS
    ) -> tuple[str, list[str]]:
        self.caplog.clear()
        with self.caplog.at_level(logging.INFO, "kdpipe"):
            check_teacher("resnet8", FrozenTeacher(classifier), temperature, data, self.folder, CPU)
        said, *warnings = self.caplog.records
        assert said.levelno == logging.INFO and {record.levelno for record in warnings} <= {logging.WARNING}
        return said.getMessage(), [record.getMessage() for record in warnings]


@pytest.fixture
def told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., tuple[str, list[str]]]:
    return Told(tmp_path, caplog).of


class Says(nn.Module):
    """A network that says of each image what a function makes of it: logits [N, classes] from images [N, C, H, W]."""

    def __init__(self, what: str, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what
        self.answer = answer

    def extra_repr(self) -> str:
        return self.what  # by which kept answers are told apart

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images)


def classifier_that(what: str, answer: Callable[[Tensor], Tensor]) -> Classifier:
    return Classifier(Says(what, answer), 8, [0.0] * 3, [1.0] * 3, "none")


def numbered(classes: int, each: int, validation: list[int] | None = None) -> ImageDataset:
    """Images that carry the number of their class in their first two pixels, class by class."""
    labels = torch.arange(classes).repeat_interleave(each)
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = labels // 256, labels % 256
    given = {"test": torch.arange(0, len(labels), each)}
    given["validation"] = given["test"] + 1 if validation is None else torch.tensor(validation)
    source = Source(images, labels, tuple(map(str, range(classes))), given)
    return split(source, "numbered", train_fraction=1, val_fraction=0.1, test_fraction=None, split_seed=0)


def knows(classes: int, scale: float) -> Classifier:
    """Right about every image of `numbered`, with logits that are `scale` for its class and 0 for the others."""

    def answer(images: Tensor) -> Tensor:
        first, second = (255 * images[:, 0, 0, :2]).round().long().unbind(dim=1)
        return scale * nn.functional.one_hot(256 * first + second, classes).float()

    return classifier_that(f"knows {classes} classes, {scale}", answer)


def guesses(classes: int) -> Classifier:
    return classifier_that("guesses", lambda images: torch.eye(classes)[0].repeat(len(images), 1))


def test_an_untrained_teacher_is_no_better_than_chance(told: Callable) -> None:
    said, (warning,) = told(untrained(), 4)
    assert re.search(r"of 359 validation images, mean entropy 2\.\d\d nats of 2\.30 at T 4$", said)
    assert warning.startswith("teacher resnet8 is no better than chance (")
    assert said.removeprefix("teacher resnet8: ") in warning
    assert "train it longer" in warning
    assert "\n" not in warning


def test_a_trained_teacher_draws_no_warning(told: Callable, trained: Classifier) -> None:
    said, warnings = told(trained, 4)
    assert not warnings
    assert said.startswith("teacher resnet8: 9")


def test_a_trained_teacher_is_near_one_hot_at_a_low_temperature(told: Callable, trained: Classifier) -> None:
    said, (warning,) = told(trained, 0.1)
    assert "nats of 2.30 at T 0.1" in said
    assert warning.startswith("teacher resnet8 answers near one-hot (9")
    assert said.removeprefix("teacher resnet8: ") in warning
    assert "a higher loss.temperature" in warning
    assert "\n" not in warning


def test_without_a_temperature_only_the_accuracy_counts(told: Callable, trained: Classifier) -> None:
    said, warnings = told(trained, None)
    assert "entropy" not in said and not warnings
    assert len(told(untrained(), None)[1]) == 1


def test_without_validation_images_it_is_asked_about_those_of_the_training(told: Callable, trained: Classifier) -> None:
    data = split(digits(), "digits", train_fraction=1, val_fraction=0, test_fraction=0.2, split_seed=0)
    assert "of 1,000 training images" in told(trained, 4, data)[0]


def test_the_same_question_is_worked_out_once_whatever_the_temperature(told: Callable, trained: Classifier) -> None:
    looked_at: list[int] = []
    watching = trained.register_forward_hook(lambda module, images, logits: looked_at.append(len(logits)))
    told(trained, 4)
    assert sum(looked_at) == 2 + 359 + 1000  # two tell the answers' shape
    told(trained, 0.1)
    assert sum(looked_at) == 2 + 359 + 1000 + 2
    watching.remove()


@pytest.mark.parametrize(("scale", "warned"), [(40, False), (2000, True)])
def test_a_thousand_classes(told: Callable, scale: float, warned: bool) -> None:
    said, warnings = told(knows(1000, scale), 4, numbered(1000, 4))
    assert said.startswith("teacher resnet8: 100.0 % of 1,000 validation images, mean entropy ")
    assert "nats of 6.91 at T 4" in said
    assert ["near one-hot" in warning for warning in warnings] == [True] * warned
    assert "no better than chance" in told(guesses(1000), 4, numbered(1000, 4))[1][0]


def test_logits_of_any_size(told: Callable) -> None:
    said, (warning,) = told(knows(10, 3e38), 1e-3, numbered(10, 30))
    assert "mean entropy 0.00 nats of 2.30 at T 0.001" in said
    assert "near one-hot" in warning
    uniform, one_hot = torch.zeros(5, 10), 3e38 * torch.eye(10)
    assert mean_entropy(uniform, 1e-3) == pytest.approx(math.log(10))
    assert mean_entropy(one_hot, 1e-3) == 0
    assert mean_entropy(-one_hot, 1e30) == pytest.approx(math.log(9))


def test_too_few_validation_images_to_tell_draw_no_warning(told: Callable) -> None:
    data = numbered(10, 30, validation=[1, 2, 31])
    said, warnings = told(guesses(10), 4, data)
    assert said.startswith("teacher resnet8: 66.7 % of 3 validation images") and not warnings
    assert not told(knows(10, 8), 4, data)[1]


def test_validation_images_of_one_class_cannot_tell_either(told: Callable) -> None:
    data = numbered(10, 30, validation=list(range(1, 29)))
    assert not told(guesses(10), 4, data)[1]
    one_class = replace(data, labels=torch.zeros_like(data.labels))
    assert not told(guesses(10), 4, one_class)[1]


def test_what_is_better_than_chance() -> None:
    assert no_better_than_chance(correct=10, by_chance=10, total=100)
    assert no_better_than_chance(correct=14, by_chance=10, total=100)  # p 0.12
    assert not no_better_than_chance(correct=16, by_chance=10, total=100)  # p 0.04
    assert no_better_than_chance(correct=90, by_chance=90, total=100)  # always the most common class
    assert not no_better_than_chance(correct=5, by_chance=3, total=5)  # five right of five: p 0.08, no more is possible


def test_a_teacher_that_tells_rare_images_from_common_ones_is_better_than_always_the_common_class() -> None:
    labels = torch.tensor([0] * 200 + [1] * 20)
    tells = torch.tensor([0] * 181 + [1] * 19 + [1] * 15 + [0] * 5)  # fewer right answers than 200
    correct = int((tells == labels).sum())
    assert correct == 196
    assert not no_better_than_chance(correct, correct_by_chance(tells, labels, 2), 220)
    always = torch.zeros(220, dtype=torch.int64)
    assert correct_by_chance(always, labels, 2) == 200
    assert no_better_than_chance(200, correct_by_chance(always, labels, 2), 220)


def test_logits_that_are_no_numbers_are_refused(told: Callable) -> None:
    def answer(images: Tensor) -> Tensor:
        return torch.ones(len(images), 10) / (images[:, 0, 0, 1] * 255 - 3).abs().clamp(max=1)[:, None].floor()

    with pytest.raises(ConfigError, match=r"^model@teacher=resnet8: its logits are NaN or infinite for [\d,]+ of "):
        told(classifier_that("divides by nothing", answer), 4, numbered(10, 30))
