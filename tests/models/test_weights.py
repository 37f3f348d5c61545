"""Weights in files: what is read, what is refused and how; nothing is loaded in part."""

import os
import pickle
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.models.student_cnn import StudentCNN
from kdpipe.models.weights import (
    State,
    check_class_names,
    load_imagenet,
    load_state,
    read_weights,
    save_weights,
    weights_digest,
)
from kdpipe.settings.errors import ConfigError
from kdpipe.training.checkpoint import copy_state

# PyTorch's warning about pickles that are not its own, before it refuses them.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")

CLASSES = ["cat", "dog"]
NOT_READABLE = "not readable ("
# Each example writes the same file anew, so that one folder serves all of them.
any_content = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def small_network(num_classes: int = 2, depth: int = 8) -> ResNet:
    """One whose BatchNorm has seen images."""
    network = ResNet(depth, num_classes)
    network(torch.rand(4, 3, 8, 8))
    return network


def load(file: Path, network: nn.Module, classes: Sequence[str] = CLASSES) -> None:
    """As a run does it for `model.weights=FILE`."""
    state, class_names = read_weights("model.weights", file)
    check_class_names("model.weights", str(file), class_names, classes)
    load_state("model.weights", str(file), network, state, "resnet8", len(classes))


def refusal(file: Path, classes: Sequence[str] = CLASSES) -> str:
    """The message about a file, after its key and name; the network has to stay unchanged."""
    network = small_network(len(classes))
    before = copy_state(network)
    with pytest.raises(ValueError) as error:
        load(file, network, classes)
    assert same(network.state_dict(), before)
    message = str(error.value)
    assert message.startswith(f"model.weights={file}: ")
    assert "\n" not in message
    return message.removeprefix(f"model.weights={file}: ")


def same(one: State, other: State) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def write(name: str, folder: Path) -> Path:
    """A good file in the format of its name: safetensors, zip (.pt), what came before zip (.th)."""
    file = folder / name
    if file.suffix == ".safetensors":
        save_weights(small_network(), file, CLASSES)
    else:
        state = small_network().state_dict()
        torch.save(state, file, _use_new_zipfile_serialization=file.suffix == ".pt")
    return file


FORMATS = pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.th"])


# What is read


@pytest.mark.parametrize("classes", [["cat", "dog"], ["dog", "cat"], ["Kätzchen", '犬 "inu"'], ["10", "9"]])
def test_safetensors_keep_weights_and_class_names(classes: list[str], tmp_path: Path) -> None:
    network, other = small_network(), ResNet(8, 2)
    file = tmp_path / "weights.safetensors"
    save_weights(network, file, classes)
    assert read_weights("model.weights", file)[1] == classes
    load(file, other, classes)
    assert same(other.state_dict(), network.state_dict())
    assert list(tmp_path.iterdir()) == [file]


def test_a_saved_file_replaces_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_weights(small_network(), file, CLASSES)
    network = small_network()
    save_weights(network, file, CLASSES)
    assert same(read_weights("model.weights", file)[0], network.state_dict())


def test_channels_last_weights_are_saved_unchanged(tmp_path: Path) -> None:
    network = StudentCNN(2).to(memory_format=torch.channels_last)
    save_weights(network, tmp_path / "weights.safetensors", CLASSES)
    assert same(read_weights("model.weights", tmp_path / "weights.safetensors")[0], network.state_dict())


def test_safetensors_of_others_come_without_class_names(tmp_path: Path) -> None:
    network, other = small_network(), ResNet(8, 2)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    load(tmp_path / "weights.safetensors", other, ["other", "names"])
    assert same(other.state_dict(), network.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 7, "best_prec1": 93.6},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "module.", "state_dict of module."],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read(wrap: Callable[[State], object], zipped: bool, tmp_path: Path) -> None:
    network, other = small_network(), ResNet(8, 2)
    file = tmp_path / "weights.pt"
    torch.save(wrap(network.state_dict()), file, _use_new_zipfile_serialization=zipped)
    load(file, other, ["any", "names"])
    assert same(other.state_dict(), network.state_dict())


def test_files_from_before_batch_norm_counted_are_read(tmp_path: Path) -> None:
    network, other = small_network(), ResNet(8, 2)
    state = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pt")
    load(tmp_path / "weights.pt", other)
    assert same({name: other.state_dict()[name] for name in state}, state)


