"""Augmentations as options: pipelines that a command writes down, their pictures, and what is refused."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, assert_refused, classifier, exit_status, fit_for_test, some_digits, the_run
from PIL import Image

from kdpipe import views
from kdpipe.assembly.epoch_views import build_augmentation, build_views, check_augmentation, check_outputs, first_views
from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import CropFlip, Pipeline, RandomErasing, TrivialAugment, number_of_draws
from kdpipe.losses import CrossEntropy
from kdpipe.settings.composition import CONF
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Settings
from kdpipe.system.hardware import Hardware
from kdpipe.training.precomputed import OutputRequest, precomputed_outputs

OPTIONS = sorted(file.stem for file in (CONF / "augmentation").glob("*.yaml") if file.stem != "none")
GREY = {"color_jitter": ["augmentation.saturation=0", "augmentation.hue=0"]}  # digits have no colours
PIPELINE = "augmentation=pipeline"


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return some_digits()


@pytest.mark.parametrize("option", OPTIONS)
def test_a_teacher_s_answers_for_views_are_those_for_what_the_student_sees(
    option: str, composed: Callable[..., Settings], digits: ImageDataset, tmp_path: Path
) -> None:
    settings = composed(f"augmentation={option}", *GREY.get(option, []), "distillation.outputs=views")
    check_outputs(settings)
    check_augmentation(settings, digits)
    seen = build_views(replace_views(settings, 2), digits)
    positions, teacher = digits.splits["train"].sort().values[:40], classifier().eval()
    request = OutputRequest("logits", "resnet", teacher, teacher, digits, positions, seen)
    known = precomputed_outputs(request, tmp_path, 1, Hardware(torch.device("cpu")))
    for epoch in (1, 2, 3):
        some = positions[torch.randperm(40)[:17]]
        images = seen.augment(digits.images[some], seen.draws(epoch)[some])
        with torch.no_grad():
            assert torch.allclose(known[(epoch - 1) % 2][some], teacher(images), atol=1e-5)
    assert not torch.equal(seen.augment(digits.images[positions], seen.draws(1)[positions]), digits.images[positions])


def replace_views(settings: Settings, number: int) -> Settings:
    return settings.model_copy(update={"distillation": settings.distillation.model_copy(update={"views": number})})


def test_a_pipeline_names_options_and_changes_their_values(composed: Callable[..., Settings]) -> None:
    built = build_augmentation(composed(PIPELINE, "augmentation.steps=[crop_flip,{random_erasing:{p:0.1,value:mean}}]"))
    assert isinstance(built, Pipeline)
    crop, erase = built.steps
    assert isinstance(crop, CropFlip) and crop.flip
    assert isinstance(erase, RandomErasing) and (erase.p, erase.scale, erase.value) == (0.1, [0.02, 0.33], "mean")
    written_out = "{_target_:kdpipe.data.augmentation.TrivialAugment}"
    nested = build_augmentation(composed(PIPELINE, f"augmentation.steps=[pipeline,{written_out}]"))
    assert isinstance(nested, Pipeline)
    assert [type(step) for step in nested.steps] == [CropFlip, TrivialAugment, RandomErasing, TrivialAugment]


def test_a_pipeline_is_what_its_steps_are_in_their_order(composed: Callable[..., Settings]) -> None:
    def identity(steps: str) -> str:
        return composed(PIPELINE, f"augmentation.steps={steps}").identity

    assert identity("[flip,crop_flip]") == identity("[{flip:{vertical:0.0}},crop_flip]")
    others = ["[flip,crop_flip]", "[crop_flip,flip]", "[flip]", "[flip,{crop_flip:{flip:false}}]"]
    assert len({identity(steps) for steps in others}) == len(others)


def test_options_of_a_user_s_folder_are_steps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine/augmentation").mkdir(parents=True)
    mine = "_target_: kdpipe.data.augmentation.Flip\nvertical: 0.5\n"
    (tmp_path / "mine/augmentation/upside_down.yaml").write_text(mine)
    monkeypatch.chdir(tmp_path)
    command = ["dataset=digits", PIPELINE, "augmentation.steps=[upside_down]", "--config-dir=mine", "--out", "own.png"]
    assert write_views(monkeypatch, *command) == 0
    (tmp_path / "mine/augmentation/upside_down.yaml").write_text("_target_: os.system\ncommand: 'true'\n")
    assert write_views(monkeypatch, *command) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distillation.outputs=views", "train.mixup=0.2"], "distillation.outputs=views: train.mixup and train.cutmix"),
        (["dataset=image_folder", "dataset.root=.", "dataset.resize=keep"], "augmentation=CropFlip: it needs images"),
    ],
)
def test_no_picture_shows_views_that_a_run_refuses(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write_views(monkeypatch, "dataset=digits", "augmentation=crop_flip", *words) == 1
    assert said in capsys.readouterr().err


def write_views(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    """The exit status of `python -m kdpipe.views`."""
    monkeypatch.setattr(sys, "argv", ["kdpipe.views", *words])
    return exit_status(views.cli)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["augmentation.steps=[]"], "augmentation.steps=[]: expected a list with at least one augmentation"),
        (["augmentation.steps=crop_flip"], "augmentation.steps=crop_flip: expected a list with at least one"),
        (["augmentation.steps=[flip,none]"], "augmentation.steps.1=null: expected an augmentation"),
        (
            ["augmentation.steps=[crop_flop]"],
            "augmentation.steps.0=crop_flop: expected one of color_jitter, crop_flip, flip,",
        ),
        (["augmentation.steps=[flip,3]"], "augmentation.steps.1=3: expected an augmentation"),
        (["augmentation.steps=[{flip:1}]"], "augmentation.steps.0.flip=1: expected keys with values"),
        (
            ["augmentation.steps=[flip,{random_erasing:{q:1}}]"],
            "augmentation.steps.1.q=1: leave it out; expected",
        ),
        (["augmentation.steps=[{random_erasing:{p:2}}]"], "augmentation.steps.0.p=2: expected a number from 0 to 1"),
        (["augmentation.steps=[{color_jitter:{hue:0}}]"], "augmentation.steps.0.saturation=0.4: these images have one"),
        (["augmentation=color_jitter"], "augmentation.saturation=0.4: these images have one channel; expected 0"),
        (["augmentation=random_resized_crop", "augmentation.scale=[0.5,1.5]"], "augmentation.scale=1.5: expected"),
        (
            ["augmentation=random_erasing", "augmentation.value=[1,2,3]"],
            "augmentation.value=[1,2,3]: expected one number",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_augmented_is_said_in_one_line(
    composed: Callable[..., Settings], digits: ImageDataset, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_augmentation(composed(PIPELINE, *overrides), digits)
    assert str(raised.value).startswith(said)


def test_the_picture_shows_the_first_batch_as_the_network_sees_it(
    composed: Callable[..., Settings], digits: ImageDataset
) -> None:
    settings = composed(PIPELINE, "train.batch_size=50", "seed=3")
    stored, seen = map(torch.stack, first_views(settings, digits))
    kept = []
    plan = build_views(settings, digits)
    assert plan and number_of_draws(plan.augment) == plan.draws(1).shape[1]

    def keep(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        kept.extend([images, plan.augment(images, draws)])
        raise InterruptedError  # one batch is enough

    keep.draws, keep.steps = plan.augment.draws, plan.augment.steps
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InterruptedError):
        fit_for_test(model, digits, CrossEntropy(), optimizer, epochs=1, views=replace(plan, augment=keep), seed=3)
    assert torch.equal(kept[0][:16], stored) and torch.equal(kept[1][:16], seen)
    assert not torch.equal(stored, seen)


def test_views_are_among_the_artifacts_of_a_run_that_shows_them(
    kdpipe: Callable, composed: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*SMALL, "loss=cross_entropy", "train.epochs=1", PIPELINE, "train.show_views=true"]
    outcome = kdpipe(*run)
    assert outcome.status == 0, outcome.errors
    folder = Path("outputs/runs") / the_run().data.tags["kdpipe.identity"]
    artifacts = Path(the_run().info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "views.png").read_bytes() == (folder / "views.png").read_bytes()
    assert composed(*run).identity == composed(*run, "train.show_views=false").identity == folder.name
    assert write_views(monkeypatch, *run) == 0
    shown = [np.asarray(Image.open(file)) for file in (folder / "views.png", Path("views.png"))]
    assert np.array_equal(*shown) and shown[0].std() > 20


def test_a_run_with_an_augmentation_that_its_images_cannot_take_is_refused(kdpipe: Callable) -> None:
    outcome = kdpipe("dataset=digits", "loss=cross_entropy", "augmentation=color_jitter")
    assert_refused(outcome, "kdpipe: augmentation.saturation=0.4: these images have one channel; expected 0")
