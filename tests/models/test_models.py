"""Networks against their papers and the tutorial's sizes, preprocessing against NumPy and Pillow."""

import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from kdpipe.assembly.building import build
from kdpipe.models import Classifier, size_mb
from kdpipe.models.classifier import enlarge
from kdpipe.models.densenet import densenet121
from kdpipe.models.resnet import BasicBlock, ResNet
from kdpipe.models.student_cnn import StudentCNN
from kdpipe.models.timm import classifier as timm_classifier
from kdpipe.models.torchvision import classifier as torchvision_classifier
from kdpipe.models.weights import load_imagenet
from kdpipe.settings.errors import as_typed
from kdpipe.settings.schema import Settings
from kdpipe.training.checkpoint import copy_state

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# torchvision's own advice about GoogLeNet's and Inception's first weights.
pytestmark = pytest.mark.filterwarnings("ignore:The default weight initialization of:FutureWarning")

Photo = Callable[..., Image.Image]


def as_tensor(*images: Image.Image) -> Tensor:
    """Pictures as data sets give them: uint8 [N, C, H, W]."""
    return torch.from_numpy(np.stack([np.atleast_3d(np.array(image)).transpose(2, 0, 1) for image in images]))


def four_photos(photo: Photo, side: int) -> tuple[Tensor, Tensor]:
    labels = torch.tensor([0, 1, 0, 1])
    return as_tensor(*(photo(int(kind), number, (side, side)) for number, kind in enumerate(labels))), labels


def train_one_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Weight decay and momentum would move parameters without a gradient too.
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# The tutorial's two networks


