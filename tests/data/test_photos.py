"""Photos that are stored in their own shape."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kdpipe.assembly.datasets import build_unlabelled
from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import Flip, RandomResizedCrop
from kdpipe.data.photos import Photos, PhotoWriter, kept
from kdpipe.settings.composition import compose_settings
from kdpipe.system.padding import each_photo, padded

KEEP = ["dataset.resize=keep", "dataset.image_size=24", "dataset.test_fraction=0.2"]
Read = Callable[..., ImageDataset]


@pytest.fixture
def odd_folders(class_folders: Path) -> Path:
    """The class folders, with photos of many shapes, losslessly."""
    for number, file in enumerate(sorted(class_folders.glob("*/*"))):
        with Image.open(file) as opened:
            image = opened.crop((0, 0, 32 - number % 3 * 10, 32 - number % 5 * 7))
        file.unlink()
        image.save(file.with_suffix(".png"))
    return class_folders


@pytest.mark.parametrize(
    ("size", "shorter_side", "expected"),
    [
        ((500, 333), 256, (384, 256)),
        ((333, 500), 256, (256, 384)),
        ((256, 300), 256, (256, 300)),
        ((50, 40), 256, (50, 40)),  # a network enlarges it, once
        ((500, 333), None, (500, 333)),
        ((600, 100), 50, (200, 50)),
        ((1, 300), 256, (1, 4)),
        ((1, 1), 1, (1, 1)),
    ],
)
def test_a_photo_keeps_its_shape(size: tuple[int, int], shorter_side: int | None, expected: tuple[int, int]) -> None:
    assert kept(Image.new("RGB", size), shorter_side).size == expected


def test_of_a_panorama_the_centre_is_stored() -> None:
    image = Image.fromarray(np.arange(20, dtype=np.uint8)[None].repeat(2, axis=0)).convert("RGB")
    assert np.asarray(kept(image, None))[0, :, 0].tolist() == list(range(6, 14))


def test_photos_are_stored_as_they_are_decoded_and_found_in_the_cache(odd_folders: Path, read: Read) -> None:
    data = read("dataset=image_folder", f"dataset.root={odd_folders}", *KEEP)
    images = [kept(Image.open(file), 24) for file in sorted(odd_folders.glob("*/*"))]
    stored = each_photo(data.images[torch.arange(40)])
    assert [(photo.shape[2], photo.shape[1]) for photo in stored] == [image.size for image in images]
    for photo, image in zip(stored, images, strict=True):
        np.testing.assert_array_equal(photo.permute(1, 2, 0), np.asarray(image))
    side = sorted(min(image.size) for image in images)[19]
    assert data.images.shape == (40, 4, 32, 32) and data.image_shape == (3, side, side) and data.keeps_shapes
    with Image.open(odd_folders / "temple" / "07.png") as opened:
        opened.transpose(Image.Transpose.ROTATE_90).save(odd_folders / "temple" / "07.png")
    assert read("dataset=image_folder", f"dataset.root={odd_folders}", *KEEP).fingerprint != data.fingerprint


def test_a_damaged_entry_of_the_cache_is_rebuilt(
    odd_folders: Path, read: Read, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def photos() -> list[torch.Tensor]:
        data = read("dataset=image_folder", f"dataset.root={odd_folders}", *KEEP)
        return each_photo(data.images[torch.arange(40)])

    first = photos()
    (entry,) = (entry for entry in (tmp_path / "outputs/cache/images").iterdir() if entry.is_dir())
    places = np.load(entry / "places.npy")
    places[3, 1] = 10**9
    for damage in (
        lambda: (entry / "pixels.bin").write_bytes((entry / "pixels.bin").read_bytes()[:-1]),
        lambda: np.save(entry / "places.npy", places),
        lambda: (entry / "places.npy").write_bytes(b"no array"),
    ):
        caplog.clear()
        damage()
        assert all(map(torch.equal, photos(), first))
        assert "is damaged and will be rebuilt" in caplog.text


def test_files_that_are_no_photos_are_skipped(odd_folders: Path, read: Read) -> None:
    of_all = read("dataset=image_folder", f"dataset.root={odd_folders}", *KEEP)
    (odd_folders / "temple" / "00.txt").write_text("no photo")
    data = read("dataset=image_folder", f"dataset.root={odd_folders}", *KEEP, "dataset.on_bad_image=skip")
    assert data.fingerprint == of_all.fingerprint and len(data.names) == 40


def test_every_container_gives_the_same_data_set(
    odd_folders: Path, read: Read, pets: None, hub_cache: Path, tmp_path: Path
) -> None:
    expected = read("dataset=image_folder", f"dataset.root={odd_folders}", *KEEP)
    files = sorted(odd_folders.glob("*/*"), key=lambda file: file.name[::-1])
    rows = pd.DataFrame({"file_name": [f"{file.parent.name}/{file.name}" for file in files]})
    rows["label"] = [file.parent.name for file in files]
    rows.to_csv(odd_folders / "labels.csv", index=False)
    mine = ("dataset=torch", f"+dataset.folder={odd_folders}", "dataset._target_=pets.Photos")
    for container in (
        ("dataset=csv", f"dataset.file={odd_folders / 'labels.csv'}"),
        mine,
        (*mine, "+dataset.form=tensor"),
        ("dataset=huggingface", f"dataset.path={odd_folders}"),
    ):
        if container[0] == "dataset=huggingface":
            (odd_folders / "labels.csv").unlink()
        data = read(*container, *KEEP)
        assert data.fingerprint == expected.fingerprint, container
        assert data.splits["test"].tolist() == expected.splits["test"].tolist()
        assert torch.equal(data.images[torch.arange(40)], expected.images[torch.arange(40)])


def test_photos_in_two_splits_are_found(odd_folders: Path, read: Read) -> None:
    folders = odd_folders.parent / "split"
    shutil.copytree(odd_folders, folders / "train")
    (folders / "test" / "temple").mkdir(parents=True)
    shutil.copy(odd_folders / "temple" / "07.png", folders / "test" / "temple" / "new.png")
    data = read("dataset=image_folder", f"dataset.root={folders}", *KEEP)
    assert str(data.duplicates[0]).endswith("(test/temple/new.png is train/temple/07.png)")


def test_one_colour_in_two_shapes_is_not_a_duplicate(tmp_path: Path, read: Read) -> None:
    for split, sizes in (("train", [(4, 4), (2, 6)]), ("test", [(2, 8), (4, 2)])):
        for name, colour in (("red", "#f00"), ("blue", "#00f")):
            (tmp_path / "plain" / split / name).mkdir(parents=True)
            for number, size in enumerate(sizes):
                Image.new("RGB", size, colour).save(tmp_path / "plain" / split / name / f"{number}.png")
    arguments = ("dataset=image_folder", f"dataset.root={tmp_path / 'plain'}", "dataset.resize=keep")
    assert not read(*arguments, "dataset.val_fraction=0").duplicates


def test_photos_without_a_label_keep_their_shape_too(odd_folders: Path, photo: Callable, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    photo(0, 50, (96, 48)).save(tmp_path / "more" / "wide.png")
    folders = [f"dataset.root={odd_folders}", f"dataset.unlabelled_root={tmp_path / 'more'}"]
    settings = compose_settings([f"output_dir={tmp_path / 'outputs'}", "dataset=image_folder", *folders, *KEEP])
    data = build_unlabelled(settings)
    wide, first = each_photo(data.images[torch.tensor([40, 0])])
    assert wide.shape == (3, 24, 48) and torch.equal(first, each_photo(data.images[torch.tensor([0])])[0])
    assert data.images.shape == (41, 4, 32, 48) and data.image_shape == (3, 12, 12)


def test_photos_are_written_in_any_order(photo: Callable) -> None:
    file = io.BytesIO()
    writer = PhotoWriter(file)
    for number in (2, 0, 1):
        writer.add(number, photo(0, number, (5 + number, 3)))
    stored = Photos(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), writer.table())
    assert [tuple(pixels.shape) for pixels in stored] == [(3, 3, 5), (3, 3, 6), (3, 3, 7)]
    np.testing.assert_array_equal(next(iter(stored.at([2]))).transpose(1, 2, 0), np.asarray(photo(0, 2, (7, 3))))


def test_a_resized_crop_sees_each_photo_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    photos = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((20, 30), (40, 12), (5, 5), (1, 9))]
    crop, batch = RandomResizedCrop(size=16), padded(photos)
    draws = torch.rand(len(photos), crop.draws)
    views = crop(batch, draws)
    assert views.shape == (len(photos), 3, 16, 16)
    for number, photo in enumerate(photos):
        assert torch.equal(views[number], crop(photo[None], draws[number : number + 1])[0])
    # A flipped photo is at the right, and its crop a crop of it.
    mirrored = Flip(horizontal=1)(batch, torch.zeros(len(photos), 2))
    for number, photo in enumerate(photos):
        assert torch.equal(crop(mirrored, draws)[number], crop(photo.flip(2)[None], draws[number : number + 1])[0])


@pytest.mark.parametrize(
    "steps", ["[{random_resized_crop:{size:16}},trivial_augment]", "[flip,{random_resized_crop:{size:16}}]"]
)
def test_photos_of_any_shape_are_cropped_mixed_and_shown(kdpipe: Callable, odd_folders: Path, steps: str) -> None:
    photos = [
        "experiment=student",
        "dataset=image_folder",
        f"dataset.root={odd_folders}",
        *KEEP,
        "train.show_views=true",
    ]
    network = ["model=resnet20", "model.depth=8", "train.epochs=1", "train.batch_size=10", "train.mixup=0.2"]
    outcome = kdpipe(*photos, *network, "augmentation=pipeline", f"augmentation.steps={steps}")
    assert outcome.status == 0, outcome.errors
    assert list(Path("outputs/runs").glob("*/views.png"))
