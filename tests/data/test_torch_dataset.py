"""A user's own torch.utils.data.Dataset."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_refused

from kdpipe.data import ImageDataset
from kdpipe.settings.errors import ConfigError


@pytest.fixture
def given(read: Callable, class_folders: Path, pets: None) -> Callable[..., ImageDataset]:
    """`given("item")` is read from a data set that gives this for its photo number 1."""

    def read_given(item: str, *overrides: str) -> ImageDataset:
        arguments = [f"+dataset.folder={class_folders}", f'+dataset.change="{item}"']
        return read("dataset=torch", "dataset._target_=pets.Given", *arguments, *overrides)

    return read_given


@pytest.mark.parametrize(
    "item",
    [
        "(image, 'temple', name)",
        "[image, np.int64(1), name]",
        "(image, torch.tensor(1), name)",
        "(np.asarray(image), label, Path(name))",
    ],
)
def test_items_may_have_several_forms(given: Callable, item: str) -> None:
    data = given(item, "dataset.class_names=[flower,temple]")
    assert data.labels.tolist() == 20 * [0] + 20 * [1]
    assert data.fingerprint == given("(image, label, name)", "dataset.class_names=[flower,temple]").fingerprint


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("1 / 0", ["train image 1 raised ZeroDivisionError: division by zero", "on_bad_image=skip"]),
        ("{'image': image}", ["train image 1 is a dict", "expected (image, label) or (image, label, name)"]),
        ("('photo.jpg', 1)", ["train image 1 is a str", "expected a PIL image"]),
        ("(torch.zeros(3, 32, 32), 1)", ["a tensor float32 [3, 32, 32]", "leave ToTensor and Normalize out"]),
        ("(np.zeros((32, 32, 4), np.uint8), 1)", ["an array uint8 [32, 32, 4]"]),
        ("(image, [0, 1])", ["train image 1 has [0, 1]", "expected a class or its number"]),
        ("(image, 2)", ["train image 1 has the label 2", "from 0 to 1"]),
        ("(image.resize((32, 16)), 1)", ["dataset.image_size=null", "train image 1 32×16"]),
    ],
)
def test_a_bad_item_is_named_in_one_line(given: Callable, item: str, said: list) -> None:
    with pytest.raises(ConfigError, match=r"^dataset\.(_target_|image_size)=") as error:
        given(item, "dataset.class_names=[flower,temple]")
    assert [text for text in said if text not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_an_item_that_raises_an_error_can_be_left_out(given: Callable, caplog: pytest.LogCaptureFixture) -> None:
    assert len(given("1 / 0", "dataset.on_bad_image=skip").labels) == 39
    assert "1 of 40 train images raised errors, left out: train image 1 (ZeroDivisionError" in caplog.text


def test_random_transforms_are_refused(given: Callable) -> None:
    with pytest.raises(ValueError, match=r"train image 0 differs when it is read again: leave random transforms out"):
        given("(image.rotate(np.random.randint(1, 360)), label, name)", "+dataset.at=0")


def test_items_without_a_label_are_images_for_the_teacher(given: Callable) -> None:
    for none in ("-1", "None"):
        data = given(f"(image, {none}, name)")
        assert len(data.labels) == 39 and len(data.more().images) == 1


def test_other_splits_are_datasets_that_differ_in_some_arguments(
    read: Callable, class_folders: Path, pets: None
) -> None:
    mine = ["dataset=torch", "dataset._target_=pets.Photos", f"+dataset.folder={class_folders}"]
    data = read(*mine, "+dataset.step=3", "dataset.test={step:5}", "dataset.val_fraction=0")
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 14, "test": 8}
    whole = {"_target_": "pets.sorted_photos", "folder": str(class_folders)}
    text = "{" + ",".join(f"{key}:{value}" for key, value in whole.items()) + "}"
    data = read(*mine, f"dataset.validation={text}", "dataset.test={named:false}")
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 40, "validation": 40, "test": 40}
    assert data.class_names == ("flower", "temple")


def test_a_dataset_of_a_torchvision_kind_runs(
    kdpipe: Callable, class_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDPIPE_ALLOW_TARGETS", "torchvision.datasets")
    mine = ["dataset=torch", "dataset._target_=torchvision.datasets.ImageFolder", f"+dataset.root={class_folders}"]
    done = kdpipe("experiment=student", *mine, "train.epochs=1", "train.batch_size=8", "train.threads=1")
    assert done.status == 0, done.errors
    assert "2 classes (flower, temple)" in done.output + done.errors


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dataset._target_=pets.Nothing"], ["dataset._target_=pets.Nothing", "not found"]),
        (["dataset._target_=pets.Stream"], ["an IterableDataset has no images by number", "map-style"]),
        (["dataset._target_=pets.Photos"], ["dataset.folder: a value is required by pets.Photos"]),
        (["dataset._target_=pets.Photos", "+dataset.folders=x"], ["dataset.folders=x", "did you mean folder?"]),
        (["dataset._target_=pets.Photos", "+dataset.folder=x"], ["pets.Photos", "the train data set is empty"]),
        (["dataset._target_=other.Photos"], ["KDPIPE_ALLOW_TARGETS=other.Photos allows this one"]),
    ],
)
def test_bad_targets_are_errors(read: Callable, pets: None, overrides: list, said: list) -> None:
    with pytest.raises(ConfigError) as error:
        read("dataset=torch", *overrides)
    assert [text for text in said if text not in str(error.value)] == [], error.value


def test_what_a_command_lacks_is_said_in_one_line(kdpipe: Callable, pets: None) -> None:
    assert_refused(kdpipe("dataset=torch", "loss.alpha=0"), "dataset._target_: a value is required")
    outcome = kdpipe("dataset=torch", "loss.alpha=0", "dataset._target_=pets.Photos", "dataset.folder=photos")
    assert_refused(outcome, "dataset.folder: no such key", "+dataset.folder=… adds it")
