"""Splits, and the data sets of scikit-learn and torchvision."""

import gzip
import hashlib
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from kdpipe.assembly.datasets import build_data
from kdpipe.data import ImageDataset, Source, split
from kdpipe.data.dataset import subsample
from kdpipe.data.digits import digits
from kdpipe.data.downloaded import cifar10, cifar100, fashion_mnist
from kdpipe.settings.errors import ConfigError


def points(*images_per_class: int, **given: list[int]) -> Source:
    """Images of one pixel, their classes in a shuffled order; `given` are splits that the source brings."""
    labels = torch.repeat_interleave(torch.arange(len(images_per_class)), torch.tensor(images_per_class))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return Source(
        images=torch.arange(len(labels)).to(torch.uint8)[:, None, None, None],
        labels=labels,
        class_names=tuple(f"class {label}" for label in range(len(images_per_class))),
        given={name: torch.tensor(positions, dtype=torch.int64) for name, positions in given.items()},
    )


def divided(source: Source, **changes: object) -> ImageDataset:
    """`source` split 70/20/10, or as `changes` say."""
    usual: dict = {"train_fraction": 1.0, "val_fraction": 0.2, "test_fraction": 0.1, "split_seed": 0}
    return split(source, "points", **(usual | changes))


def same_splits(one: ImageDataset, other: ImageDataset) -> bool:
    return one.splits.keys() == other.splits.keys() and all(
        torch.equal(one.splits[name], other.splits[name]) for name in one.splits
    )


def count_by_class(data: ImageDataset, split_name: str) -> Tensor:
    return torch.bincount(data.labels[data.splits[split_name]], minlength=data.num_classes)


class_sizes = st.lists(st.integers(20, 60), min_size=2, max_size=5)
fractions = st.floats(0.1, 0.4)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=25, deadline=None)
@given(class_sizes, fractions, fractions, seeds)
def test_every_image_is_in_one_split_and_each_class_in_all_by_its_share(sizes, val, test, seed):
    data = divided(points(*sizes), val_fraction=val, test_fraction=test, split_seed=seed)

    total = sum(sizes)
    everything = torch.cat(list(data.splits.values()))
    assert torch.equal(everything.sort().values, torch.arange(total))
    assert len(data.splits["test"]) == round(test * total)
    assert len(data.splits["validation"]) == round(val * total)
    # Each of the two draws, test then validation, may round a class's share by less than one image.
    for split_name, rounding in (("test", 1), ("validation", 2), ("train", 2)):
        share = torch.tensor(sizes) * len(data.splits[split_name]) / total
        assert ((count_by_class(data, split_name) - share).abs() < rounding).all(), split_name


@settings(max_examples=25, deadline=None)
@given(class_sizes, st.floats(0.2, 0.8), seeds)
def test_train_fraction_takes_from_the_training_images_only(sizes, train, seed):
    whole = divided(points(*sizes), split_seed=seed)
    part = divided(points(*sizes), split_seed=seed, train_fraction=train)

    assert torch.equal(part.splits["test"], whole.splits["test"])
    assert torch.equal(part.splits["validation"], whole.splits["validation"])
    assert torch.isin(part.splits["train"], whole.splits["train"]).all()
    assert len(part.splits["train"].unique()) == round(train * len(whole.splits["train"]))
    kept = count_by_class(whole, "train") * len(part.splits["train"]) / len(whole.splits["train"])
    assert ((count_by_class(part, "train") - kept).abs() < 1).all()


def test_the_split_seed_decides_and_nothing_else():
    source = points(50, 50)
    first = divided(source, split_seed=7)
    torch.manual_seed(1)
    np.random.seed(1)
    assert same_splits(first, divided(source, split_seed=7))
    assert not same_splits(first, divided(source, split_seed=8))


def test_a_position_names_the_same_image_in_every_split_and_subsample():
    source = points(50, 50)
    for data in (divided(source), divided(source, train_fraction=0.3), divided(source, split_seed=1)):
        assert data.images is source.images
        assert data.labels is source.labels
        assert data.fingerprint == source.fingerprint


def test_no_validation_split_where_its_fraction_is_0():
    data = divided(points(50, 50), val_fraction=0)
    assert set(data.splits) == {"train", "test"}
    assert (len(data.splits["train"]), len(data.splits["test"])) == (90, 10)


