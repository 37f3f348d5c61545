"""Class folders and Kaggle's Dogs vs. Cats: what is read, what is an error, and what is decoded only once."""

import logging
import multiprocessing
import os
import shutil
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image, features
from torch import Tensor

from kdpipe.assembly.datasets import build_data
from kdpipe.data import Source, split
from kdpipe.data.decode import MAX_BYTES, ImageFile, decoded_source
from kdpipe.data.dogs_vs_cats import MAX_NESTED, dogs_vs_cats
from kdpipe.data.image_folder import image_folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def load(cache: Path) -> Callable[..., Source]:
    """`load(root, …)` is `image_folder` with the values of its YAML."""

    def image_folder_at(root: Path, image_size: int | None = None, on_bad_image: str = "stop") -> Source:
        return image_folder(str(root), image_size, on_bad_image, str(cache))

    return image_folder_at


@pytest.fixture
def load_kaggle(cache: Path) -> Callable[..., Source]:
    """`load_kaggle(root, …)` is `dogs_vs_cats` at 16 pixels."""

    def dogs_vs_cats_at(root: Path, image_size: int | None = 16, on_bad_image: str = "stop") -> Source:
        return dogs_vs_cats(str(root), image_size, on_bad_image, str(cache))

    return dogs_vs_cats_at


@pytest.fixture
def split_folders(tmp_path: Path, photo) -> Path:
    """train, val and test with 4, 2 and 3 photos of each class, all of them different."""
    number = 0
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for kind, class_name in enumerate(("temple", "flower")):
            folder = tmp_path / "parts" / part / class_name
            folder.mkdir(parents=True)
            for _ in range(count):
                photo(kind, number).save(folder / f"{number:02}.png")
                number += 1
    return tmp_path / "parts"


@pytest.fixture
def kaggle(tmp_path: Path, photo) -> Path:
    """A folder with train/cat.0.jpg … dog.5.jpg, in many sizes as Kaggle's are."""
    (tmp_path / "kaggle" / "train").mkdir(parents=True)
    for kind, class_name in enumerate(("cat", "dog")):
        for number in range(6):
            file = tmp_path / "kaggle" / "train" / f"{class_name}.{number}.jpg"
            photo(kind, number, (20 + number, 30 - number)).save(file)
    return tmp_path / "kaggle"


def pixels(image: Image.Image | Path) -> Tensor:
    """An image as a source gives it: uint8 [3, H, W]."""
    opened = Image.open(image) if isinstance(image, Path) else image
    return torch.from_numpy(np.asarray(opened.convert("RGB")).transpose(2, 0, 1).copy())


def images_below(root: Path) -> Tensor:
    """All the images of a folder, by their paths."""
    return torch.stack([pixels(path) for path in sorted(root.rglob("*.*"))])


def entries(cache: Path) -> list[Path]:
    """The folders of decoded arrays."""
    return sorted(path for path in cache.iterdir() if path.is_dir())


def same(one: Source, other: Source) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and one.class_names == other.class_names
        and {name: positions.tolist() for name, positions in one.given.items()}
        == {name: positions.tolist() for name, positions in other.given.items()}
        and one.fingerprint == other.fingerprint
    )


