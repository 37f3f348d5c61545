"""Entries of the cache: made once, complete or absent, also on a disk that is full or read-only."""

import hashlib
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused

from kdpipe.system.disk_cache import array_digest, ensure_entry, mapped_array, new_array


def is_there(entry: Path) -> bool:
    return (entry / "content").exists()


def write(folder: Path) -> None:
    (folder / "content").write_text("all of it")


@pytest.fixture
def small_disk(disk: Callable[[str], Path]) -> Path:
    return disk("1M")


def test_an_entry_is_made_once_by_all_threads(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        write(folder)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ensure_entry(tmp_path / "entry", is_there, make), range(8)))
    assert len(made) == 1 and is_there(tmp_path / "entry")


def test_an_interrupted_entry_leaves_nothing(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_entry(tmp_path / "entry", is_there, make)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_remains_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "entry.unfinished").mkdir()
    ensure_entry(tmp_path / "entry", is_there, write)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["entry"]


def test_a_full_disk_is_an_error_with_the_size_and_leaves_nothing(small_disk: Path) -> None:
    def make(folder: Path) -> None:
        new_array(folder / "array.npy", (2, 1_000_000), np.uint8)

    with pytest.raises(OSError, match=r"No space left on device, 0\.002 GB needed") as caught:
        ensure_entry(small_disk / "entry", is_there, make)
    assert caught.value.filename.endswith("array.npy")
    assert not [path for path in small_disk.iterdir() if path.is_dir()]


@pytest.mark.parametrize("outputs", ["teacher", "images"])
def test_a_run_on_a_full_disk_ends_in_one_line(
    kdpipe: Callable, small_disk: Path, class_folders: Path, outputs: str
) -> None:
    photos = ["dataset=image_folder", f"dataset.root={class_folders}", "dataset.test_fraction=0.2"]
    teacher = kdpipe(*photos, "experiment=teacher", "model=resnet20", "train.epochs=1")
    assert teacher.status == 0, teacher.errors
    Path("outputs/cache/teacher").symlink_to(small_disk)
    (small_disk / "filler").write_bytes(bytes(1_048_576 - (0 if outputs == "teacher" else 4096)))
    images = [f"dataset.cache_dir={small_disk}"] if outputs == "images" else []
    outcome = kdpipe(*photos, "model@teacher=resnet20", "train.epochs=1", *images)
    assert_refused(outcome, "No space left on device", "output_dir")
    (small_disk / "filler").unlink()
    assert kdpipe(*photos, "model@teacher=resnet20", "train.epochs=1", *images).status == 0


def test_a_read_only_folder_serves_existing_entries_only(small_disk: Path) -> None:
    ensure_entry(small_disk / "entry", is_there, write)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    ensure_entry(small_disk / "entry", is_there, write)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        ensure_entry(small_disk / "another", is_there, write)
    assert str(small_disk) in caught.value.filename


def test_an_array_ten_times_larger_than_memory_can_be_read(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = 10 * memory // (3 * 32 * 32)
    file = tmp_path / "images.npy"
    with file.open("wb") as written:  # sparse: the file system keeps no zeros
        np.lib.format.write_array_header_1_0(
            written, {"descr": "|u1", "fortran_order": False, "shape": (count, 3, 32, 32)}
        )
        written.truncate(written.tell() + count * 3 * 32 * 32)
    images = mapped_array(file)
    assert images.shape == (count, 3, 32, 32)
    assert images[torch.tensor([0, count // 2, count - 1])].sum() == 0


def test_writes_to_a_mapped_array_stay_in_memory(tmp_path: Path) -> None:
    new_array(tmp_path / "a.npy", (2, 3), np.float32)[:] = 1
    mapped_array(tmp_path / "a.npy").zero_()
    assert mapped_array(tmp_path / "a.npy").sum() == 6


def test_an_array_is_hashed_once_until_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.npy"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(file, values)
    assert array_digest(file) == hashlib.sha256(values.tobytes()).hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(np.lib.format, "open_memmap", lambda *_, **__: pytest.fail("the file was read again"))
        array_digest(file)
    np.save(file, values + 1)
    os.utime(file, ns=(0, 0))
    assert array_digest(file) == hashlib.sha256((values + 1).tobytes()).hexdigest()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError):
        array_digest(file)
