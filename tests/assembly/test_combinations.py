"""What one way of teaching makes of another: refused in a line before anything trains, or told apart."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import some_digits
from torch import nn

from kdpipe.assembly.objectives import check_fit, check_sharing
from kdpipe.losses import DIST, KD, RKD, VID, CombinedLoss, Loss
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.settings.schema import Settings
from kdpipe.system.hardware import Hardware
from kdpipe.training.precomputed import OutputRequest
from kdpipe.training.teacher import FrozenTeacher

CPU = Hardware(torch.device("cpu"))

RESNET18 = ["model=torchvision", "model.weights=null", "model.image_size=32"]


def network(freeze: str = "none") -> Classifier:
    return Classifier(ResNet(8, 10), 8, [0.5] * 3, [0.25] * 3, freeze)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss@also=mutual"], "also=kdpipe.losses.Mutual: expected a method of distillation"),
        (["loss@also=kd_tutorial"], "its term is called kd, as that of the loss; expected another method"),
        (
            ["loss@also=dkd", "train.mixup=0.2"],
            "the loss needs one label for each image; expected null",
        ),
        (
            ["experiment=mutual", "teacher.freeze=backbone"],
            "a second student learns; expected none",
        ),
        (["experiment=mutual", "train.select=best"], "train.select=best: two students are best at different epochs"),
        (
            ["experiment=mutual", "model@teacher=ensemble", "teacher.members=[runs:/a]"],
            "model@teacher=ensemble: expected one network, as the second student",
        ),
        (
            ["experiment=born_again", "chain=[{loss:cross_entropy},{loss:mutual}]"],
            "chain: link 2 has two students and no teacher; only the first link can",
        ),
        (
            ["experiment=student", *RESNET18, "train.batch_size=1"],
            "train.batch_size=1: BatchNorm in resnet18 (model) cannot learn from one image; expected 2 or more",
        ),
        (
            ["experiment=student", *RESNET18, "+model.img_size=32"],
            "model.img_size=32: kdpipe.models.torchvision.classifier has no such argument; did you mean model.im",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_refused(kdpipe: Callable, overrides: list[str], said: str) -> None:
    done = kdpipe("dataset=digits", *overrides)
    assert done.status == 1 and said in done.errors
    assert not list(Path().glob("outputs/runs/*/checkpoints"))


def test_images_without_a_label_are_not_mixed(kdpipe: Callable) -> None:
    done = kdpipe("dataset=cifar10", "dataset.unlabelled_root=more", "train.cutmix=1")
    assert "dataset.unlabelled_root=more: expected null with train.mixup or train.cutmix" in done.errors


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss=hint", "loss.stage=4"], "loss.stage=4: expected a whole number from 1 to 3"),
        (["loss=kd", "loss@also=hint", "also.stage=4"], "also.stage=4: expected a whole number from 1 to 3"),
    ],
    ids=" ".join,
)
def test_a_loss_that_does_not_fit_is_known_before_a_run_begins(
    composed: Callable[..., Settings], overrides: list[str], said: str
) -> None:
    with pytest.raises(ValueError) as error:
        check_fit(composed(*overrides), network(), FrozenTeacher(network()), some_digits())
    assert str(error.value) == said


def test_stages_of_a_frozen_backbone_teach_nothing(composed: Callable[..., Settings]) -> None:
    with pytest.raises(ValueError, match=r"model.freeze=none: the loss compares stages, which stay as they are"):
        check_fit(composed("loss=attention"), network(freeze="backbone"), FrozenTeacher(network()), some_digits())
    check_fit(composed("loss=attention"), network(), FrozenTeacher(network()), some_digits())


@pytest.mark.parametrize("loss", [RKD(25, 50, 1, 1), CombinedLoss(KD(0.5, 4), DIST(1, 1, 4, 1, 1))])
def test_processes_do_not_share_what_compares_images(loss: Loss) -> None:
    check_sharing(loss, True, CPU)
    with pytest.raises(ValueError, match="compares the images of a batch"):
        check_sharing(loss, False, replace(CPU, processes=2))


def test_processes_do_not_share_what_a_loss_learns_and_images_without_a_label() -> None:
    two = replace(CPU, processes=2)
    check_sharing(KD(0.5, 4), False, two)
    learning = VID(1, 1)
    learning.regressors = nn.ModuleList([nn.Conv2d(1, 1, 1)])
    with pytest.raises(ValueError, match="the loss has weights of its own"):
        check_sharing(learning, False, two)
    with pytest.raises(ValueError, match="labelled images"):
        check_sharing(KD(0.5, 4), True, two)


def test_answers_of_other_stages_are_other_entries_of_the_cache() -> None:
    data, keys = some_digits(), set()
    for stages in (("layer1", "layer2"), ("layer1", "layer3")):
        torch.manual_seed(0)
        teacher = FrozenTeacher(network())
        teacher.classifier.network.roles = {"stages": stages}
        teacher.observe(["stages"])
        assert teacher.observed == {"stages": list(stages)}
        asked = (teacher.classifier, teacher.classifier, data, data.splits["train"], None, teacher.observed)
        keys.add(OutputRequest("logits, stages", "net", *asked).key(CPU))
    assert len(keys) == 2


def test_an_ensemble_is_softened_as_the_loss_that_has_an_effect(composed: Callable[..., Settings]) -> None:
    both = ["loss.alpha=0", "loss@also=dist", "model@teacher=ensemble", "teacher.members=[runs:/a]"]
    configs = [composed(*both, f"loss.temperature={temperature}") for temperature in (2, 10)]
    assert {config.teacher.temperature for config in configs} == {4} == {configs[0].softening}
    assert configs[0].identity == configs[1].identity


def test_which_stages_a_loss_is_shown_does_not_hide_the_student_alone(composed: Callable[..., Settings]) -> None:
    network = ["model=torchvision", "model.name=vgg11"]
    alone = composed(*network, "loss=cross_entropy")
    assert alone.identity == composed(*network, "loss=cross_entropy", "model.stages=[features.2]").identity