def test_the_published_resnet56_is_loaded_unchanged(shared_data: Path) -> None:
    network = ResNet(56, num_classes=10)
    file = shared_data / "resnet56-4bfd9763.th"
    load(file, network, "0123456789")
    published = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    ours = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    assert same({name: ours[name] for name in published}, published)
    assert all(name.endswith("num_batches_tracked") for name in set(ours) - set(published))


def test_the_published_resnet56_knows_an_airplane(shared_data: Path) -> None:
    """Weights, shortcuts and preprocessing together: 88.9 % of these files are recognised, by chance 10 %."""
    images = []
    with tarfile.open(shared_data / "cifar10-jpeg.tar.gz", mode="r|gz") as archive:
        for member in archive:
            if "train/airplane/" in member.name and member.isfile():
                images.append(np.array(Image.open(archive.extractfile(member))).transpose(2, 0, 1))
            if len(images) == 64:
                break
    network = ResNet(56, num_classes=10)
    load(shared_data / "resnet56-4bfd9763.th", network, "0123456789")
    model = Classifier(network, 32, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]).eval()
    with torch.no_grad():
        predicted = model(torch.from_numpy(np.stack(images))).argmax(dim=1)
    assert (predicted == 0).float().mean() > 0.75


# What is refused: files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for file in (tmp_path / "nothing.pt", tmp_path / "nothing.safetensors", tmp_path):
        assert refusal(file) == "file not found"


def test_the_key_is_the_one_that_the_file_was_given_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^teacher\.weights=nothing\.pt: "):
        read_weights("teacher.weights", Path("nothing.pt"))


@FORMATS
def test_an_empty_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert refusal(tmp_path / name)


@FORMATS
@any_content
@example(content=b"<html><body>404</body></html>")
@example(content=b"PK\x03\x04" + bytes(26))
@example(content=b"a")
@example(content=b"\x80\x02]")
@given(content=st.binary(min_size=1, max_size=200))
def test_a_file_of_anything_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name)


@FORMATS
@any_content
@example(end=-1)
@example(end=100_000)
@given(end=st.integers(-8000, 8000))
def test_a_truncated_file_is_named(name: str, end: int, tmp_path: Path) -> None:
    file = write(name, tmp_path)
    file.write_bytes(file.read_bytes()[:end])
    assert refusal(file)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # which would help
    proof = tmp_path / "code was run"

    class RunsCode:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(proof),)

    harmful = pickle.dumps({"conv1.weight": RunsCode()}, protocol=2)
    pickle.loads(harmful)
    proof.rmdir()  # so it does run where it is let

    (tmp_path / "pickle.pt").write_bytes(harmful)
    torch.save({"state_dict": {"conv1.weight": RunsCode()}}, tmp_path / "zip.pt")
    torch.save({"model": RunsCode()}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:  # as PyTorch 0.1 saved
        for name in ("pickle", "tensors", "storages"):
            (tmp_path / name).write_bytes(harmful)
            archive.add(tmp_path / name, name)
    (tmp_path / "renamed.safetensors").write_bytes(harmful)
    for name in ("pickle.pt", "zip.pt", "legacy.pt", "tar.pt"):
        assert refusal(tmp_path / name).startswith(NOT_READABLE)
    assert refusal(tmp_path / "renamed.safetensors").startswith("not a readable safetensors file")
    assert not proof.exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_file_is_refused_before_it_is_unpacked(compression: int, tmp_path: Path) -> None:
    torch.save({"linear.weight": torch.zeros(2_500_000)}, tmp_path / "large.pt")
    with (
        zipfile.ZipFile(tmp_path / "large.pt") as large,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", compression) as bomb,
    ):
        for name in large.namelist():
            bomb.writestr(name, large.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    assert "is compressed, which torch.save never does" in refusal(tmp_path / "bomb.pt")


def test_members_that_claim_to_be_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    content = bytearray(write("weights.pt", tmp_path).read_bytes())
    place = content.rindex(b"PK\x01\x02")  # of the last member in the archive's directory
    content[place + 20 : place + 28] = 2 * (2**30).to_bytes(4, "little")  # both of its sizes
    (tmp_path / "weights.pt").write_bytes(content)
    assert "its members claim to be larger than the file" in refusal(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        torch.empty(10**9, device="meta"),
    ],
    ids=["sparse", "quantised", "meta"],
)
def test_a_tensor_that_no_network_has_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"linear.weight": tensor}, tmp_path / "weights.pt")
    said = refusal(tmp_path / "weights.pt")
    assert said.startswith("its keys are linear.weight, none with a state dict;") and "expected a state dict" in said


