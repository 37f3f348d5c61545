"""Any class folders."""

from pathlib import Path

from kdpipe.data.dataset import Source
from kdpipe.data.decode import ImageSize, OnBadImage, decoded_source, files_below, image_file
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import checked

SPLIT_FOLDERS = {"test": "test", "val": "validation", "valid": "validation", "validation": "validation"}


@checked
def image_folder(root: str, image_size: ImageSize | None, on_bad_image: OnBadImage, cache_dir: str) -> Source:
    """Images as uint8 [N, 3, H, W] from `root/<class>/*`, or from `root/train/<class>/*` with a `test` folder, a `val`
    folder, both or neither next to it. Raises ConfigError for other folders, a class without images, and a class that
    `train` does not have."""
    top = Path(root)
    if not top.is_dir():
        raise ConfigError("root", root, f"a folder with class folders ({top}/cat/1.jpg)", "no such folder")
    if wrong := [name for name in _folders(top) if name.lower() in ("train", *SPLIT_FOLDERS) and not name.islower()]:
        raise ConfigError("root", root, wrong[0].lower(), f"it has a folder {wrong[0]}")
    first, parts = top, {}
    if (top / "train").is_dir():
        first = top / "train"
        parts = {top / name: part for name, part in SPLIT_FOLDERS.items() if (top / name).is_dir()}
    class_names = _folders(first)
    if len(class_names) < 2:
        raise ConfigError("root", root, "two or more class folders", f"{first} has {len(class_names)}")
    files = []
    for part in (first, *parts):
        if unknown := set(_folders(part)) - set(class_names):
            raise ConfigError("root", root, problem=f"{part} has a class {min(unknown)}, but {first} does not")
        for label, class_name in enumerate(class_names):
            found = files_below(part / class_name)
            if not found and part == first:
                raise ConfigError("root", root, problem=f"the class folder {part / class_name} is empty")
            files += [image_file(path, top, label, parts.get(part)) for path in found]
    return decoded_source(files, tuple(class_names), image_size, on_bad_image, cache_dir)


def _folders(part: Path) -> list[str]:
    return sorted(path.name for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
