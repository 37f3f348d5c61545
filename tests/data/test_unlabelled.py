"""Additional images without labels: only the teacher's answers count for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import classifier, fit_for_test, some_digits
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdpipe.data import ImageDataset, Source, split
from kdpipe.data.unlabelled import Concatenated, with_unlabelled
from kdpipe.losses import KD, cross_entropy
from kdpipe.training.teacher import NetworkTeacher


def some_photos() -> ImageDataset:
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = Source(images, torch.arange(40) % 10, tuple("abcdefghij"))
    return split(source, "photos", train_fraction=1, val_fraction=0, test_fraction=0.25, split_seed=0)


@pytest.fixture
def more(tmp_path: Path, photo: Callable) -> Path:
    """A folder of twelve photos, two of them in a folder of their own."""
    root = tmp_path / "more"
    (root / "deeper").mkdir(parents=True)
    for number in range(12):
        photo(number % 2, 100 + number).save(root / ("deeper" if number < 2 else "") / f"{number:02}.png")
    return root


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_concatenated_tensors_are_indexed_as_one(first: int, second: int, data: st.DataObject) -> None:
    both = torch.arange(2 * (first + second)).view(-1, 2)
    joined = Concatenated(both[:first], both[first:])
    positions = torch.tensor(data.draw(st.lists(st.integers(0, first + second - 1))), dtype=torch.int64)
    assert torch.equal(joined[positions], both[positions])
    assert joined.shape == both.shape and joined.nbytes == both.nbytes


def test_unlabelled_images_are_added_to_the_training_images(more: Path, tmp_path: Path) -> None:
    data = some_photos()
    joined = with_unlabelled(data, str(more), "stop", str(tmp_path / "cache"))
    assert joined.images.shape == (52, 3, 8, 8)
    assert joined.splits["train"].tolist() == [*data.splits["train"].tolist(), *range(40, 52)]
    assert torch.equal(joined.labels[:40], data.labels) and joined.labels[40:].tolist() == 12 * [-1]
    assert torch.equal(joined.splits["test"], data.splits["test"])
    assert joined.fingerprint == data.fingerprint and joined.unlabelled


def test_test_images_among_them_are_reported(more: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = some_photos()
    with_unlabelled(data, str(more), "stop", str(tmp_path / "cache"))
    assert "validation or test images" not in caplog.text
    for name, position in (("test", data.splits["test"][3]), ("train", data.splits["train"][3])):
        Image.fromarray(data.images[position].permute(1, 2, 0).numpy()).save(more / f"{name}.png")
    with_unlabelled(data, str(more), "stop", str(tmp_path / "cache"))
    assert "1 of its 14 images are also validation or test images" in caplog.text


def test_cross_entropy_is_averaged_over_labelled_images() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, -1, 0, -1])
    torch.testing.assert_close(cross_entropy(logits, labels), cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    assert cross_entropy(logits, torch.full((4,), -1)).item() == 0


def test_a_student_trains_on_all_images_and_is_evaluated_on_labelled_ones(more: Path, tmp_path: Path) -> None:
    data = with_unlabelled(some_photos(), str(more), "stop", str(tmp_path / "cache"))
    model, teacher = classifier(), NetworkTeacher(classifier())
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    looked_at: list[int] = []
    model.register_forward_hook(lambda module, _, output: module.training and looked_at.append(len(output)))
    (metrics,) = fit_for_test(model, data, KD(0.5, 4), optimizer, epochs=1, teacher=teacher)
    assert sum(looked_at) == 30 + 12
    assert metrics["train/accuracy"] * 30 == pytest.approx(round(metrics["train/accuracy"] * 30))


PHOTOS = ["dataset=image_folder", "dataset.root=photos", "dataset.val_fraction=0.2", "dataset.test_fraction=0.2"]
SHORT = [*PHOTOS, "train.epochs=1", "train.batch_size=10", "train.threads=1", "model=resnet20"]


def test_unlabelled_images_change_a_distilled_run_but_not_the_baseline(
    kdpipe: Callable, class_folders: Path, more: Path
) -> None:
    with_more = [*SHORT, f"dataset.unlabelled_root={more}"]
    assert kdpipe("experiment=teacher", *SHORT).status == 0
    for overrides in (SHORT, with_more):
        done = kdpipe("model@teacher=resnet20", *overrides)
        assert done.status == 0, done.errors
    assert "images without labels: 12" in done.output + done.errors
    assert kdpipe(*SHORT, "loss.alpha=0").status == 0
    again = kdpipe(*with_more, "loss.alpha=0")
    assert "this run is already finished" in again.output + again.errors
    assert len(list(Path("outputs/runs").glob("*/model.safetensors"))) == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: "elsewhere", "unlabelled_root=elsewhere: no such folder; expected a folder with images"),
        (lambda root: root / "deeper" / "empty", "empty: no file in this folder; expected a folder with images"),
        (lambda root: root, "99.jpg (empty)"),
    ],
    ids=["no folder", "empty", "no image"],
)
def test_bad_folders_are_one_line_errors(
    kdpipe: Callable, class_folders: Path, more: Path, change: Callable, expected: str
) -> None:
    (more / "deeper/empty").mkdir()
    (more / "99.jpg").touch()
    assert kdpipe("experiment=teacher", *SHORT).status == 0
    done = kdpipe("model@teacher=resnet20", *SHORT, f"dataset.unlabelled_root={change(more)}")
    assert done.status == 1 and expected in done.errors
    assert len(done.errors.splitlines()) == 1


def test_grey_images_cannot_be_combined_with_them(more: Path, tmp_path: Path) -> None:

    with pytest.raises(
        ValueError, match=r"^unlabelled_root=.*: the images with labels are 8×8×1; expected .* square RGB images"
    ):
        with_unlabelled(some_digits(), str(more), "stop", str(tmp_path / "cache"))
