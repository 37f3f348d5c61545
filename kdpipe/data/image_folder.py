"""Any class folders."""

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from kdpipe.data.dataset import Source
from kdpipe.data.decode import ImageFile, ImageSize, OnBadImage, decoded_source, image_file
from kdpipe.data.dogs_vs_cats import NAME as KAGGLE_NAME
from kdpipe.data.folders import (
    NAMED,
    LeftOut,
    class_folders,
    files_below,
    folder_content,
    refuse_broken_links,
    split_named,
    split_within,
)
from kdpipe.settings.errors import ConfigError, shortened
from kdpipe.settings.values import StoredResize, checked

log = logging.getLogger("kdpipe")

USUAL = ("train", "val", "valid", "validation", "test")
LAYOUTS = "folders of classes (cat/1.jpg), or train/ (train/cat/1.jpg) with test/ or val/ beside it"


@checked
def image_folder(
    root: str, image_size: ImageSize | None, on_bad_image: OnBadImage, cache_dir: str, resize: StoredResize = "squeeze"
) -> Source:
    """Images as uint8 [N, 3, H, W] from `root/<class>/*`, or from `root/train/<class>/*` with a folder of test images,
    one of validation images, both or neither next to it; these may have other common names, such as `Training` and
    `test_set`. What is not read is logged.

    Raises ConfigError for other folders, such as splits that would be taken for classes, a class without images, and a
    class that `train` does not have."""
    top = Path(root)
    if not top.is_dir():
        raise ConfigError("root", root, f"a folder with class folders ({top}/cat/1.jpg)", "no such folder")
    left_out = LeftOut("dataset.root", top)
    parts = _split_folders(top, left_out) or {top: None}
    found = {part: class_folders(part, left_out) for part in parts}
    first, *others = parts
    class_names = tuple(found[first])
    if len(class_names) < 2:
        raise _too_few_classes(top, first, found[first])
    for part in others:
        if unknown := set(found[part]) - set(class_names):
            raise ConfigError("root", root, problem=f"{part} has a class {min(unknown)}, but {first} does not")
    files: list[ImageFile] = []
    inner: dict[str, set[str]] = {}
    for part, folders in found.items():
        for label, class_name in enumerate(class_names):
            paths = [path for folder in folders.get(class_name, ()) for path in files_below(folder, left_out)]
            if part == first:
                inner[class_name] = _inner_folders(paths, folders[class_name])
                if not paths:
                    raise ConfigError("root", root, problem=f"the class folder {folders[class_name][0]} is empty")
            files += [image_file(path, top, label, parts[part]) for path in paths]
    _check_classes(top, first, inner)
    left_out.report()
    return decoded_source(files, class_names, image_size, on_bad_image, cache_dir, resize)


def _split_folders(top: Path, left_out: LeftOut) -> dict[Path, str | None]:
    """The folders of the splits, with None for the training images, which come first; empty where `top` holds the
    classes themselves. Raises ConfigError where folders look like splits, but cannot be used as such."""
    folders, files = folder_content(top, left_out)
    refuse_broken_links(path for path in files if split_named(Path(path).name))
    by_split: dict[str, list[Path]] = {}
    for folder in map(Path, folders):
        by_split.setdefault(split_named(folder.name) or "", []).append(folder)
    others, evaluation = by_split.pop("", []), by_split.pop("evaluation", [])
    for split in ("test", "validation"):  # whichever is free
        if evaluation and split not in by_split:
            by_split[split] = [evaluation.pop(0)]
    if "train" not in by_split:
        _refuse_splits_as_classes(top, list(map(Path, folders)))
        return {}
    for split, several in by_split.items():
        if len(several) > 1:
            names = " and ".join(f"{folder.name}/" for folder in several)
            raise ConfigError("root", top, f"one folder of {split} images", f"it has {names}")
    parts = {split: _innermost_split(several[0]) for split, several in by_split.items()}
    if not folder_content(parts["train"])[0]:
        if others and len(parts) == 1:
            return {}  # a class of trains among other classes
        raise _without_classes(top, parts["train"])
    left_out.add(*others, *evaluation, *files)
    if unusual := [
        f"{folder.relative_to(top)}/ as {split}" for split, folder in parts.items() if folder.name not in USUAL
    ]:
        log.info("dataset.root=%s: %s", top, ", ".join(unusual))
    return {parts["train"]: None} | {parts[split]: split for split in ("test", "validation") if split in parts}


