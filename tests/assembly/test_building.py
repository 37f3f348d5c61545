"""A component that cannot do its work is refused before there is a run, which would be left behind as FAILED."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_refused, client

ALONE = ["dataset=digits", "loss=cross_entropy", "train.epochs=1", "dataset.train_fraction=0.1"]
WITHOUT = ["~optimizer.amsgrad", "~optimizer.weight_decay", "~optimizer.fused"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer._target_=torch.optim.Adm"], "not found"),
        (["optimizer._target_=torch.optim.RMSprop"], "optimizer.amsgrad=true: ~optimizer.amsgrad leaves it out"),
        (["optimizer._target_=torch.optim.LBFGS", *WITHOUT], "cannot take a step of training"),
        (["optimizer._target_=torch.optim.SparseAdam", *WITHOUT], "cannot take a step of training"),
        (["optimizer._target_=torch.nn.ParameterList", *WITHOUT, "~optimizer.lr"], "expected an optimizer"),
        (["+optimizer.betas=0.9"], "optimizer._target_=torch.optim.Adam"),
        (["+optimizer.foo=1"], "optimizer.foo=1"),
        (["scheduler._target_=torch.optim.lr_scheduler.StepLR"], "does not take epochs and steps_per_epoch"),
        (["scheduler._target_=torch.nn.Identity"], "expected a schedule, such as"),
        (["augmentation._target_=torch.nn.Identity"], "it cannot augment images"),
        (["augmentation._target_=torchvision.transforms.v2.RandomHorizontalFlip"], "that returns such images"),
        (["augmentation=crop_flip", "+augmentation.flop=1"], "augmentation.flop=1: expected flip; did you mean flip?"),
        (["model._target_=torch.nn.ReLU"], "does not take num_classes"),
        (["model=resnet20", "~model.depth"], "model.depth: a value is required by kdpipe.models.resnet.ResNet"),
        (["+model.foo=1"], "model.foo=1"),
        (["+teacher.foo=1"], "teacher.foo=1"),
        (["+dataset.foo=1"], "dataset.foo=1: kdpipe.data.digits.digits takes no arguments"),
        (["dataset._target_=torch.nn.Identity"], "expected a function that returns a kdpipe.data.Source"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_component_that_cannot_work_leaves_no_run(kdpipe: Callable, overrides: list[str], said: str) -> None:
    assert_refused(kdpipe(*ALONE, *overrides), said)
    experiments = [experiment.experiment_id for experiment in client().search_experiments()]
    assert client().search_runs(experiments) == []


def test_a_loss_without_a_term_leaves_no_run(kdpipe: Callable) -> None:
    small = ["dataset=digits", "dataset.train_fraction=0.1", "train.epochs=0"]
    assert kdpipe(*small, "experiment=teacher", "model=resnet20", "model.weights=null", "train.epochs=1").status == 0
    abstract = ["loss._target_=kdpipe.losses.AlphaLoss", "~loss.temperature", "~loss.standardize"]
    outcome = kdpipe(*small, "model@teacher=resnet20", *abstract)
    assert_refused(outcome, "loss._target_=kdpipe.losses.AlphaLoss: it cannot compare two images")
    experiment = client().get_experiment_by_name("kdpipe").experiment_id
    assert [run.info.status for run in client().search_runs([experiment])] == ["FINISHED"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.image_size=64"], "model.image_size=64: student_cnn cannot take images of this size (mat1 and mat2"),
        (["model.image_size=64"], "expected 112 or 128"),
        (["model=torchvision", "model.name=alexnet", "model.image_size=32"], "expected 64 or more"),
        (["model=timm", "model.name=vit_tiny_patch16_224", "model.image_size=32"], "expected 224"),
    ],
)
def test_a_size_that_a_network_cannot_take_names_those_that_it_takes(
    kdpipe: Callable, overrides: list[str], said: str
) -> None:
    assert_refused(kdpipe(*ALONE, "model.weights=null", *overrides), said)


def test_a_network_that_sees_smaller_images_than_are_stored_is_told_once(kdpipe: Callable, class_folders: Path) -> None:
    photos = ["dataset=image_folder", f"dataset.root={class_folders}", "dataset.image_size=48", "train.epochs=0"]
    outcome = kdpipe("-m", *photos, "loss=cross_entropy", "model=resnet20", "seed=0,1")
    assert outcome.status == 0, outcome.errors
    assert outcome.output.count("resnet20 sees the images at 32×32, smaller than stored (48×48)") == 1


def test_batches_of_one_image_that_batchnorm_cannot_take_are_named(kdpipe: Callable) -> None:
    network = ["model=torchvision", "model.name=resnet18", "model.weights=null", "model.image_size=32"]
    outcome = kdpipe(*ALONE, *network, "train.batch_size=1")
    assert_refused(outcome, "train.batch_size=1: resnet18 cannot learn from one image at a time", "expected 2 or more")
    experiments = [experiment.experiment_id for experiment in client().search_experiments()]
    assert client().search_runs(experiments) == []
    assert kdpipe(*ALONE, *network, "train.batch_size=1", "train.epochs=0").status == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=timm", "model.name=resnet18.nonsense_in1k"], "expected one of resnet18."),
        (["model=timm", "model.name=resnet18", "+model.img_size=32"], "did you mean image_size?"),
        (["model=torchvision", "model.name=mobilenet_v3_smal"], "in all); did you mean mobilenet_v3_small"),
        (["model=torchvision", "model.name=convnext_atto"], "timm has it: choose the option timm"),
        (["model=timm", "model.name=mobilenet_v3_smal"], "did you mean mobilenetv3_small"),
        (["model=timm", "model.name=shufflenet_v2_x1_0"], "torchvision has it: choose the option torchvision"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_name_that_a_library_does_not_know(kdpipe: Callable, overrides: list[str], said: str) -> None:
    outcome = kdpipe(*ALONE, *overrides)
    assert_refused(outcome, said)
    assert len(outcome.errors) < 600, "a list of names that nobody reads"


def test_timm_without_a_network_fails_at_once_and_names_its_own_cache(
    kdpipe: Callable, no_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    started = time.monotonic()
    outcome = kdpipe(*ALONE, "model=timm", "model.name=resnet18")
    assert_refused(outcome, f"model.weights=imagenet: the ImageNet weights of resnet18 are not in {tmp_path / 'hub'}")
    assert time.monotonic() - started < 20  # with the client's own retries it takes almost a minute
    assert not constants.HF_HUB_OFFLINE
