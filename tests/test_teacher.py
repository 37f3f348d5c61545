"""The teacher's answers: worked out once, kept, and never mistaken for others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdpipe.data import ImageDataset, split
from kdpipe.data.digits import digits
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.teacher import Teacher, outputs_key, read_outputs, teach_from_cache, write_outputs

CPU = torch.device("cpu")
FLOAT32 = torch.autocast("cpu", enabled=False)


def some_digits(**changed: float) -> ImageDataset:
    fractions = {"train_fraction": 0.2, "val_fraction": 0.1, "test_fraction": 0.25, "split_seed": 0} | changed
    return split(digits(), "digits", **fractions)


def new_teacher(seed: int = 0, image_size: int = 8, mean: float = 0.5) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(Classifier(ResNet(8, 10), image_size, [mean] * 3, [0.5] * 3))


def taught(folder: Path, teacher: Teacher, data: ImageDataset) -> Teacher:
    teach_from_cache(teacher, data, folder, CPU, FLOAT32, "float32")
    return teacher


class Runs:
    """How often a network ran."""

    def __init__(self, teacher: Teacher) -> None:
        self.images = 0
        teacher.classifier.register_forward_hook(self.count)

    def count(self, module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.images += len(output)


def test_cached_answers_are_those_of_the_network(tmp_path: Path) -> None:
    data = some_digits()
    some = data.splits["train"][torch.randperm(len(data.splits["train"]))[:50]]
    network, cached = new_teacher(), taught(tmp_path, new_teacher(), data)
    torch.testing.assert_close(cached(data.images[some], some), network(data.images[some], some))


def test_the_network_runs_over_the_training_images_once_in_all(tmp_path: Path) -> None:
    data = some_digits()
    first, second = new_teacher(), new_teacher()
    runs = [Runs(first), Runs(second)]
    for teacher in (first, second):
        taught(tmp_path, teacher, data)(data.images[data.splits["train"]], data.splits["train"])
    assert [run.images for run in runs] == [len(data.splits["train"]), 0]


def test_whatever_an_answer_depends_on_gives_another_entry() -> None:
    data = some_digits()
    positions = data.splits["train"]
    other_images = ImageDataset(
        "digits", data.images, data.labels, data.class_names, data.splits, "another fingerprint"
    )
    keys = [
        outputs_key(new_teacher(), data, positions, "float32"),
        outputs_key(new_teacher(seed=1), data, positions, "float32"),
        outputs_key(new_teacher(image_size=16), data, positions, "float32"),
        outputs_key(new_teacher(mean=0.4), data, positions, "float32"),
        outputs_key(new_teacher(), other_images, positions, "float32"),
        outputs_key(new_teacher(), data, some_digits(split_seed=1).splits["train"], "float32"),
        outputs_key(new_teacher(), data, positions, "bfloat16"),
    ]
    assert len(set(keys)) == len(keys)
    assert outputs_key(new_teacher(), data, positions, "float32") == keys[0]


@pytest.mark.parametrize("damage", ["cut off", "changed", "empty", "of another program"])
def test_a_damaged_file_is_noticed_and_worked_out_again(tmp_path: Path, damage: str) -> None:
    data = some_digits()
    right = taught(tmp_path, new_teacher(), data)(data.images, data.splits["train"])
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut off": content[:-10],
            "changed": content[:-1] + bytes([content[-1] ^ 1]),
            "empty": b"",
            "of another program": b"PK\x03\x04 no safetensors",
        }[damage]
    )
    assert read_outputs(file) is None
    again = taught(tmp_path, new_teacher(), data)(data.images, data.splits["train"])
    assert torch.equal(right, again)
    assert read_outputs(file) is not None


def test_nothing_is_kept_under_a_temporary_name(tmp_path: Path) -> None:
    write_outputs(tmp_path / "answers.safetensors", torch.zeros(2, 3))
    assert [file.name for file in tmp_path.iterdir()] == ["answers.safetensors"]