def _innermost_split(folder: Path) -> Path:
    """A split's folder, or the one within that is of the same split: archives are often unpacked into a folder of their
    own name (training_set/training_set)."""
    folders, files = folder_content(folder)
    inner = Path(folders[0]) if len(folders) == 1 and not files else folder
    if inner == folder or inner.is_symlink() or split_named(inner.name) != split_named(folder.name):
        return folder
    return _innermost_split(inner)


def _refuse_splits_as_classes(top: Path, folders: Sequence[Path]) -> None:
    """Raise ConfigError where folders would be classes, and their names say that they are splits: all of them, two
    whole names, or those that hold folders rather than images."""
    said = {folder: split for folder in folders if (split := split_within(folder.name))}
    whole = [folder for folder in said if split_named(folder.name)]
    nested = [folder for folder in said if folder_content(folder)[0] and not folder_content(folder)[1]]

    def differ(some: Sequence[Path]) -> bool:
        return len({said[folder] for folder in some}) > 1

    if len(said) == len(folders) and differ(folders):
        suspects = list(folders)
    else:
        suspects = whole if differ(whole) else nested if differ(nested) else [one for one in nested if one in whole]
    if suspects:
        taken = "classes, but seem to be splits" if len(suspects) > 1 else "a class, but seems to be a split"
        names = shortened((f"{folder.name}/" for folder in suspects), NAMED)
        raise ConfigError("root", top, LAYOUTS, f"{names} would be {taken}")


def _inner_folders(paths: Sequence[str], folders: Sequence[Path]) -> set[str]:
    """The names of the folders with files that are directly in a class's folders."""
    prefixes = tuple(f"{folder}{os.sep}" for folder in folders)
    below = (path.removeprefix(prefix) for prefix in prefixes for path in paths if path.startswith(prefix))
    return {name.partition(os.sep)[0] for name in below if os.sep in name}


def _check_classes(top: Path, first: Path, inner: Mapping[str, set[str]]) -> None:
    """Raise ConfigError for class folders that seem to hold classes or splits. A single folder that several classes
    have (cat/images/, dog/images/) is neither."""
    for name, names in inner.items():
        if len(shared := names & inner.keys()) > 1:
            problem = f"{first / name} would be a class, but holds {_listed(shared)} as {first} does"
            raise ConfigError("root", top, LAYOUTS, problem)
    nested = {name: names for name, names in inner.items() if len(names) > 1}
    for (name, names), (other, others) in combinations(nested.items(), 2):
        if len(shared := names & others) > 1:
            meant = f"classes with splits in them, to be {first}/train/{name}/ and so on"
            if not any(map(split_named, shared)):
                meant = f"splits, to be named train/ and test/, with the classes {_listed(shared)}"
            problem = f"{name}/ and {other}/ would be classes, but both hold {_listed(shared)}: probably {meant}"
            raise ConfigError("root", top, LAYOUTS, problem)


def _listed(names: set[str]) -> str:
    return shortened((f"{name}/" for name in sorted(names)), NAMED)


def _too_few_classes(top: Path, first: Path, found: Mapping[str, Sequence[Path]]) -> ConfigError:
    if not found and folder_content(first)[1]:
        return _without_classes(top, first)
    expected = "two or more class folders"
    if meant := [folder for folders in found.values() for folder in folders if len(folder_content(folder)[0]) > 1]:
        expected += f"; did you mean {meant[0]}?"
    return ConfigError("root", top, expected, f"{first} has {len(found)}")


def _without_classes(top: Path, folder: Path) -> ConfigError:
    """The error for files where class folders should be."""
    names = [Path(path).name for path in folder_content(folder)[1]]
    problem = f"{folder} has no class folders"
    if names:
        problem += (
            f", only {len(names)} file{'s' * (len(names) > 1)} ({', '.join(names[:2])}{', …' * (len(names) > 2)})"
        )
    expected = f"a folder for each class ({folder}/cat/1.jpg)"
    if any(map(KAGGLE_NAME.fullmatch, names)):
        expected += ", or dataset=dogs_vs_cats for these names"
    return ConfigError("root", top, expected, problem)