def zip_of(folder: Path, archive: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive of what is in `folder`, with a Mac's remains in it."""
    with zipfile.ZipFile(archive, "w", compression) as packed:
        for path in sorted(folder.rglob("*"), reverse=True):  # archives promise no order
            packed.write(path, path.relative_to(folder))
        packed.writestr("__MACOSX/train/._cat.0.jpg", b"no image")
        packed.writestr("__MACOSX/train/cat.0.jpg", b"no image")
    return archive


def content_of(archive: Path, member: str) -> slice:
    """Where in the archive's bytes a member's content lies."""
    with zipfile.ZipFile(archive) as packed:
        info = packed.getinfo(member)
    start = info.header_offset + 30 + len(info.filename)  # a local header has 30 bytes and the name
    return slice(start, start + info.compress_size)


def flip_a_bit(content: bytearray, inside: slice) -> None:
    content[(inside.start + inside.stop) // 2] ^= 1


def overwrite(content: bytearray, inside: slice) -> None:
    content[inside] = b"\xff" * (inside.stop - inside.start)


def test_class_folders_give_images_labels_and_class_names(class_folders: Path, load):
    source = load(class_folders)
    assert source.images.dtype == torch.uint8
    assert torch.equal(source.images, images_below(class_folders))
    assert source.labels.dtype == torch.int64
    assert source.labels.tolist() == [0] * 20 + [1] * 20
    assert source.class_names == ("flower", "temple")
    assert source.given == {}


def test_folders_below_a_class_folder_belong_to_the_class(class_folders: Path, load):
    before = load(class_folders)
    (class_folders / "temple" / "more").mkdir()
    (class_folders / "temple" / "19.jpg").rename(class_folders / "temple" / "more" / "19.jpg")
    assert same(load(class_folders), before)


def test_train_val_and_test_folders_are_the_splits(split_folders: Path, load):
    data = split(load(split_folders), "parts", 1.0, 0.1, 0.1, 0)
    assert data.class_names == ("flower", "temple")
    for split_name, folder, count in (("train", "train", 4), ("validation", "val", 2), ("test", "test", 3)):
        positions = data.splits[split_name]
        assert torch.equal(data.images[positions], images_below(split_folders / folder)), split_name
        assert data.labels[positions].tolist() == [0] * count + [1] * count


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_validation_folder_has_several_names(split_folders: Path, load, name):
    expected = images_below(split_folders / "val")
    (split_folders / "val").rename(split_folders / name)
    source = load(split_folders)
    assert set(source.given) == {"validation", "test"}
    assert torch.equal(source.images[source.given["validation"]], expected)


@pytest.mark.parametrize(
    ("missing", "sizes"),
    [
        (["val"], {"train": 6, "validation": 2, "test": 6}),
        (["test"], {"train": 6, "validation": 4, "test": 2}),
        (["val", "test"], {"train": 4, "validation": 2, "test": 2}),
    ],
)
def test_a_split_without_its_folder_is_taken_from_the_training_images(split_folders: Path, load, missing, sizes):
    for name in missing:
        shutil.rmtree(split_folders / name)
    data = split(load(split_folders), "parts", 1.0, 0.25, 0.25, 0)
    assert {name: len(positions) for name, positions in data.splits.items()} == sizes
    assert sum(sizes.values()) == len(images_below(split_folders))


def test_a_class_folder_that_is_called_test_is_a_class_without_a_train_folder(class_folders: Path, load):
    (class_folders / "temple").rename(class_folders / "test")
    source = load(class_folders)
    assert source.class_names == ("flower", "test")
    assert source.given == {}


def test_the_same_images_in_another_split_are_other_data(split_folders: Path, load):
    # The fingerprint tells a finished run whether its result still stands.
    shutil.rmtree(split_folders / "val")
    tested = load(split_folders)
    (split_folders / "test").rename(split_folders / "val")
    assert load(split_folders).fingerprint != tested.fingerprint


def test_images_keep_their_size_where_all_have_one(class_folders: Path, load):
    for path in class_folders.rglob("*.jpg"):
        Image.open(path).resize((40, 24)).save(path)
    source = load(class_folders)
    assert source.images.shape == (40, 3, 24, 40)
    assert torch.equal(source.images, images_below(class_folders))


def test_images_of_several_sizes_need_an_image_size(class_folders: Path, photo, load):
    photo(0, 3, (40, 24)).save(class_folders / "temple" / "03.jpg")
    with pytest.raises(ValueError) as error:
        load(class_folders)
    message = str(error.value)
    assert message.startswith(
        "image_size=null: the first image has 32×32 pixels, but temple/03.jpg has 40×24; expected"
    )


def test_images_of_several_sizes_are_resized_to_squares(class_folders: Path, photo, load):
    photo(0, 3, (40, 24)).save(class_folders / "temple" / "03.png")
    (class_folders / "temple" / "03.jpg").unlink()
    source = load(class_folders, image_size=16)
    assert source.images.shape == (40, 3, 16, 16)
    squeezed = photo(0, 3, (40, 24)).resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(source.images[23], pixels(squeezed))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "tif")]
)
def test_grey_palette_transparent_and_cmyk_images_are_read_as_rgb(class_folders, photo, load, mode, suffix):
    original = photo(0, 0)
    (class_folders / "temple" / "00.jpg").unlink()
    original.convert(mode).save(class_folders / "temple" / f"00.{suffix}")
    assert Image.open(class_folders / "temple" / f"00.{suffix}").mode == mode

    read = load(class_folders).images[20]

    expected = pixels(original.convert("L")) if mode in ("L", "LA") else pixels(original)
    tolerance = 26 if mode == "P" else 0  # a palette of 216 colours has steps of 51
    assert (read.int() - expected.int()).abs().float().mean() <= tolerance


def test_a_cmyk_jpeg_is_read_as_rgb(class_folders: Path, photo, load):
    photo(0, 0).convert("CMYK").save(class_folders / "temple" / "00.jpg", quality=95)
    read = load(class_folders).images[20]
    assert (read.int() - pixels(photo(0, 0)).int()).abs().float().mean() < 10


def test_a_grey_image_of_16_bits_keeps_its_brightness(class_folders: Path, photo, load):
    grey = np.asarray(photo(0, 0).convert("L"))
    (class_folders / "temple" / "00.jpg").unlink()
    Image.fromarray(grey.astype(np.uint16) * 257).save(class_folders / "temple" / "00.png")
    read = load(class_folders).images[20]
    assert (read.int() - torch.from_numpy(grey.astype(np.int32))).abs().max() <= 1