def test_class_names_that_are_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(small_network().state_dict(), file, metadata={"class_names": "[" * 100_000})
    assert refusal(file).startswith("not a readable safetensors file")


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(small_network(), tmp_path / "network.pt")
    assert refusal(tmp_path / "network.pt").startswith(
        "it has a whole kdpipe.models.resnet.ResNet, whose code is not run"
    )


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], torch.zeros(2), 5, "weights", {"state_dict": [1]}, {"a": 1}, {0: torch.zeros(2)}],
    ids=["list", "tensor", "number", "text", "list inside", "named numbers", "numbered tensors"],
)
def test_a_file_that_holds_something_else_is_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    said = refusal(tmp_path / "weights.pt")
    keys = ", ".join(map(str, content)) if isinstance(content, dict) else ""
    assert said.startswith(f"its keys are {keys}, none with " if keys else "the file holds something else;")
    assert said.endswith("; expected a state dict")


@pytest.mark.parametrize("class_names", ["[", "5", '{"cat": 0}', "[1, 2]"])
def test_class_names_that_cannot_be_read_are_refused(class_names: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(small_network().state_dict(), file, metadata={"class_names": class_names})
    assert refusal(file)


def test_the_two_formats_are_not_taken_for_each_other(tmp_path: Path) -> None:
    write("weights.pt", tmp_path).rename(tmp_path / "zip.safetensors")
    assert refusal(tmp_path / "zip.safetensors").startswith("not a readable safetensors file")
    write("weights.safetensors", tmp_path).rename(tmp_path / "safetensors.pt")
    assert refusal(tmp_path / "safetensors.pt").startswith(NOT_READABLE)


# What is refused: weights of something else


def test_weights_of_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    torch.save(small_network(num_classes=10).state_dict(), tmp_path / "weights.pt")
    assert refusal(tmp_path / "weights.pt") == (
        "linear.weight has shape [10, 64] instead of [2, 64]; linear.bias has shape [10] instead of [2]; "
        "expected weights of resnet8 with 2 classes"
    )


def test_weights_of_a_deeper_network_are_refused(tmp_path: Path) -> None:
    deeper = small_network(depth=14)
    torch.save(deeper.state_dict(), tmp_path / "weights.pt")
    unknown = [name for name in deeper.state_dict() if ".1." in name]
    assert refusal(tmp_path / "weights.pt") == (
        f"{len(unknown)} unknown, such as {unknown[0]}; expected weights of resnet8 with 2 classes"
    )


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    save_weights(StudentCNN(2), tmp_path / "weights.safetensors", CLASSES)
    message = refusal(tmp_path / "weights.safetensors")
    assert message.endswith("; expected weights of resnet8 with 2 classes")
    assert "missing, such as conv1.weight" in message
    assert "12 unknown, such as " in message


@pytest.mark.parametrize("lost", ["conv1.weight", "bn1.running_var", "linear.bias"])
def test_one_lost_tensor_is_noticed(lost: str, tmp_path: Path) -> None:
    state = small_network().state_dict()
    del state[lost]
    torch.save(state, tmp_path / "weights.pt")
    assert refusal(tmp_path / "weights.pt").startswith(f"1 missing, such as {lost}; ")


def test_one_tensor_too_many_is_noticed(tmp_path: Path) -> None:
    torch.save({**small_network().state_dict(), "linear.scale": torch.ones(2)}, tmp_path / "weights.pt")
    assert refusal(tmp_path / "weights.pt").startswith("1 unknown, such as linear.scale; ")


def test_an_empty_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "weights.pt")
    assert "missing, such as conv1.weight" in refusal(tmp_path / "weights.pt")