def test_the_students_layers_are_the_tutorials() -> None:
    student = StudentCNN(10)
    assert [type(layer) for layer in student.features] == 3 * [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    linear = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in student.classifier] == linear
    convolutions = [
        (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        for layer in student.features
        if isinstance(layer, nn.Conv2d)
    ]
    assert convolutions == [
        (3, 16, (5, 5), (2, 2), (1, 1)),
        (16, 32, (5, 5), (2, 2), (1, 1)),
        (32, 64, (3, 3), (1, 1), (1, 1)),
    ]


def test_the_students_pictures_shrink_from_128_to_3_pixels() -> None:
    student = StudentCNN(10)
    values, shapes = torch.zeros(2, 3, 128, 128), []
    for layer in [*student.features, *student.classifier]:
        values = layer(values)
        if isinstance(layer, nn.MaxPool2d | nn.Linear):
            shapes.append(tuple(values.shape[1:]))
    assert shapes == [(16, 31, 31), (32, 7, 7), (64, 3, 3), (250,), (50,), (10,)]


@pytest.mark.parametrize(("build", "size"), [(StudentCNN, 0.724), (densenet121, 27.874)])
def test_sizes_are_those_that_the_tutorial_reports(build: Callable[[int], nn.Module], size: float) -> None:
    assert round(size_mb(build(10)), 3) == size


def test_size_counts_buffers_and_the_width_of_numbers() -> None:
    norm = nn.BatchNorm1d(5).half()
    # Four vectors of 5 numbers with 2 bytes each, and a counter with 8 bytes.
    assert size_mb(norm) * 2**20 == 4 * 5 * 2 + 8


def test_densenets_head_is_three_linear_layers_with_nothing_between() -> None:
    head = Classifier(densenet121(10), 128, [0, 0, 0], [1, 1, 1]).head
    assert [type(layer) for layer in head] == [nn.Linear] * 3
    assert [(layer.in_features, layer.out_features) for layer in head] == [(1024, 250), (250, 50), (50, 10)]


def test_densenet_without_its_head_is_torchvisions() -> None:
    ours, theirs = (
        {name: tensor.shape for name, tensor in network.state_dict().items() if "classifier" not in name}
        for network in (densenet121(10), torchvision.models.densenet121())
    )
    assert ours == theirs


@pytest.mark.parametrize(("name", "number"), [("deep_nn", 1_186_986), ("light_nn", 267_738)])
def test_the_pytorch_tutorial_s_networks_have_its_number_of_parameters(
    name: str, number: int, composed: Callable[..., Settings]
) -> None:
    assert parameters(build("model", composed(f"model={name}").model, num_classes=10)) == number


# The CIFAR ResNets


@pytest.mark.parametrize(
    ("depth", "millions"),
    [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")],
)
def test_resnets_have_the_papers_number_of_layers_and_parameters(depth: int, millions: str) -> None:
    network = ResNet(depth, num_classes=10)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    decimals = len(millions.partition(".")[2])
    assert f"{parameters(network) / 1e6:.{decimals}f}" == millions


def test_resnet20_with_shortcut_b_has_as_many_parameters_as_published() -> None:
    assert parameters(ResNet(20, num_classes=100, shortcut="B")) == 278_324


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_halves_the_picture_twice(shortcut: str) -> None:
    network = ResNet(8, num_classes=7, shortcut=shortcut).eval()
    shapes = []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


@pytest.mark.parametrize("size", [8, 7])
def test_shortcut_a_takes_every_second_pixel_and_puts_zeros_around_the_channels(size: int) -> None:
    inputs = torch.randn(2, 16, size, size)
    half = -(-size // 2)
    expected = torch.zeros(2, 32, half, half)
    for channel in range(16):
        for row in range(half):
            for column in range(half):
                expected[:, 8 + channel, row, column] = inputs[:, channel, 2 * row, 2 * column]
    block = BasicBlock(16, 32, stride=2, shortcut="A")
    assert torch.equal(block.skip(inputs), expected)
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(inputs), expected.relu())


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_the_shortcut_around_equal_shapes_is_the_identity(shortcut: str) -> None:
    block = BasicBlock(16, 16, stride=1, shortcut=shortcut)
    inputs = torch.rand(2, 16, 8, 8)
    assert torch.equal(block.skip(inputs), inputs)
    assert parameters(block.shortcut) == 0


@pytest.mark.parametrize("depth", [21, 22, 2, 0, -4, 20.5, 20.0, "twenty", None])
def test_another_depth_is_refused(depth: object) -> None:
    with pytest.raises(ValueError) as error:
        ResNet(depth, num_classes=10)
    assert str(error.value) == f"depth={as_typed(depth)}: expected 6n + 2, such as 20, 32, 44, 56, 110"


@pytest.mark.parametrize("shortcut", ["C", "a", None])
def test_another_shortcut_is_refused(shortcut: object) -> None:
    with pytest.raises(ValueError) as error:
        ResNet(20, num_classes=10, shortcut=shortcut)
    assert str(error.value) == f"shortcut={as_typed(shortcut)}: expected one of A, B"


# Networks of torchvision and timm


@pytest.mark.parametrize(
    ("architecture", "head_name"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("squeezenet1_1", "classifier.1"),
        ("regnet_y_400mf", "fc"),
        ("googlenet", "fc"),
    ],
)
def test_a_torchvision_network_learns(architecture: str, head_name: str, photo: Photo) -> None:
    images, labels = four_photos(photo, 64)
    network = torchvision_classifier(architecture, num_classes=2)
    assert network.head_name == head_name
    model = Classifier(network, 64, **IMAGENET)
    before = copy_state(model.head)
    train_one_step(model, images, labels)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.head.state_dict().items())
    with torch.no_grad():
        assert model.eval()(images).shape == (4, 2)


@pytest.mark.parametrize(
    ("architecture", "head_name"),
    [
        ("alexnet", "classifier.6"),
        ("convnext_tiny", "classifier.2"),
        ("efficientnet_b0", "classifier.1"),
        ("inception_v3", "fc"),
        ("shufflenet_v2_x0_5", "fc"),
        ("swin_t", "head"),
        ("vgg11_bn", "classifier.6"),
        ("vit_b_32", "heads.head"),
    ],
)
def test_other_families_have_their_last_layer_replaced(architecture: str, head_name: str) -> None:
    with torch.device("meta"):  # shapes without numbers, so that large networks cost nothing
        network = torchvision_classifier(architecture, num_classes=7)
        assert network.head_name == head_name
        assert network.get_submodule(head_name).out_features == 7
        for training in (True, False):
            assert network.train(training)(torch.zeros(2, 3, 224, 224)).shape == (2, 7)


@pytest.mark.parametrize(
    ("architecture", "near"),
    [("resnet19", "resnet18"), ("fasterrcnn_resnet50_fpn", "resnet50"), ("ResNet18", "resnet18"), ("", "")],
)
def test_an_unknown_torchvision_network_gets_the_nearest_ones(architecture: str, near: str) -> None:
    with pytest.raises(ValueError) as error:
        torchvision_classifier(architecture, num_classes=2)
    expected = r"expected a classifier of torchvision\.models, such as \w+, \w+, \w+ \(\d+ in all\)"
    near = rf"; did you mean .*\b{near}\b.*\?" if near else ""
    assert re.fullmatch(f"name={architecture}: {expected}{near}", str(error.value))


@pytest.fixture
def timm() -> object:
    return pytest.importorskip("timm", reason="timm is an extra (kdpipe[timm]), and not installed here")


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("architecture", "head_name"),
    [("resnet10t", "fc"), ("mobilenetv3_small_050", "classifier")],
)
def test_a_timm_network_learns_by_its_head_alone(architecture: str, head_name: str, photo: Photo) -> None:
    images, labels = four_photos(photo, 64)
    model = Classifier(timm_classifier(architecture, num_classes=2), 64, **IMAGENET, freeze="backbone")
    assert model.network.head_name == head_name
    before = copy_state(model)
    train_one_step(model, images, labels)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"network.{head_name}.weight", f"network.{head_name}.bias"}
    with torch.no_grad():
        assert model.eval()(images).shape == (4, 2)


