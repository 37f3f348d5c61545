"""Any class folders."""

from pathlib import Path

from kdpipe.data.dataset import Source
from kdpipe.data.decode import decoded_source, files_below, image_file

SPLIT_FOLDERS = {"test": "test", "val": "validation", "valid": "validation", "validation": "validation"}


def image_folder(root: str, image_size: int | None, on_bad_image: str, cache_dir: str) -> Source:
    """Images as uint8 [N, 3, H, W] from `root/<class>/*`, or from `root/train/<class>/*` with a `test` folder, a `val`
    folder, both or none beside it.

    Raises:
        ValueError: no such folder, no class folders, a class without images, a class that `train` does not have.
    """
    top = Path(root)
    if not top.is_dir():
        raise ValueError(f"dataset.root={root}: there is no such folder; class folders are accepted ({top}/cat/1.jpg)")
    if wrong := [name for name in _folders(top) if name.lower() in ("train", *SPLIT_FOLDERS) and not name.islower()]:
        raise ValueError(f"dataset.root={root}: the folder {wrong[0]} is accepted as {wrong[0].lower()}")
    if (top / "train").is_dir():
        parts = [top / "train", *(top / name for name in SPLIT_FOLDERS if (top / name).is_dir())]
    else:
        parts = [top]
    class_names = _folders(parts[0])
    if len(class_names) < 2:
        number = len(class_names)
        raise ValueError(f"dataset.root={root}: two or more class folders are accepted, {parts[0]} has {number}")
    files = []
    for part in parts:
        if unknown := set(_folders(part)) - set(class_names):
            raise ValueError(f"dataset.root={root}: {part} has the class {min(unknown)}, but {parts[0]} has not")
        for label, class_name in enumerate(class_names):
            found = files_below(part / class_name)
            if not found and part == parts[0]:
                raise ValueError(f"dataset.root={root}: the class folder {part / class_name} is empty")
            files += [image_file(path, top, label) for path in found]
    return decoded_source(
        files,
        tuple(class_names),
        image_size=image_size,
        on_bad_image=on_bad_image,
        cache_dir=cache_dir,
        split_of=lambda name: SPLIT_FOLDERS.get(name.split("/")[0]) if len(parts) > 1 else None,
    )


def _folders(part: Path) -> list[str]:
    return sorted(path.name for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