def test_a_given_test_split_is_kept_and_validation_comes_from_outside_of_it():
    own = list(range(40, 60))
    data = divided(points(50, 50, test=own), test_fraction=None)
    assert data.splits["test"].tolist() == own
    assert len(data.splits["validation"]) == round(0.2 * 80)
    assert not torch.isin(torch.cat([data.splits["train"], data.splits["validation"]]), torch.tensor(own)).any()


def test_a_given_split_is_kept_whatever_its_fraction_says():
    data = divided(points(50, 50, test=[3, 1], validation=[8, 2, 9]), val_fraction=0.4, test_fraction=0.4)
    assert data.splits["test"].tolist() == [3, 1]
    assert data.splits["validation"].tolist() == [8, 2, 9]
    assert len(data.splits["train"]) == 95


def test_an_empty_given_split_is_ignored():
    data = divided(points(50, 50, test=[]))
    assert len(data.splits["test"]) == 10


@pytest.mark.parametrize(
    ("key", "value", "written", "expected"),
    [
        ("train_fraction", 0, "0", "a number above 0 to 1"),
        ("train_fraction", -0.5, "-0.5", "a number above 0 to 1"),
        ("train_fraction", 1.01, "1.01", "a number above 0 to 1"),
        ("train_fraction", True, "true", "a number above 0 to 1"),
        ("train_fraction", float("nan"), "nan", "a number above 0 to 1"),
        ("val_fraction", -0.1, "-0.1", "a number from 0 below 1"),
        ("val_fraction", 1.0, "1", "a number from 0 below 1"),
        ("val_fraction", None, "null", "a number from 0 below 1"),
        ("val_fraction", "0.1", "0.1", "a number from 0 below 1"),
        ("test_fraction", 0, "0", "a number above 0 below 1 or null"),
        ("test_fraction", 1, "1", "a number above 0 below 1 or null"),
        ("test_fraction", float("inf"), "inf", "a number above 0 below 1 or null"),
        ("split_seed", -1, "-1", "a whole number from 0 to 4294967295"),
        ("split_seed", 0.5, "0.5", "a whole number from 0 to 4294967295"),
        ("split_seed", 2**32, "4294967296", "a whole number from 0 to 4294967295"),
    ],
)
def test_a_setting_out_of_range_is_an_error_with_the_expected_range(key, value, written, expected):
    with pytest.raises(ConfigError) as error:
        divided(points(50, 50), **{key: value})
    assert str(error.value) == f"{key}={written}: expected {expected}"


def test_fractions_that_leave_no_training_images_are_an_error():
    with pytest.raises(
        ConfigError,
        match=r"^test_fraction=0\.5: no training images are left with val_fraction=0\.5; expected a sum below 1$",
    ):
        divided(points(50, 50), val_fraction=0.5, test_fraction=0.5)


def test_a_source_without_test_images_needs_a_test_fraction():
    with pytest.raises(
        ConfigError, match=r"^test_fraction=null: points has no test images of its own; expected a number"
    ):
        divided(points(50, 50), test_fraction=None)


@pytest.mark.parametrize(
    ("sizes", "changes", "setting"),
    [
        ((5, 5), {"test_fraction": 0.01}, "test_fraction=0.01: 0 of 10 images"),
        ((30, 30, 30), {"val_fraction": 0.02}, "val_fraction=0.02: 2 of 81 images"),
        ((50, 50), {"train_fraction": 0.01}, "train_fraction=0.01: 69 of 70 images"),
    ],
)
def test_too_few_images_for_a_fraction_are_an_error_that_names_it(sizes, changes, setting):
    with pytest.raises(ConfigError) as error:
        divided(points(*sizes), **changes)
    assert str(error.value).startswith(setting)
    assert str(error.value).endswith("; expected another share, or more images")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"images": torch.zeros(10, 1, 1, 1)},
            "its images are torch.float32 [10, 1, 1, 1]; expected torch.uint8 [N, C, H, W]",
        ),
        (
            {"images": torch.zeros(10, 1, 1, dtype=torch.uint8)},
            "its images are torch.uint8 [10, 1, 1]; expected torch.uint8 [N",
        ),
        ({"images": np.zeros((10, 1, 1, 1), np.uint8)}, "its images are ndarray; expected torch.uint8 [N, C, H, W]"),
        ({"labels": torch.zeros(10)}, "its labels are torch.float32 [10]; expected torch.int64 [N]"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, "9 labels for 10 images"),
        ({"labels": torch.arange(10)}, "its labels go from 0 to 9; expected 0 to 1"),
        ({"labels": torch.arange(10) % 3 - 1}, "its labels go from -1 to 1; expected 0 to 1"),
        ({"given": {"testing": torch.arange(3)}}, "it brings a split 'testing'; expected validation or test"),
        ({"given": {"test": [1, 2]}}, "its test positions are list; expected torch.int64 [N]"),
        ({"given": {"test": torch.tensor([10])}}, "its test positions go from 10 to 10; expected 0 to 9"),
        (
            {"given": {"test": torch.tensor([1, 2]), "validation": torch.tensor([2])}},
            "an image is more than once in the validation and test splits it brings",
        ),
    ],
)
def test_a_source_that_is_wrong_is_an_error_in_one_line(change, problem):
    with pytest.raises(ValueError, match=f"^{re.escape(f'data source: {problem}')}") as error:
        replace(points(5, 5), fingerprint="", **change)
    assert "\n" not in str(error.value)