def test_class_names_may_be_in_another_form_of_unicode() -> None:
    mac = [unicodedata.normalize("NFD", name) for name in ("bébé", "dog")]
    check_class_names("teacher.weights", "teacher.safetensors", mac, ("bébé", "dog"))
    with pytest.raises(ValueError, match="trained on 2 classes"):
        check_class_names("teacher.weights", "teacher.safetensors", mac, ("bebe", "dog"))


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (["dog", "cat"], ": the same in another order, class 1 is cat there and dog here; 2 (dog, cat)"),
        (["cat", "fish"], ": class 2 is dog there and fish here; 2 (cat, fish)"),
        (["cat", "dog", "elk", "fox"], "; 4 (cat, dog, elk and 1 more)"),
    ],
)
def test_class_names_that_differ_are_refused(classes: list[str], named: str, tmp_path: Path) -> None:
    file = write("weights.safetensors", tmp_path)
    difference, _, expected = named.partition("; ")
    said = f"trained on 2 classes (cat, dog){difference}; expected the data set's {expected}"
    assert refusal(file, classes) == said


def test_long_lists_of_classes_show_where_they_differ(tmp_path: Path) -> None:
    digits = list("0123456789")
    with pytest.raises(ConfigError, match=r"the same in another order, class 9 is 8 there and 9 here;"):
        check_class_names("teacher.weights", "runs:/a", digits, [*digits[:8], "9", "8"])


def test_a_class_in_another_form_of_unicode_is_not_the_first_that_differs() -> None:
    there = [unicodedata.normalize("NFD", "bébé"), "cat"]
    with pytest.raises(ConfigError, match=r": class 2 is cat there and dog here;"):
        check_class_names("teacher.weights", "runs:/a", there, ["bébé", "dog"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float, tmp_path: Path) -> None:
    state = small_network().state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, :2] = value
    torch.save(state, tmp_path / "weights.pt")
    said = refusal(tmp_path / "weights.pt")
    assert said.startswith("2 of 2,304 numbers in layer1.0.conv1.weight are NaN or infinite; expected weights of a ")


# What stands for the weights


def test_a_digest_is_16_hex_digits_that_survive_a_file(tmp_path: Path) -> None:
    network, other = small_network(), ResNet(8, 2)
    digest = weights_digest(network)
    assert len(digest) == 16 and set(digest) <= set("0123456789abcdef")
    assert weights_digest(other) != digest
    save_weights(network, tmp_path / "weights.safetensors", CLASSES)
    load(tmp_path / "weights.safetensors", other)
    assert weights_digest(other) == digest


def test_a_digest_does_not_depend_on_how_the_network_is_used() -> None:
    network = StudentCNN(2)
    digest = weights_digest(network)
    assert weights_digest(network.eval().requires_grad_(False)) == digest
    assert weights_digest(network.to(memory_format=torch.channels_last)) == digest


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_digest_changes_with_any_single_number(data: st.DataObject) -> None:
    network = small_network()
    digest = weights_digest(network)
    tensor = network.state_dict()[data.draw(st.sampled_from(sorted(network.state_dict())))].view(-1)
    place = data.draw(st.integers(0, len(tensor) - 1))
    before = tensor[place].clone()
    whole = tensor.dtype == torch.int64
    tensor[place] = before + 1 if whole else torch.nextafter(before, torch.tensor(torch.inf))
    assert weights_digest(network) != digest
    tensor[place] = before
    assert weights_digest(network) == digest


def test_a_digest_changes_where_two_tensors_change_places() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    digest = weights_digest(network)
    assert weights_digest(nn.Sequential(network[1], network[0])) != digest


def test_a_digest_changes_with_the_names_of_tensors() -> None:
    layer = nn.Linear(3, 3)
    assert weights_digest(nn.ModuleDict({"head": layer})) != weights_digest(nn.ModuleDict({"tail": layer}))


def test_pretrained_weights_that_a_library_loads_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    file = tmp_path / "whole network.pt"
    torch.save(nn.Linear(1, 1), file)
    network = nn.Linear(1, 1)
    network.imagenet_weights = lambda: torch.load(file, weights_only=False)
    with pytest.raises(ConfigError, match="Weights only load failed"):
        load_imagenet("model.weights", network, "theirs")