@pytest.mark.usefixtures("timm")
def test_an_unknown_timm_network_gets_near_misses() -> None:
    with pytest.raises(ValueError) as error:
        timm_classifier("mobilenetv3_tiny", num_classes=2)
    assert re.fullmatch(
        r"name=mobilenetv3_tiny: expected a network of timm\.list_models\(\); did you mean .*mobile.*\?",
        str(error.value),
    )


@pytest.mark.usefixtures("timm")
def test_a_timm_network_with_two_heads_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        timm_classifier("levit_128s", num_classes=2)
    assert re.fullmatch("name=levit_128s: its heads are .*, .*; expected a network with one head", str(error.value))


def test_without_timm_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError) as error:
        timm_classifier("resnet18", num_classes=2)
    assert str(error.value) == "name=resnet18: timm is not installed; pip install 'kdpipe[timm]'"


# ImageNet weights


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> Path:
    """PyTorch's cache, empty, on a machine whose network is down: the folder of downloaded weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def file_name(architecture: str) -> str:
    """Under which torchvision looks for weights; it takes what is there without a look at its hash."""
    return torchvision.models.get_model_weights(architecture).DEFAULT.url.rpartition("/")[2]


@pytest.mark.parametrize(
    "build",
    [densenet121, partial(torchvision_classifier, "resnet18")],
    ids=["densenet121", "resnet18"],
)
def test_imagenet_weights_that_cannot_be_downloaded_are_one_clear_line(
    build: Callable[[int], nn.Module], torch_home: Path
) -> None:
    network = build(2)
    before = copy_state(network)
    with pytest.raises(ValueError) as error:
        load_imagenet("teacher.weights", network, "the network")
    message = str(error.value)
    assert message.startswith("teacher.weights=imagenet: the ImageNet weights of the network ")
    assert str(torch_home) in message
    assert message.endswith("; expected null (random weights), a file or runs:/<run id>")
    assert "\n" not in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short"])
def test_imagenet_weights_that_cannot_be_read_are_one_clear_line(content: bytes, torch_home: Path) -> None:
    (torch_home / file_name("squeezenet1_1")).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_imagenet("model.weights", torchvision_classifier("squeezenet1_1", 2), "squeezenet1_1")
    assert str(error.value).startswith("model.weights=imagenet: the ImageNet weights of squeezenet1_1 ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "num_classes"),
    [("densenet121", 2), ("densenet121", 1000), ("squeezenet1_1", 2), ("inception_v3", 2)],
)
def test_imagenet_weights_are_loaded_except_for_the_head(architecture: str, num_classes: int, torch_home: Path) -> None:
    published = torchvision.models.get_model(architecture, weights=None).state_dict()
    torch.save(published, torch_home / file_name(architecture))
    if architecture == "densenet121":
        network = densenet121(num_classes)
    else:
        network = torchvision_classifier(architecture, num_classes)
    head = network.head_name + "."
    before = copy_state(network)

    load_imagenet("model.weights", network, architecture)

    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith(head))
    backbone = [name for name in after if not name.startswith(head)]
    assert len(backbone) == len(after) - len(network.get_submodule(network.head_name).state_dict())
    assert all(torch.equal(after[name], published[name]) for name in backbone)
    # With the same head, torchvision's own pretrained network sees the same in a picture.
    theirs = torchvision.models.get_model(architecture, weights="DEFAULT").eval()
    theirs.set_submodule(network.head_name, network.get_submodule(network.head_name))
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), theirs(images))


def test_timms_imagenet_weights_are_loaded_except_for_the_head(
    timm: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub.constants", reason="timm's weights come by huggingface_hub")
    # Both are read from the environment once, at import.
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    network = timm_classifier("resnet10t", num_classes=2)
    with pytest.raises(ValueError) as error:
        load_imagenet("model.weights", network, "resnet10t")
    assert str(error.value).startswith("model.weights=imagenet: the ImageNet weights of resnet10t ")
    assert "\n" not in str(error.value)

    published = timm.create_model("resnet10t").state_dict()
    repository = tmp_path / f"models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(published, snapshot / "model.safetensors")
    head = copy_state(network.fc)
    load_imagenet("model.weights", network, "resnet10t")
    for name, tensor in network.state_dict().items():
        expected = head[name.removeprefix("fc.")] if name.startswith("fc.") else published[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(("network", "name"), [(StudentCNN(2), "student_cnn"), (ResNet(8, 2), "resnet8")])
def test_a_network_without_imagenet_weights_says_so(network: nn.Module, name: str) -> None:
    with pytest.raises(ValueError) as error:
        load_imagenet("model.weights", network, name)
    assert str(error.value).startswith(f"model.weights=imagenet: {name} has no ImageNet weights; ")


# A frozen backbone


@pytest.mark.parametrize(
    "build",
    [densenet121, partial(ResNet, 8), StudentCNN],
    ids=["densenet121", "resnet8", "student_cnn"],
)
@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_freezing_leaves_the_backbone_as_it_was_to_the_last_bit(
    build: Callable[[int], nn.Module], freeze: str, photo: Photo
) -> None:
    images, labels = four_photos(photo, 32)
    network = build(2)
    model = Classifier(network, 128 if isinstance(network, StudentCNN) else 32, **IMAGENET, freeze=freeze)
    before = copy_state(network)
    train_one_step(model, images, labels)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    head = {name for name in before if name.startswith(f"{network.head_name}.")}
    assert changed == (head if freeze == "backbone" else set(before))


def test_a_frozen_backbone_evaluates_while_its_head_trains() -> None:
    network = torchvision_classifier("mobilenet_v3_small", num_classes=2)  # has BatchNorm and dropout
    model = Classifier(network, 64, **IMAGENET, freeze="backbone")
    for _ in range(2):
        model.train()
        assert [name for name, module in network.named_modules() if module.training] == ["classifier.3"]
        model.eval()
        assert not any(module.training for module in model.modules())


def test_a_network_that_names_no_head_cannot_be_frozen() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(ValueError) as error:
        Classifier(network, 32, **IMAGENET, freeze="backbone")
    assert str(error.value) == "freeze=backbone: Sequential has no head_name; expected none"


# Preprocessing


class AsSeen(nn.Module):
    """Gives back what a network would see."""

    def forward(self, images: Tensor) -> Tensor:
        return images


def seen(images: Tensor, image_size: int, mean: list[float], std: list[float]) -> Tensor:
    return Classifier(AsSeen(), image_size, mean, std)(images)


def test_pixels_are_scaled_and_normalised_channel_by_channel(photo: Photo) -> None:
    pictures = [photo(0), photo(1)]
    pixels = np.stack([np.array(picture) for picture in pictures]) / 255
    expected = ((pixels - IMAGENET["mean"]) / IMAGENET["std"]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(seen(as_tensor(*pictures), 32, **IMAGENET), expected, atol=1e-5)


def test_without_normalisation_the_input_is_between_0_and_1(photo: Photo) -> None:
    images = as_tensor(photo(0), photo(1))
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255
    inputs = seen(images, 32, [0, 0, 0], [1, 1, 1])
    assert inputs.dtype == torch.float32
    assert (inputs.min(), inputs.max()) == (0, 1)
    np.testing.assert_allclose(inputs * 255, images, atol=1e-4)


def test_grey_pictures_are_repeated_for_every_channel(photo: Photo) -> None:
    grey = photo(1).convert("L")
    repeated = Image.merge("RGB", [grey] * 3)
    assert torch.equal(seen(as_tensor(grey), 32, **IMAGENET), seen(as_tensor(repeated), 32, **IMAGENET))


def test_a_network_of_one_channel_takes_grey_pictures(photo: Photo) -> None:
    grey = photo(1).convert("L")
    expected = (np.array(grey)[None, None] / 255 - 0.3) / 0.2
    np.testing.assert_allclose(seen(as_tensor(grey), 32, [0.3], [0.2]), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(200, 200), (20, 20), (64, 64), (90, 37), (33, 63)])
def test_pictures_are_resized_as_pillow_does(size: tuple[int, int], photo: Photo) -> None:
    pictures = [photo(kind, 3, size) for kind in (0, 1)]
    # Pillow rounds pictures of 8 bits on the way; its pictures of floats show the filter itself.
    expected = [
        [
            np.array(Image.fromarray(channel).resize((64, 64), Image.Resampling.BILINEAR))
            for channel in np.array(picture, dtype=np.float32).transpose(2, 0, 1)
        ]
        for picture in pictures
    ]
    resized = seen(as_tensor(*pictures), 64, [0, 0, 0], [1, 1, 1]) * 255
    np.testing.assert_allclose(resized, np.array(expected), atol=1e-2)


@settings(max_examples=25, deadline=None)
@given(arrays(np.uint8, (2, 3)), st.booleans(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_picture_of_one_colour_keeps_it_at_every_size(
    colours: np.ndarray, grey: bool, height: int, width: int, image_size: int
) -> None:
    images = torch.from_numpy(colours[:, :1] if grey else colours)[:, :, None, None]
    inputs = seen(images.expand(-1, -1, height, width), image_size, [0, 0, 0], [1, 1, 1])
    assert inputs.shape == (2, 3, image_size, image_size)
    torch.testing.assert_close(inputs, (images / 255).expand_as(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_of_other_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError) as error:
        seen(torch.zeros(1, channels, 32, 32, dtype=torch.uint8), 32, **IMAGENET)
    said = "; expected 3 or 1" if channels == 2 else ", the last of which does not say where a photo is"
    assert str(error.value) == f"images have {channels} channels{said}"


def test_pictures_are_left_as_they_were(photo: Photo) -> None:
    images = as_tensor(photo(0))
    before = images.clone()
    seen(images, 16, **IMAGENET)
    assert torch.equal(images, before)


def test_preprocessing_is_not_among_the_weights() -> None:
    model = Classifier(ResNet(8, 2), 32, **IMAGENET)
    assert set(model.state_dict()) == {f"network.{name}" for name in model.network.state_dict()}


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("image_size", 0, "a whole number from 1"),
        ("image_size", 32.5, "a whole number from 1"),
        ("image_size", "32", "a whole number from 1"),
        ("freeze", "head", "one of none, backbone"),
        ("freeze", True, "one of none, backbone"),
    ],
)
def test_a_bad_setting_is_refused_by_name(setting: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        Classifier(ResNet(8, 2), **{"image_size": 32, **IMAGENET, setting: value})
    assert str(error.value) == f"{setting}={as_typed(value)}: expected {expected}"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("std", [1, 1], "std=[1,1]: expected as many values as in mean=[0.485,0.456,0.406]"),
        ("std", [1, 1, 0], "std=0: expected a number above 0"),
        ("std", [1, 1, -1], "std=-1: expected a number above 0"),
        ("std", [1, 1, "abc"], "std=abc: expected a number above 0"),
        ("std", [1, 1, math.nan], "std=nan: expected a number above 0"),
        ("std", 1, "std=1: expected a list of numbers above 0"),
        ("mean", [0, 0, "abc"], "mean=abc: expected a number"),
        ("mean", [0, 0, math.nan], "mean=nan: expected a number"),
        ("mean", 0.5, "mean=0.5: expected a list of numbers"),
        ("mean", None, "mean=null: expected a list of numbers"),
    ],
)
def test_a_bad_mean_or_std_is_refused_by_name(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Classifier(ResNet(8, 2), **{"image_size": 32, **IMAGENET, setting: value})
    assert str(error.value) == message


@given(
    shape=st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 20)] * 2),
    larger=st.integers(0, 30),
)
def test_enlarging_is_bilinear_interpolation(shape: tuple[int, int, int, int], larger: int) -> None:
    pixels = torch.rand(shape, generator=torch.manual_seed(0))
    size = max(shape[2:]) + larger
    expected = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(enlarge(pixels, size), expected, rtol=1e-4, atol=1e-5)
