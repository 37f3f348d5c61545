"""Kaggle's Dogs vs. Cats, https://www.kaggle.com/c/dogs-vs-cats/data, as downloaded."""

import io
import re
import zipfile
from functools import partial
from pathlib import Path, PureWindowsPath
from threading import Lock

from kdpipe.data.dataset import Source
from kdpipe.data.decode import MAX_BYTES, ImageFile, ImageSize, OnBadImage, decoded_source, image_file
from kdpipe.data.folders import LeftOut, files_below, folder_content, split_named
from kdpipe.settings.errors import ConfigError, flat
from kdpipe.settings.values import StoredResize, checked

CLASS_NAMES = ("cat", "dog")
MAX_NESTED = 1_000_000_000  # bytes of the train.zip in dogs-vs-cats.zip, which is read into memory; Kaggle's has 0.57e9
NAME = re.compile(r"(?:.*/)?(cat|dog)\.\d+\.jpg")


@checked
def dogs_vs_cats(
    root: str, image_size: ImageSize, on_bad_image: OnBadImage, cache_dir: str, resize: StoredResize = "squeeze"
) -> Source:
    """Photos as uint8 [N, 3, image_size, image_size]; classes cat and dog, no splits of its own but those that have
    folders of such files beside `train` (`validation/cats/cat.2000.jpg`).

    Args:
        root: a folder with `train/cat.0.jpg` … (or these files themselves), a folder with Kaggle's `train.zip` or
            `dogs-vs-cats.zip`, or one of these archives. Kaggle's test images have no labels and are not used.
    """
    path = Path(root)
    archives = [path] if path.is_file() else [path / "train.zip", path / "dogs-vs-cats.zip"]
    files: list[ImageFile] = []
    if path.is_dir():
        files = _files_below(path)
    for archive in archives:
        if not files and archive.is_file():
            files = _files_in(archive, root)
    if {file.label for file in files} != {0, 1}:
        problem = "cat.N.jpg and dog.N.jpg not found" if path.exists() else "no such file or folder"
        kaggle = "Kaggle's train folder (train/cat.0.jpg, …), train.zip or dogs-vs-cats.zip"
        raise ConfigError("root", root, kaggle, problem)
    files.sort(key=lambda file: file.name)
    return decoded_source(files, CLASS_NAMES, image_size, on_bad_image, cache_dir, resize)


def _files_below(top: Path) -> list[ImageFile]:
    left_out = LeftOut("dataset.root", top)
    folders, others = folder_content(top, left_out)
    splits = {Path(folder): split_named(Path(folder).name) for folder in folders}
    read = [folder for folder, split in splits.items() if split] if "train" in splits.values() else [top]
    if read != [top]:
        left_out.add(*(folder for folder in splits if folder not in read), *others)
    files = []
    for folder in read:
        found = files_below(folder, left_out)
        named = [(file, match) for file in found if (match := NAME.fullmatch(Path(file).name))]
        if named:
            left_out.add(*set(found).difference(file for file, _ in named))
        else:
            left_out.add(folder, note="no file is called cat.N.jpg or dog.N.jpg")
        for file, match in named:
            split = _split_of(str(Path(file).relative_to(top)))
            files.append(image_file(file, top, CLASS_NAMES.index(match[1]), split))
    left_out.report()
    return files


def _split_of(name: str) -> str | None:
    """The split of a file by the outermost of its folders that is one; None for training images."""
    split = next(filter(None, map(split_named, Path(name).parts[:-1])), "train")
    return None if split == "train" else "test" if split == "evaluation" else split


def _files_in(path: Path, root: str) -> list[ImageFile]:
    try:
        archive = _opened(path)
        if "train.zip" in archive.namelist():  # the whole competition in one archive
            archive = _opened(io.BytesIO(_content(archive, archive.getinfo("train.zip"), MAX_NESTED)))
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises all kinds for damaged archives
        raise ConfigError("root", root, problem=f"{path} is not a readable zip archive ({flat(error)})") from error
    lock = Lock()  # an open archive reads one member at a time
    # The checksums in an archive's directory stay the same when its contents are damaged or repaired.
    stamp = (path.stat().st_size, path.stat().st_mtime_ns)

    def read(member: zipfile.ZipInfo) -> bytes:
        with lock:
            return _content(archive, member, MAX_BYTES)

    return [
        ImageFile(
            info.filename,
            CLASS_NAMES.index(match[1]),
            (info.CRC, *stamp),
            partial(read, info),
            _split_of(info.filename),
        )
        for info in archive.infolist()
        if (match := NAME.fullmatch(info.filename)) and "__MACOSX" not in info.filename
    ]


def _opened(file: Path | io.BytesIO) -> zipfile.ZipFile:
    """An archive. Raises ValueError for a member that an archive of photos does not have."""
    archive = zipfile.ZipFile(file)
    for member in archive.infolist():
        name = PureWindowsPath(member.orig_filename)  # which knows a slash, a backslash and a drive
        if name.anchor or ".." in name.parts:
            raise ValueError(f"its member {member.orig_filename} would be unpacked outside its folder")
        if member.flag_bits & 1:
            raise ValueError(f"its member {member.filename} is encrypted; unpack it and use the folder")
    return archive


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """A member's bytes, at most as many as its header claims, and only if that is below the limit."""
    if member.file_size > limit:
        size, most = member.file_size / 1e6, limit / 1e6
        raise ValueError(f"{member.filename} has {size:,.0f} MB; expected at most {most:,.0f} MB")
    # bz2 and lzma decompress more than was requested.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed with method {member.compress_type}; expected deflate")
    with archive.open(member) as opened:
        return opened.read(member.file_size)