def spoil(class_folders: Path) -> list[str]:
    """Four files that are no readable images, a photo cut off in the middle among them."""
    whole = (class_folders / "temple" / "03.jpg").read_bytes()
    (class_folders / "temple" / "03.jpg").write_bytes(whole[: len(whole) // 2])
    (class_folders / "temple" / "05.jpg").write_bytes(b"")
    (class_folders / "flower" / "19.jpg").write_text("<html>404 Not Found</html>")
    (class_folders / "flower" / "labels.csv").write_text("00.jpg,flower\n")
    return ["flower/19.jpg", "flower/labels.csv", "temple/03.jpg", "temple/05.jpg"]


@pytest.mark.parametrize("image_size", [None, 16])
def test_all_bad_files_are_named_and_nothing_is_cached(class_folders, load, cache, image_size):
    bad = spoil(class_folders)
    with pytest.raises(ValueError) as error:
        load(class_folders, image_size)
    message = str(error.value)
    assert message.startswith("on_bad_image=stop: 4 of 41 files are not readable images; remove them, or set skip: ")
    assert [name for name in bad if f" {name} (" in message] == bad
    assert message.count(".jpg (") + message.count(".csv (") == 4
    assert "\n" not in message
    assert entries(cache) == []


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif", "webp"])
def test_a_truncated_file_is_named_whatever_its_format(class_folders: Path, photo, load, suffix):
    path = class_folders / "temple" / f"20.{suffix}"
    photo(0, 20).save(path)
    assert len(load(class_folders).images) == 41
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"1 of 41 files .*: temple/20\.{suffix} \("):
        load(class_folders)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_file_is_named(class_folders: Path, photo, load):
    path = class_folders / "temple" / "20.avif"
    photo(0, 20).save(path)
    path.write_bytes(path.read_bytes().replace(b"iloc", b"ilox"))
    with pytest.raises(ValueError, match=r"1 of 41 files .*: temple/20\.avif \("):
        load(class_folders)


@pytest.mark.parametrize("image_size", [None, 16])
def test_skip_leaves_bad_files_out_and_the_rest_is_right(class_folders, load, caplog, image_size):
    bad = spoil(class_folders)
    with caplog.at_level(logging.WARNING, "kdpipe"):
        skipped = load(class_folders, image_size, on_bad_image="skip")
    assert "dataset.on_bad_image=skip: 4 of 41 files are not readable images, left out" in caplog.text

    for name in bad:
        (class_folders / name).unlink()
    assert same(skipped, load(class_folders, image_size))
    assert skipped.labels.tolist() == [0] * 19 + [1] * 18


def test_skip_keeps_the_splits_right(split_folders: Path, load):
    bad = [next((split_folders / part / "flower").iterdir()) for part in ("train", "val", "test")]
    for path in bad:
        path.write_bytes(b"")
    skipped = load(split_folders, on_bad_image="skip")
    for path in bad:
        path.unlink()
    assert same(skipped, load(split_folders))
    assert torch.equal(skipped.images[skipped.given["test"]], images_below(split_folders / "test"))


def test_the_number_of_skipped_files_is_logged_each_time(class_folders: Path, load, caplog):
    spoil(class_folders)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kdpipe"):
            load(class_folders, on_bad_image="skip")
        assert "4 of 41 files" in caplog.text


def test_files_skipped_once_still_stop_a_run_that_does_not_skip(class_folders: Path, load):
    spoil(class_folders)
    load(class_folders, on_bad_image="skip")
    with pytest.raises(ValueError, match="4 of 41 files are not readable images"):
        load(class_folders, on_bad_image="stop")


def test_a_class_with_bad_files_only_is_an_error_even_if_they_are_skipped(class_folders: Path, load):
    for path in (class_folders / "temple").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^root: class temple has no readable image; expected at least one$"):
        load(class_folders, on_bad_image="skip")


@pytest.mark.parametrize(
    ("image_size", "on_bad_image", "message"),
    [
        (0, "stop", r"^image_size=0: expected a whole number from 1 to 4096 or null$"),
        (16.5, "stop", r"^image_size=16\.5: expected a whole number from 1 to 4096 or null$"),
        (None, "ignore", r"^on_bad_image=ignore: expected one of stop, skip$"),
    ],
)
def test_settings_out_of_range_are_errors(class_folders: Path, load, image_size, on_bad_image, message):
    with pytest.raises(ValueError, match=message):
        load(class_folders, image_size, on_bad_image)


def test_an_empty_class_folder_is_an_error(class_folders: Path, load):
    (class_folders / "zebra").mkdir()
    with pytest.raises(ValueError, match=r"^root=.*: the class folder .*zebra is empty"):
        load(class_folders)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_class_without_training_images_is_an_error(split_folders: Path, load, part):
    (split_folders / "train" / "temple").rename(split_folders / "train" / "zebra")
    for other in {"val", "test"} - {part}:
        shutil.rmtree(split_folders / other)
    with pytest.raises(ValueError, match=rf"^root=.*{part} has a class temple, but .*train does not"):
        load(split_folders)


def test_a_class_without_test_images_is_fine(split_folders: Path, load):
    shutil.rmtree(split_folders / "test" / "temple")
    source = load(split_folders)
    assert source.labels[source.given["test"]].tolist() == [0, 0, 0]


def test_a_missing_folder_is_an_error(tmp_path: Path, load):
    with pytest.raises(ValueError, match=r"^root=.*nowhere: no such folder; expected a folder with class folders"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("classes", [0, 1])
def test_fewer_than_two_classes_are_an_error(class_folders: Path, load, classes):
    for class_name in ("flower", "temple")[classes:]:
        shutil.rmtree(class_folders / class_name)
    with pytest.raises(ValueError, match=rf"^root=.* has {classes}; expected two or more class folders"):
        load(class_folders)


@pytest.mark.parametrize(
    "remains", [".DS_Store", "temple/.DS_Store", "temple/._00.jpg", "temple/Thumbs.db", "flower/desktop.ini"]
)
def test_files_left_by_operating_systems_are_ignored(class_folders: Path, load, remains):
    before = load(class_folders)
    (class_folders / remains).write_bytes(b"no image")
    assert same(load(class_folders), before)


@pytest.mark.parametrize("hidden", [".git", "temple/.ipynb_checkpoints", "temple/.cache/small"])
def test_hidden_folders_are_ignored(class_folders: Path, load, hidden):
    before = load(class_folders)
    (class_folders / hidden).mkdir(parents=True)
    shutil.copy(class_folders / "temple" / "00.jpg", class_folders / hidden / "00-checkpoint.jpg")
    assert same(load(class_folders), before)


def test_files_are_decoded_alike_however_many_may_wait(class_folders: Path, load, monkeypatch):
    monkeypatch.setattr("kdpipe.data.decode.QUEUED", 7)
    assert torch.equal(load(class_folders).images, images_below(class_folders))


def test_a_second_load_reads_no_image(class_folders: Path, load, monkeypatch):
    first = load(class_folders)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
    assert same(load(class_folders), first)


def test_a_touched_file_is_decoded_again(class_folders: Path, load, cache):
    first = load(class_folders)
    path = class_folders / "temple" / "00.jpg"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    again = load(class_folders)
    assert len(entries(cache)) == 2
    assert same(again, first)


def test_a_changed_file_is_decoded_again(class_folders: Path, photo, load, cache):
    first = load(class_folders)
    photo(0, 99).save(class_folders / "temple" / "00.jpg")
    again = load(class_folders)
    assert len(entries(cache)) == 2
    assert torch.equal(again.images[20], pixels(class_folders / "temple" / "00.jpg"))
    assert again.fingerprint != first.fingerprint


def test_a_changed_file_whose_size_and_time_are_as_before_is_decoded_again(class_folders: Path, photo, load):
    path = class_folders / "temple" / "00.bmp"
    photo(0, 0).save(path)
    load(class_folders)
    before = path.stat()
    photo(0, 99).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert torch.equal(load(class_folders).images, images_below(class_folders))


def test_an_added_file_is_decoded_too(class_folders: Path, photo, load, cache):
    load(class_folders)
    photo(0, 99).save(class_folders / "temple" / "99.jpg")
    again = load(class_folders)
    assert len(entries(cache)) == 2
    assert torch.equal(again.images, images_below(class_folders))
    assert again.labels.tolist() == [0] * 20 + [1] * 21


def test_a_removed_file_is_gone(class_folders: Path, load):
    load(class_folders)
    (class_folders / "flower" / "07.jpg").unlink()
    assert torch.equal(load(class_folders).images, images_below(class_folders))


def test_a_file_moved_to_another_class_gets_its_label(class_folders: Path, load):
    load(class_folders)
    (class_folders / "flower" / "00.jpg").rename(class_folders / "temple" / "zz.jpg")
    assert load(class_folders).labels.tolist() == [0] * 19 + [1] * 21


def test_each_image_size_has_its_own_entry(class_folders: Path, load):
    for _ in range(2):
        assert load(class_folders, 16).images.shape[-2:] == (16, 16)
        assert load(class_folders, 24).images.shape[-2:] == (24, 24)


def test_two_folders_with_the_same_names_sizes_and_times_are_told_apart(tmp_path: Path, photo, load):
    # Uncompressed files out of two archives that carry no times.
    for root, first in (("one", 0), ("other", 10)):
        for kind, class_name in enumerate(("temple", "flower")):
            (tmp_path / root / class_name).mkdir(parents=True)
            path = tmp_path / root / class_name / "0.bmp"
            photo(kind, first).save(path)
            os.utime(path, (0, 0))
    load(tmp_path / "one")
    assert torch.equal(load(tmp_path / "other").images, images_below(tmp_path / "other"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "tear",
    [
        lambda entry: cut(entry / "images.npy"),
        lambda entry: cut(entry / "labels.npy"),
        lambda entry: cut(entry / "meta.json"),
        lambda entry: (entry / "images.npy").write_bytes(b""),
        lambda entry: (entry / "meta.json").write_bytes(b""),
        lambda entry: (entry / "images.npy").unlink(),
        lambda entry: (entry / "labels.npy").unlink(),
        lambda entry: (entry / "meta.json").unlink(),
        lambda entry: [path.unlink() for path in entry.iterdir()],
        lambda entry: np.save(entry / "labels.npy", np.array([{}] * 40), allow_pickle=True),
        lambda entry: np.save(entry / "images.npy", np.array([{}] * 40), allow_pickle=True),
        lambda entry: np.save(entry / "labels.npy", np.full(40, 7)),
        lambda entry: np.save(entry / "labels.npy", np.zeros(40)),
        lambda entry: np.save(entry / "images.npy", np.zeros((40, 3, 32), np.uint8)),
        lambda entry: np.save(entry / "images.npy", np.zeros((40, 3, 64, 16), np.uint8)),
        lambda entry: np.save(entry / "images.npy", np.zeros((40, 6, 32, 32), np.uint8)),
        lambda entry: (entry / "meta.json").write_text("[" * 100_000),
        lambda entry: (entry / "meta.json").write_text("[]"),
        lambda entry: (entry / "meta.json").write_text('{"names": 40}'),
    ],
    ids=[
        "cut images",
        "cut labels",
        "cut meta",
        "empty images",
        "empty meta",
        "no images",
        "no labels",
        "no meta",
        "empty entry",
        "objects as labels",
        "objects as images",
        "no such class",
        "floats",
        "dimensions",
        "sides",
        "channels",
        "deep meta",
        "list",
        "number",
    ],
)
def test_a_damaged_entry_is_decoded_again(class_folders: Path, load, cache, tear):
    load(class_folders)
    tear(entries(cache)[0])
    again = load(class_folders)
    assert torch.equal(again.images, images_below(class_folders))
    assert again.labels.tolist() == [0] * 20 + [1] * 20
    assert len(entries(cache)) == 1


def test_writes_to_the_images_do_not_reach_the_cache(class_folders: Path, load):
    load(class_folders).images.zero_()
    assert torch.equal(load(class_folders).images, images_below(class_folders))


def decode_concurrently(root: Path, cache: Path, reads: Path, both_ready: Barrier) -> None:
    """Load 40 slow files, leaving a line in `reads` for each one that is read."""

    def reader(path: Path) -> Callable[[], bytes]:
        def read() -> bytes:
            with reads.open("a") as lines:
                lines.write(f"{path.name}\n")
            time.sleep(0.01)
            return path.read_bytes()

        return read

    files = [
        ImageFile(path.name, int(path.parent.name == "temple"), (0,), reader(path))
        for path in sorted(root.rglob("*.jpg"))
    ]
    both_ready.wait(60)
    decoded_source(files, ("flower", "temple"), image_size=32, on_bad_image="stop", cache_dir=str(cache))


def test_two_concurrent_processes_decode_once(class_folders: Path, tmp_path: Path, cache):
    # A fork has PyTorch imported already, which saves seconds, but is safe on Linux only.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    both_ready, reads = context.Barrier(2), tmp_path / "reads"
    arguments = (class_folders, cache, reads, both_ready)
    processes = [context.Process(target=decode_concurrently, args=arguments, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(reads.read_text().splitlines()) == 40
    (entry,) = entries(cache)
    assert np.array_equal(np.load(entry / "images.npy"), images_below(class_folders).numpy())


def arrange(form: str, kaggle: Path, folder: Path) -> Path:
    """The download in one of its forms, in `folder`; what `dataset.root` is then."""
    folder.mkdir()
    if form == "folder with train":
        shutil.copytree(kaggle / "train", folder / "train")
    elif form == "folder with train in train":
        shutil.copytree(kaggle / "train", folder / "train" / "train")
    elif form == "folder of files":
        shutil.copytree(kaggle / "train", folder, dirs_exist_ok=True)
    else:
        train = zip_of(kaggle, folder / "train.zip")
        if "dogs-vs-cats.zip" in form:
            with zipfile.ZipFile(folder / "dogs-vs-cats.zip", "w", zipfile.ZIP_DEFLATED) as whole:
                whole.writestr("sampleSubmission.csv", "id,label\n1,0\n")
                whole.write(train, "train.zip")
            train.unlink()
        if "itself" in form:
            return next(folder.iterdir())
    return folder


FORMS = [
    "folder with train",
    "folder with train in train",
    "folder of files",
    "folder with train.zip",
    "folder with dogs-vs-cats.zip",
    "train.zip itself",
    "dogs-vs-cats.zip itself",
]


@pytest.mark.parametrize("form", FORMS)
def test_dogs_vs_cats_is_the_same_data_in_every_form_of_the_download(kaggle, tmp_path, load_kaggle, form):
    source = load_kaggle(arrange(form, kaggle, tmp_path / "download"))

    paths = sorted((kaggle / "train").iterdir())
    squares = [Image.open(path).resize((16, 16), Image.Resampling.BILINEAR) for path in paths]
    assert torch.equal(source.images, torch.stack([pixels(square) for square in squares]))
    assert source.labels.tolist() == [0] * 6 + [1] * 6
    assert source.class_names == ("cat", "dog")
    assert source.given == {}


def test_kaggles_test_images_and_other_files_are_not_used(kaggle: Path, photo, load_kaggle):
    before = load_kaggle(kaggle)
    (kaggle / "test1").mkdir()
    for name in ("test1/1.jpg", "cat.99.jpg", "train/1.jpg", "train/bird.0.jpg", "train/cat.jpg", "train/._cat.0.jpg"):
        photo(0, 1).save(kaggle / name)
    assert same(load_kaggle(kaggle), before)


def test_unpacked_files_take_precedence_over_an_archive(kaggle: Path, load_kaggle):
    before = load_kaggle(kaggle)
    (kaggle / "train.zip").write_bytes(b"no archive")
    assert same(load_kaggle(kaggle), before)


@pytest.mark.parametrize("form", ["folder with train.zip", "train.zip itself", "dogs-vs-cats.zip itself"])
def test_a_broken_archive_is_named(kaggle: Path, tmp_path: Path, load_kaggle, form):
    root = arrange(form, kaggle, tmp_path / "download")
    archive = root if root.is_file() else root / "train.zip"
    cut(archive)
    with pytest.raises(ValueError) as error:
        load_kaggle(root)
    assert str(error.value).startswith(f"root={root}: {archive} is not a readable zip archive")


def test_a_train_zip_that_is_broken_within_the_whole_archive_is_named(kaggle: Path, tmp_path: Path, load_kaggle):
    whole = arrange("dogs-vs-cats.zip itself", kaggle, tmp_path / "download")
    content = bytearray(whole.read_bytes())
    overwrite(content, content_of(whole, "train.zip"))
    whole.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_kaggle(whole)
    assert str(error.value).startswith(f"root={whole}: {whole} is not a readable zip archive")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("damage", [flip_a_bit, overwrite])
def test_a_damaged_member_of_an_archive_is_named_or_skipped(kaggle, tmp_path, load_kaggle, caplog, compression, damage):
    archive = zip_of(kaggle, tmp_path / "train.zip", compression)
    content = bytearray(archive.read_bytes())
    damage(content, content_of(archive, "train/dog.3.jpg"))
    archive.write_bytes(content)

    with pytest.raises(ValueError, match=r"on_bad_image=stop: 1 of 12 files .*: train/dog\.3\.jpg \("):
        load_kaggle(archive)

    with caplog.at_level(logging.WARNING, "kdpipe"):
        skipped = load_kaggle(archive, on_bad_image="skip")
    assert "1 of 12 files are not readable images" in caplog.text
    (kaggle / "train" / "dog.3.jpg").unlink()
    assert same(skipped, load_kaggle(kaggle))


def test_an_archive_with_a_password_is_an_error_that_names_it_or_its_files(kaggle, tmp_path, load_kaggle):
    archive = zip_of(kaggle, tmp_path / "train.zip")
    content = archive.read_bytes()
    # zipfile writes no such archives: the bit that says so is set by hand, in the headers and in the directory.
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        pieces = content.split(header)
        content = header.join([pieces[0], *(piece[: flags - 4] + b"\x01" + piece[flags - 3 :] for piece in pieces[1:])])
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"(train\.zip|train/cat\.0\.jpg)"):
        load_kaggle(archive)


def test_a_repaired_archive_is_read_again(kaggle: Path, tmp_path: Path, load_kaggle):
    # The checksums that an archive states are the same whether its contents are damaged or not.
    archive = zip_of(kaggle, tmp_path / "train.zip")
    whole = archive.read_bytes()
    damaged = bytearray(whole)
    flip_a_bit(damaged, content_of(archive, "train/dog.3.jpg"))
    archive.write_bytes(damaged)
    assert len(load_kaggle(archive, on_bad_image="skip").images) == 11
    archive.write_bytes(whole)
    assert len(load_kaggle(archive, on_bad_image="skip").images) == 12


def test_another_archive_under_the_same_name_is_decoded(kaggle: Path, tmp_path: Path, photo, load_kaggle):
    first = load_kaggle(zip_of(kaggle, tmp_path / "train.zip"))
    photo(1, 99).save(kaggle / "train" / "dog.5.jpg")
    again = load_kaggle(zip_of(kaggle, tmp_path / "train.zip"))
    assert torch.equal(again.images[:11], first.images[:11])
    assert not torch.equal(again.images[11], first.images[11])


def test_a_second_load_of_an_archive_reads_no_member(kaggle: Path, tmp_path: Path, load_kaggle):
    archive = zip_of(kaggle, tmp_path / "train.zip")
    first, status = load_kaggle(archive), archive.stat()
    content = bytearray(archive.read_bytes())
    for path in (kaggle / "train").iterdir():
        overwrite(content, content_of(archive, f"train/{path.name}"))
    archive.write_bytes(content)
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert same(load_kaggle(archive), first)


@pytest.mark.parametrize("leftover", [None, "cat", "dog"])
def test_a_folder_without_cats_or_without_dogs_is_an_error(kaggle: Path, load_kaggle, leftover):
    for path in (kaggle / "train").iterdir():
        if path.name.split(".")[0] != leftover:
            path.unlink()
    message = r"^root=.*: cat\.N\.jpg and dog\.N\.jpg not found; expected Kaggle's train folder"
    with pytest.raises(ValueError, match=message):
        load_kaggle(kaggle)


def test_a_missing_root_is_an_error(tmp_path: Path, load_kaggle):
    with pytest.raises(ValueError, match=r"^root=.*nowhere: no such file or folder; expected Kaggle's train folder"):
        load_kaggle(tmp_path / "nowhere")


def test_kaggles_photos_need_an_image_size(kaggle: Path, load_kaggle):
    with pytest.raises(ValueError, match=r"^image_size=null: expected a whole number from 1 to 4096$"):
        load_kaggle(kaggle, image_size=None)


def test_real_photos_of_kaggle_are_split_70_20_10(
    shared_data: Path, tmp_path: Path, composed: Callable[..., DictConfig]
):
    wanted = {f"train/{kind}.{number}.jpg" for kind in ("cat", "dog") for number in range(1000, 1050)}
    with tarfile.open(shared_data / "dogs-vs-cats-4000.tar.gz") as archive:
        for member in archive:
            if member.name in wanted:
                archive.extract(member, tmp_path, filter="data")
                wanted.remove(member.name)
            if not wanted:
                break
    config = composed(
        "dataset=dogs_vs_cats", f"dataset.root={tmp_path}", "dataset.image_size=200", f"output_dir={tmp_path}/outputs"
    )

    data = build_data(config.dataset)

    assert data.images.shape == (100, 3, 200, 200)
    assert torch.equal(data.images, images_below(tmp_path / "train"))  # they are stored at 200 pixels
    for split_name, count in (("train", 70), ("validation", 20), ("test", 10)):
        labels = data.labels[data.splits[split_name]]
        assert torch.bincount(labels).tolist() == [count // 2, count // 2], split_name
    everything = torch.cat(list(data.splits.values()))
    assert torch.equal(everything.sort().values, torch.arange(100))


def test_a_test_folder_without_a_readable_image_is_not_replaced_by_training_images(split_folders: Path, load):
    for path in (split_folders / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="the test folder has no readable image"):
        load(split_folders, on_bad_image="skip")


def test_out_of_memory_is_not_a_bad_image(class_folders: Path, load, monkeypatch):
    def out_of_memory(image: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr("kdpipe.data.decode.as_rgb", out_of_memory)
    with pytest.raises(MemoryError):
        load(class_folders, on_bad_image="skip")


@pytest.mark.parametrize(
    "name",
    ["../dog.9.jpg", "train/../../dog.9.jpg", "/etc/dog.9.jpg", "C:/dog.9.jpg", r"\\host\dog.9.jpg", r"..\dog.9.jpg"],
)
@pytest.mark.parametrize("nested", [False, True], ids=["train.zip", "dogs-vs-cats.zip"])
def test_an_archive_with_members_outside_its_folder_is_an_error(kaggle, tmp_path, load_kaggle, name, nested):
    archive = zip_of(kaggle, tmp_path / "train.zip")
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(name, b"")
    if nested:
        with zipfile.ZipFile(tmp_path / "dogs-vs-cats.zip", "w") as whole:
            whole.write(archive, "train.zip")
        archive = tmp_path / "dogs-vs-cats.zip"
    with pytest.raises(ValueError) as error:
        load_kaggle(archive)
    assert str(error.value) == (
        f"root={archive}: {archive} is not a readable zip archive "
        f"(its member {name} would be unpacked outside its folder)"
    )


def claim_size(archive: Path, member: str, size: int) -> None:
    """Have the archive's directory say that a member has `size` bytes."""
    content = bytearray(archive.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(member.encode()))
    content[place + 24 : place + 28] = size.to_bytes(4, "little")
    archive.write_bytes(content)


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """The most memory in use since the test began, in bytes."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_member_that_claims_to_be_too_large_is_not_read(kaggle, tmp_path, load_kaggle):
    archive = zip_of(kaggle, tmp_path / "train.zip")
    claim_size(archive, "train/dog.3.jpg", MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"1 of 12 files .*dog\.3\.jpg \(.* has 256 MB; expected at most 256 MB\)"):
        load_kaggle(archive)
    assert len(load_kaggle(archive, on_bad_image="skip").images) == 11


def test_no_more_of_a_member_is_read_than_it_claims_to_have(kaggle, tmp_path, load_kaggle, peak):
    (kaggle / "train" / "dog.3.jpg").write_bytes(bytes(50_000_000))
    archive = zip_of(kaggle, tmp_path / "train.zip", zipfile.ZIP_DEFLATED)
    claim_size(archive, "train/dog.3.jpg", 1000)
    tracemalloc.reset_peak()
    with pytest.raises(ValueError, match=r"1 of 12 files .* train/dog\.3\.jpg \("):
        load_kaggle(archive)
    assert peak() < 20_000_000


def test_a_nested_archive_that_is_too_large_is_not_read(kaggle, tmp_path, load_kaggle):
    whole = arrange("dogs-vs-cats.zip itself", kaggle, tmp_path / "download")
    claim_size(whole, "train.zip", MAX_NESTED + 1)
    with pytest.raises(ValueError, match=r"train\.zip has 1,000 MB; expected at most 1,000 MB"):
        load_kaggle(whole)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_whose_output_cannot_be_limited_is_an_error(kaggle, tmp_path, load_kaggle, compression):
    with pytest.raises(ValueError, match=r"12 of 12 files .* is packed with method"):
        load_kaggle(zip_of(kaggle, tmp_path / "train.zip", compression))


def test_an_image_of_too_many_pixels_is_not_decoded(class_folders: Path, load):
    # 65 million black pixels are 8 kB of PNG.
    Image.new("1", (13_000, 5_000)).save(class_folders / "temple" / "00.png")
    with pytest.raises(ValueError, match=r"00\.png \(13000×5000 pixels; expected at most 64 million\)"):
        load(class_folders)
    assert len(load(class_folders, on_bad_image="skip").images) == 40


def test_a_bomb_that_pillow_refuses_itself_is_a_bad_image_too(class_folders: Path, load):
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    content = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (class_folders / "temple" / "00.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of 41 files .* temple/00\.png \("):
        load(class_folders)


def test_a_large_file_is_not_read(class_folders: Path, load, peak):
    with (class_folders / "temple" / "00.tif").open("wb") as file:
        file.truncate(MAX_BYTES + 1_000_000)  # takes no space on disk
    with pytest.raises(ValueError, match=r"temple/00\.tif \(257 MB; expected at most 256 MB\)"):
        load(class_folders)
    assert peak() < 20_000_000


@pytest.mark.parametrize("format_name", ["EPS", "ICO", "TGA", "PCX"])
def test_formats_that_are_not_for_photos_are_not_images(class_folders: Path, photo, load, format_name):
    photo(0, 0).save(class_folders / "temple" / "00.img", format_name)
    with pytest.raises(ValueError, match=r"1 of 41 files .* temple/00\.img \(unknown image format\)"):
        load(class_folders)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_of_several_frames_the_first_is_read(class_folders: Path, photo, load, suffix):
    path = class_folders / "temple" / f"00.{suffix}"
    (class_folders / "temple" / "00.jpg").unlink()
    photo(0, 0).save(path, save_all=True, append_images=[photo(1, 0)])
    assert torch.equal(load(class_folders).images[20], pixels(photo(0, 0)))


def test_a_linked_class_folder_is_read(class_folders: Path, tmp_path: Path, load):
    before = load(class_folders)
    (class_folders / "temple").rename(tmp_path / "elsewhere")
    (class_folders / "temple").symlink_to(tmp_path / "elsewhere")
    assert same(load(class_folders), before)


def test_cyclic_links_are_named(class_folders: Path, load):
    (class_folders / "temple" / "again").symlink_to(class_folders / "temple")
    with pytest.raises(ValueError, match=r"^root: .*temple/again is a link to a folder that was read already"):
        load(class_folders)


def test_a_file_name_that_is_not_utf_8_is_an_error(class_folders: Path, load):
    (class_folders / "temple").rename(class_folders / os.fsdecode(b"temp\xffle"))
    with pytest.raises(ValueError, match=r"^root: .*temp\\udcffle.* is not; expected file names in UTF-8") as error:
        load(class_folders)
    assert str(error.value).encode()


@pytest.mark.parametrize("name", ["a\nb", "ünï 猫", "${oc.env:HOME}", "a=b,c", "'\\"])
def test_a_class_may_have_any_name_in_utf_8(class_folders: Path, load, name):
    (class_folders / "temple").rename(class_folders / name)
    assert set(load(class_folders).class_names) == {"flower", name}
