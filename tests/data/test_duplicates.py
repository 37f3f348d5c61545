"""Images that are in two splits: counted, named, and told in the log, the exam and the comparison."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import client
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data import ImageDataset, Source, split
from kdpipe.data.duplicates import Comparable, duplicates_of
from kdpipe.evaluation.exam import Exam, caveats


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_twins_are_the_images_that_are_equal(one: list[int], other: list[int]) -> None:
    def images(colours: list[int]) -> torch.Tensor:
        """Some differ in their middle row, some elsewhere."""
        pixels = torch.zeros(len(colours), 3, 4, 4, dtype=torch.uint8)
        pixels[:, 0, 2] = torch.tensor([colour // 2 for colour in colours]).to(torch.uint8)[:, None]
        pixels[:, 1, 0] = torch.tensor([colour % 2 for colour in colours]).to(torch.uint8)[:, None]
        return pixels

    first, second = Comparable(images(one)), Comparable(images(other))
    found = first.twins(torch.arange(len(one)), second, torch.arange(len(other)))
    assert found == {place: other.index(colour) for place, colour in enumerate(one) if colour in other}
    assert first.twins(torch.arange(len(one)), second, torch.arange(0)) == {}


def photos(number: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def as_split(images: torch.Tensor, **more: object) -> ImageDataset:
    source = Source(images, torch.arange(len(images)) % 2, ("cat", "dog"), **more)
    return split(source, "photos", train_fraction=1, val_fraction=0.2, test_fraction=0.25, split_seed=0)


def test_duplicates_are_counted_and_the_first_ones_named() -> None:
    images = photos()
    assert as_split(images).duplicates == ()
    splits, names = as_split(images).splits, [f"{number}.png" for number in range(40)]
    a, b, c = (int(splits[name][0]) for name in ("train", "validation", "test"))
    images[[b, c]] = images[a].clone()
    assert list(map(str, as_split(images, names=names).duplicates)) == [
        f"1 of 10 test images is also among the training images, pixel by pixel ({c}.png is {a}.png)",
        f"1 of 8 validation images is also among the training images, pixel by pixel ({b}.png is {a}.png)",
        f"1 of 10 test images is also among the validation images, pixel by pixel ({c}.png is {b}.png)",
    ]
    assert f"(image {c} is image {a})" in str(as_split(images).duplicates[0])
    (first, *_) = as_split(photos(20).repeat(2, 1, 1, 1)).duplicates
    assert "test images are also among the training images" in str(first) and str(first).endswith(", …)")


def test_the_same_images_have_the_same_fingerprint_with_names_and_without() -> None:
    assert as_split(photos(), names=list("a" * 40)).fingerprint == as_split(photos()).fingerprint
    with pytest.raises(ValueError, match="2 names for 40 images"):
        as_split(photos(), names=["a.png", "b.png"])


def test_the_exam_tells_the_accuracy_on_the_other_images() -> None:
    exam = Exam(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 1, 0, 1]), torch.eye(2)[[0, 1, 0, 0]])
    some = duplicates_of("test", "training", {5: 1, 6: 2}, 4, (), ())
    every = duplicates_of("test", "training", dict.fromkeys((5, 6, 7, 8), 1), 4, (), ())
    validation = duplicates_of("validation", "training", {9: 1}, 4, (), ())
    assert [caveat.rpartition(": ")[2] for caveat in caveats(exam, ("cat", "dog"), (some, every, validation))] == [
        "the accuracy on the others is 50.00 %",
        "the metrics say nothing about new images",
        "accuracies on them are too good to choose by",
    ]


COPIED = [
    "dataset=image_folder",
    "dataset.root=copied",
    "dataset.val_fraction=0",
    "model=resnet20",
    "train.epochs=1",
    "train.batch_size=20",
]


def test_the_log_the_exam_and_the_comparison_say_so(kdpipe: Callable, class_folders: Path, tmp_path: Path) -> None:
    from kdpipe.compare import compare_runs

    for part in ("train", "test"):
        shutil.copytree(class_folders, tmp_path / "copied" / part)
    said = (
        "40 of 40 test images are also among the training images, pixel by pixel "
        "(test/flower/00.jpg is train/flower/00.jpg, test/flower/01.jpg is train/flower/01.jpg, …)"
    )
    done = kdpipe("experiment=teacher", *COPIED)
    assert done.status == 0, done.errors
    assert f"data set copied: {said}\n" in done.output + done.errors
    assert f"{said}: the metrics say nothing about new images\n" in done.output + done.errors
    assert kdpipe("model@teacher=resnet20", *COPIED).status == 0
    (comparison,) = compare_runs("kdpipe", uri=f"sqlite:///{tmp_path}/outputs/mlflow.db")
    assert said in comparison.notes
    tags = client().search_runs([client().get_experiment_by_name("kdpipe").experiment_id])[0].data.tags
    assert tags["kdpipe.duplicates"] == said
