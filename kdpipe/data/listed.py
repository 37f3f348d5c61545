"""Images that some container lists with their labels and splits: one order and one numbering of classes, so that the
same pixels and labels are the same data set, whatever container they came from."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kdpipe.data.dataset import Source
from kdpipe.data.decode import ImageFile, decoded_source
from kdpipe.settings.errors import ConfigError, folded, shortened
from kdpipe.settings.values import composed

log = logging.getLogger("kdpipe")

SPLITS = ("train", "test", "validation")  # in the order of class folders
AUTO = "auto"  # a column that is found by its name or its type
# What people call the column of file names, as `folded` has it.
NAME_COLUMNS = ("image", "img", "file", "filename", "filepath", "path", "imagepath", "imagename", "imageid", "id")
NO_LABEL = -1  # among whole numbers, as in torchvision and on the Hugging Face Hub
WHOLE_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Listed:
    """What a container says of an image: a class or its number, None where it has no label, one of `SPLITS`, and the
    name that images are sorted by, if it has one."""

    label: int | str | None
    split: str
    name: str | None = None


@dataclass(frozen=True)
class Arranged:
    """The images of a data set, by their positions in a list.

    Attributes:
        labelled: sorted by split, class and name, as in class folders; by split alone where images have no names.
        classes: of these.
        unlabelled: training images without a label.
    """

    labelled: list[int]
    classes: list[int]
    unlabelled: list[int]
    class_names: tuple[str, ...]


def arranged(listed: Sequence[Listed], class_names: Sequence[str] | None, key: str, value: object) -> Arranged:
    """The order of listed images, and their classes.

    Args:
        class_names: the classes in their order; None for the sorted labels. Labels that are whole numbers and no class
            names are positions in it.
        key, value: of the config, for messages.

    Raises:
        ConfigError: an unknown label, less than two classes, or a class without training images.
    """
    where = f"dataset.{key}={value}"
    labels = [None if one.label is None else composed([str(one.label)])[0] for one in listed]
    if all(label is None or WHOLE_NUMBER.fullmatch(label) for label in labels):
        labels = [None if label == str(NO_LABEL) else label for label in labels]
    names = _class_names([label for label in labels if label is not None], class_names)
    numbers = {name: number for number, name in enumerate(names)}
    if class_names is not None and not any(label in numbers for label in labels):
        numbers = {str(number): number for number in range(len(names))}
    if unknown := sorted({label for label in labels if label is not None} - numbers.keys()):
        problem = f"{where} has the label {shortened(unknown)}"
        raise ConfigError("class_names", list(names), "all labels, or a name for each number from 0", problem)
    classes = [None if label is None else numbers[label] for label in labels]
    _check_classes(listed, classes, names, key, value)
    labelled = [position for position, found in enumerate(classes) if found is not None]
    is_named = all(listed[position].name is not None for position in labelled)

    def place(position: int) -> tuple[object, ...]:
        split = SPLITS.index(listed[position].split)
        return (split, classes[position], str(listed[position].name).split("/")) if is_named else (split,)

    labelled.sort(key=place)
    without = [position for position, found in enumerate(classes) if found is None]
    unlabelled = [position for position in without if listed[position].split == "train"]
    if hidden := len(without) - len(unlabelled):
        log.warning("%s: %d validation or test images have no label and are left out", where, hidden)
    if unlabelled:
        message = "%s: %d training images have no label: they are used where there is a teacher"
        log.info(message, where, len(unlabelled))
    found = [number for position in labelled if (number := classes[position]) is not None]
    return Arranged(labelled, found, unlabelled, names)


def listed_source(
    files: Sequence[ImageFile],
    plan: Arranged,
    splits: Sequence[str],
    key: str,
    value: object,
    **how: Any,
) -> Source:
    """The source of files in the order of a plan.

    Args:
        key, value: of the config, for messages.
        how: what `decoded_source` takes: image_size, on_bad_image and cache_dir.
    """
    read: Callable[..., Source] = partial(decoded_source, **how)
    chosen = [
        _placed(files[position], label, splits[position])
        for position, label in zip(plan.labelled, plan.classes, strict=True)
    ]
    more = [files[position] for position in plan.unlabelled]
    try:
        source = read(chosen, plan.class_names)
    except ConfigError as error:
        if error.key != "root":
            raise
        raise ConfigError(key, value, error.expected, error.problem) from error
    return replace(source, more=partial(read, more, ("unlabelled",)) if more else None)


def called(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The columns that have one of these names, in the order of the names."""
    by_name: dict[str, str] = {}
    for column in columns:
        by_name.setdefault(folded(column), column)
    return [by_name[name] for name in names if name in by_name]


def usable_names(names: Sequence[str | None]) -> list[str | None]:
    """Names to sort images by; none where one is missing or two are the same."""
    return list(names) if all(names) and len(set(names)) == len(names) else [None] * len(names)


def _placed(file: ImageFile, label: int, split: str) -> ImageFile:
    """A file with its label and its split, which its name does not tell: the split is part of the stamp."""
    stamp = (*file.stamp, SPLITS.index(split))
    return replace(file, label=label, stamp=stamp, split=None if split == "train" else split)


def _class_names(labels: Sequence[str], class_names: Sequence[str] | None) -> tuple[str, ...]:
    if class_names is not None:
        if doubled := [name for name, number in Counter(class_names).items() if number > 1]:
            raise ConfigError("class_names", list(class_names), "each class once", f"{shortened(doubled)} is repeated")
        return composed(class_names)
    found = set(labels)
    if all(map(WHOLE_NUMBER.fullmatch, found)):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def _check_classes(
    listed: Sequence[Listed], classes: Sequence[int | None], names: Sequence[str], key: str, value: object
) -> None:
    """Raise ConfigError for less than two classes, and for classes without training images."""
    labelled = [(one, number) for one, number in zip(listed, classes, strict=True) if number is not None]
    if len(names) < 2:
        found = f"all of its {len(labelled)} images have the label {names[0]}" if names else "no image has a label"
        raise ConfigError(key, value, "two or more classes", found)
    trained = {number for one, number in labelled if one.split == "train"}
    if not trained:
        raise ConfigError(key, value, "training images", "all images are test or validation images")
    if missing := [number for number in range(len(names)) if number not in trained]:
        elsewhere = {one.split for one, number in labelled if number == missing[0]}
        where = f"{shortened(names[number] for number in missing)} {'have' if len(missing) > 1 else 'has'} none"
        where += f", only {' and '.join(sorted(elsewhere))} images" if elsewhere else ""
        raise ConfigError(key, value, "training images of each class", where)