def test_the_fingerprint_stands_for_pixels_labels_and_class_names():
    source = points(5, 5)
    same = replace(source, images=source.images.clone(), labels=source.labels.clone(), fingerprint="")
    assert same.fingerprint == source.fingerprint
    assert len(bytes.fromhex(source.fingerprint)) == 8

    other_pixel = source.images.clone()
    other_pixel[3] += 1
    changes: list[dict] = [
        {"images": other_pixel},
        {"labels": source.labels.flip(0)},
        {"class_names": ("class 1", "class 0")},
    ]
    for change in changes:
        assert replace(source, fingerprint="", **change).fingerprint != source.fingerprint


def test_digits_are_scikit_learns_at_the_full_range_of_uint8():
    source = digits()
    content = load_digits()
    assert source.images.shape == (1797, 1, 8, 8)
    assert source.images.dtype == torch.uint8
    assert (source.images.min(), source.images.max()) == (0, 255)
    assert np.array_equal((source.images[:, 0].double() * 16 / 255).round(), content.images)
    assert source.labels.dtype == torch.int64
    assert np.array_equal(source.labels, content.target)
    assert source.class_names == tuple("0123456789")
    assert source.given == {}


def test_a_class_with_one_image_is_named_whatever_is_split():
    """Also where the test images have taken the others."""
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] + [3] * 2)
    source = Source(torch.zeros(83, 1, 2, 2, dtype=torch.uint8), labels, ("cat", "dog", "lynx", "ocelot"))
    for key, fractions in {
        "test_fraction": {"test_fraction": 0.2, "val_fraction": 0.2, "train_fraction": 1},
        "val_fraction": {"test_fraction": 0.2, "val_fraction": 0.2, "train_fraction": 1},
        "train_fraction": {"test_fraction": 0.2, "val_fraction": 0, "train_fraction": 0.5},
    }.items():
        given = {} if key == "test_fraction" else {"test": torch.tensor([0, 40, 80, 81])}
        with pytest.raises(ConfigError, match=f"^{key}=.*: (lynx|ocelot): one image is left, .*; expected two or more"):
            split(replace(source, given=given, fingerprint=""), "pets", split_seed=0, **fractions)


def test_digits_as_their_yaml_splits_them(composed: Callable[..., DictConfig]):
    data = build_data(composed("dataset=digits").dataset)
    assert {name: len(positions) for name, positions in data.splits.items()} == {
        "test": 449,  # a quarter of 1,797
        "validation": 270,
        "train": 1078,
    }
    assert data.num_classes == 10


@pytest.fixture
def grey_photos(photo) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """12 training images of 28×28 with their labels, then 5 test images with theirs."""
    images = np.stack([np.asarray(photo(0, number, (28, 28)).convert("L")) for number in range(17)])
    labels = np.arange(17, dtype=np.uint8) % 10
    return images[:12], labels[:12], images[12:], labels[12:]


