"""Folders of images as people have them: which files are read, which are left behind by systems, which folders are
splits."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from kdpipe.settings.errors import ConfigError, shortened
from kdpipe.settings.values import composed

log = logging.getLogger("kdpipe")

# What operating systems, network drives, archives and tools keep beside files, in lower case; so are all names that
# begin with a dot.
LEFT_BY_SYSTEMS = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler"),  # Windows
        *("system volume information", "icon\r", "__macosx", "network trash folder", "temporary items"),  # and macOS
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),  # Synology and QNAP
        *("lost+found", "__pycache__"),
    }
)
STREAM = ":zone.identifier"  # ends the names of files that came from Windows

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev", "devel", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "holdout"), "test"),
    **dict.fromkeys(("eval", "evaluate", "evaluation"), "evaluation"),  # of either kind
}
SPLIT_NAME = re.compile(
    rf"({'|'.join(SPLIT_WORDS)})[ _.-]*(set|data|dataset|split|folder|images?|imgs?|photos?|pictures?)?"
)
NAMED = 5  # files and folders in one message


def is_left_by_system(name: str) -> bool:
    """Whether a system or a tool has left a file or folder of this name behind."""
    lower = name.lower()
    return name.startswith(".") or lower in LEFT_BY_SYSTEMS or lower.endswith(STREAM)


def is_output_folder(folder: str) -> bool:
    """Whether a folder is the `output_dir` of earlier runs, which holds pictures of its own."""
    path = Path(folder)
    return (path / "mlflow.db").is_file() or any((path / "runs").glob("*/kdpipe.log"))


def split_named(name: str) -> str | None:
    """The split that a folder's whole name stands for: "train", "validation", "test", or "evaluation", which may be
    either of the last two; None for any other name."""
    match = SPLIT_NAME.fullmatch(name.lower())
    return SPLIT_WORDS[match[1]] if match else None


def split_within(name: str) -> str | None:
    """The same for a name that only contains such a word, as seg_train and catsTest do."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return split_named(name) or next(filter(None, map(split_named, words)), None)


class LeftOut:
    """What is not read below a data set's folder, so that it can be named."""

    def __init__(self, key: str, root: Path) -> None:
        self.key, self.root = key, root
        self.remains: set[str] = set()  # paths of what systems left
        self.others: dict[str, str] = {}  # paths of the rest, with a note or ""

    def add(self, *paths: str | Path, note: str = "") -> None:
        self.others |= {str(path): note for path in paths}

    def report(self) -> None:
        """Name it in a line, as a warning where it may have been meant to be read."""
        if self.others:
            named = shortened(map(self._described, sorted(self.others)), NAMED)
            log.warning("%s=%s: not read: %s", self.key, self.root, named)
        if self.remains:
            counts = sorted(Counter(Path(path).name for path in self.remains).items())
            found = [f"{name} ({number}×)" if number > 1 else name for name, number in counts]
            log.info("%s=%s: left by systems and tools, not read: %s", self.key, self.root, shortened(found, NAMED))

    def _described(self, path: str) -> str:
        name = os.path.relpath(path, self.root) + ("/" if Path(path).is_dir() else "")
        return f"{name} ({self.others[path]})" if self.others[path] else name


def folder_content(folder: Path | str, left_out: LeftOut | None = None) -> tuple[list[str], list[str]]:
    """The paths of the folders and of everything else in a folder, sorted, without what systems leave and our own
    outputs. A link that leads nowhere counts as a file."""
    folders, others = [], []
    with os.scandir(folder) as found:  # tells files from folders without asking the file system again
        for item in found:
            if is_left_by_system(item.name):
                if left_out:
                    left_out.remains.add(item.path)
            elif not _is_folder(item):
                others.append(item.path)
            elif is_output_folder(item.path):
                if left_out:
                    left_out.add(item.path, note="outputs of kdpipe")
            else:
                folders.append(item.path)
    return sorted(folders), sorted(others)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        if item.is_symlink():
            return False
        raise


def refuse_broken_links(paths: Iterable[str]) -> None:
    """Raise ConfigError for a link that leads nowhere, where it may have been a class or a split."""
    for path in map(Path, paths):
        if path.is_symlink() and not path.exists():
            problem = f"{path} is a link to {path.readlink()}, which does not exist; repair or remove it"
            raise ConfigError("root", problem=problem)


def class_folders(part: Path, left_out: LeftOut | None = None) -> dict[str, list[Path]]:
    """The folders in `part` by the class that each holds, sorted by its `composed` name. Raises ConfigError for a link
    that leads nowhere."""
    folders, others = folder_content(part, left_out)
    refuse_broken_links(others)
    if left_out and folders:
        left_out.add(*others)
    elif left_out:
        left_out.add(part, note="it has no class folders")
    classes: dict[str, list[Path]] = {}
    paths = list(map(Path, folders))
    for path, name in zip(paths, composed(path.name for path in paths), strict=True):
        classes.setdefault(name, []).append(path)
    return dict(sorted(classes.items()))


def files_below(root: Path, left_out: LeftOut | None = None) -> list[str]:
    """Everything below `root` that is no folder, sorted, links that lead nowhere included, but not what systems leave
    behind. Raises ConfigError for a link to a folder that was read already (such links can make endlessly many files),
    and for a name that is not valid text."""
    if not root.is_dir():
        return []
    found = sorted(_paths_below(root, set(), left_out), key=lambda path: path.split(os.sep))  # noqa: PTH206 - for speed
    if wrong := [path for path in found if path.encode(errors="ignore").decode() != path]:
        raise ConfigError("root", expected="file names in UTF-8", problem=f"{wrong[0]!a} is not")
    return found


def _paths_below(folder: Path | str, seen: set[str], left_out: LeftOut | None) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in seen:
        raise ConfigError("root", problem=f"{folder} is a link to a folder that was read already, {real}; remove it")
    seen.add(real)
    folders, others = folder_content(folder, left_out)
    yield from others
    for inner in folders:
        yield from _paths_below(inner, seen, left_out)