def idx(values: np.ndarray) -> bytes:
    """The format of MNIST's files: http://yann.lecun.com/exdb/mnist/."""
    unsigned_bytes = 8
    header = struct.pack(">HBB", 0, unsigned_bytes, values.ndim)
    return header + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_fashion_mnist(root: Path, arrays: tuple[np.ndarray, ...]) -> Path:
    """The four raw files, where torchvision looks for them."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name, values in zip(names, arrays, strict=True):
        (folder / f"{name}-ubyte").write_bytes(idx(values))
    return folder


def is_fashion(source: Source, arrays: tuple[np.ndarray, ...]) -> bool:
    train_images, train_labels, test_images, test_labels = arrays
    return (
        source.images.dtype == torch.uint8
        and source.labels.dtype == torch.int64
        and np.array_equal(source.images, np.concatenate([train_images, test_images])[:, None])
        and np.array_equal(source.labels, np.concatenate([train_labels, test_labels]))
        and source.given["test"].tolist() == [12, 13, 14, 15, 16]
        and source.class_names[0] == "T-shirt/top"
        and len(source.class_names) == 10
    )


def test_fashion_mnist_is_read_from_its_raw_files(tmp_path: Path, grey_photos):
    write_fashion_mnist(tmp_path, grey_photos)
    assert is_fashion(fashion_mnist(str(tmp_path)), grey_photos)


def test_fashion_mnist_is_unpacked_from_its_gz_files(tmp_path: Path, grey_photos, monkeypatch):
    resources = []
    for raw in sorted(write_fashion_mnist(tmp_path, grey_photos).iterdir()):
        packed = raw.with_name(f"{raw.name}.gz")
        packed.write_bytes(gzip.compress(raw.read_bytes()))
        raw.unlink()
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    assert is_fashion(fashion_mnist(str(tmp_path)), grey_photos)


@pytest.mark.parametrize("bytes_left", [0, 3, 2000])
def test_a_damaged_file_of_fashion_mnist_is_an_error_that_names_the_folder(tmp_path: Path, grey_photos, bytes_left):
    # torchvision checks the sums of the .gz files only: an unpacking that was interrupted passes for done.
    torn = write_fashion_mnist(tmp_path, grey_photos) / "train-images-idx3-ubyte"
    torn.write_bytes(torn.read_bytes()[:bytes_left])
    with pytest.raises(ValueError) as error:
        fashion_mnist(str(tmp_path))
    assert str(error.value).startswith(f"root={tmp_path}: ")


@pytest.mark.parametrize(
    ("load", "dataset", "label_key"), [(cifar10, CIFAR10, "labels"), (cifar100, CIFAR100, "fine_labels")]
)
def test_cifar_is_read_from_its_pickled_batches(tmp_path: Path, photo, monkeypatch, load, dataset, label_key):
    folder = tmp_path / dataset.base_folder
    folder.mkdir()

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    images, labels = [], []
    for part in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(dataset, part):
            batch = [np.asarray(photo(0, len(images) + more)) for more in range(3)]
            batch_labels = [(len(images) + more) % 10 for more in range(3)]
            # A row is an image: 1,024 red values, then the green, then the blue ones.
            rows = np.stack([image.transpose(2, 0, 1).ravel() for image in batch])
            sums.append([name, write(name, {"data": rows, label_key: batch_labels})])
            images += batch
            labels += batch_labels
        monkeypatch.setattr(dataset, part, sums)
    class_names = [f"kind {number}" for number in range(10)]
    sum_of_names = write(dataset.meta["filename"], {dataset.meta["key"]: class_names})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sum_of_names})

    source = load(str(tmp_path))

    assert source.images.dtype == torch.uint8
    assert np.array_equal(source.images, np.stack(images).transpose(0, 3, 1, 2))
    assert source.labels.dtype == torch.int64
    assert source.labels.tolist() == labels
    assert source.class_names == tuple(class_names)
    assert source.given["test"].tolist() == list(range(len(images) - 3, len(images)))


@pytest.mark.parametrize("load", [cifar10, cifar100, fashion_mnist])
@pytest.mark.usefixtures("no_network")
def test_a_failed_download_is_one_line_that_names_the_root_and_the_alternative(tmp_path: Path, load):
    root = tmp_path / "nothing here"

    with pytest.raises(ValueError) as error:
        load(str(root))

    message = str(error.value)
    assert message.startswith(f"root={root}: ")
    assert "cannot be downloaded" in message
    assert "dataset=image_folder" in message
    assert "\n" not in message


def test_a_sample_is_of_all_classes_where_they_lie_one_after_the_other():
    positions = torch.arange(50_000)
    chosen = subsample(positions[torch.randperm(50_000)], 1000)
    assert len(chosen) == len(chosen.unique()) == 1000
    assert (chosen // 5000).bincount().tolist() == [100] * 10
    assert (chosen % 10).bincount(minlength=10).min() >= 90  # nor does it keep step with classes that take turns
    assert subsample(torch.tensor([7, 3]), 1000).tolist() == [3, 7]
    assert subsample(torch.arange(10), 3).tolist() == [0, 4, 9]
    assert subsample(torch.arange(10), 20).tolist() == list(range(10))
