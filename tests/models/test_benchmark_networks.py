"""The networks of the benchmark of Tian et al. 2020 against published sizes and torchvision's layers; roles."""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from kdpipe.assembly.building import build
from kdpipe.losses.outputs import ROLES, Outputs
from kdpipe.models.densenet import densenet121
from kdpipe.models.mobilenetv2 import InvertedResidual, MobileNetV2
from kdpipe.models.resnet import ResNet
from kdpipe.models.student_cnn import StudentCNN
from kdpipe.models.timm import classifier as timm_classifier
from kdpipe.models.torchvision import classifier as torchvision_classifier
from kdpipe.models.vgg import VGG
from kdpipe.models.wrn import WideBlock, WideResNet
from kdpipe.settings.composition import compose_settings
from kdpipe.settings.schema import NetworkSettings
from kdpipe.training.observed import Observed

PARAMETERS = {  # with 100 classes; of the ResNets from 20 to 110 with shortcut B
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2_half": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet50_cifar": 23_705_252,
}
# Channels and sides of what each stage makes of 32×32 pixels, then the length of the embedding.
SMALL = [(16, 32), (32, 16), (64, 8)], 64
WIDE = [(32, 32), (64, 16), (128, 8)], 128
X4 = [(64, 32), (128, 16), (256, 8)], 256
SHAPES = {
    **dict.fromkeys(["resnet20", "resnet32", "resnet56", "resnet110", "wrn_16_1", "wrn_40_1"], SMALL),
    **dict.fromkeys(["wrn_16_2", "wrn_40_2"], WIDE),
    **dict.fromkeys(["resnet8x4", "resnet32x4"], X4),
    **dict.fromkeys(["vgg8", "vgg13"], ([(128, 16), (256, 8), (512, 4), (512, 4)], 512)),
    "mobilenetv2_half": ([(12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    "shufflenetv1": ([(240, 16), (480, 8), (960, 4)], 960),
    "shufflenetv2": ([(116, 16), (232, 8), (464, 4)], 1024),
    "resnet50_cifar": ([(256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
}


@cache
def network(name: str) -> nn.Module:
    """A network of conf/model for 100 classes."""
    model = compose_settings([f"model={name}"]).model
    if model.arguments.get("shortcut") == "A":
        model = NetworkSettings.model_validate({**model.plain, "shortcut": "B"})
    torch.manual_seed(0)
    return build("model", model, num_classes=100)


def observe(network: nn.Module, images: Tensor, *roles: str) -> Outputs:
    """What a network makes of images, everything that it has a role for unless roles are named."""
    observed = Observed(network, network, roles or ROLES)
    try:
        return observed(images)
    finally:
        observed.remove()


def take_over(network: nn.Module, other: nn.Module) -> None:
    """Give a network the weights of another with the same layers under other names."""
    state = other.state_dict()
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))


def unlike_new(network: nn.Module) -> nn.Module:
    """With BatchNorms that do something."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.3)
    return network


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_as_many_parameters_as_published(name: str) -> None:
    assert sum(parameter.numel() for parameter in network(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_step_on_two_images_reaches_every_parameter_and_shows_all_stages(name: str, images: Tensor) -> None:
    model = network(name).train()
    model.zero_grad()
    outputs = observe(model, images)
    shapes, embedding = SHAPES[name]
    assert outputs.logits.shape == (2, 100)
    assert [tuple(stage.shape) for stage in outputs.stages] == [(2, width, side, side) for width, side in shapes]
    assert [before.shape for before in outputs.preactivations] == [stage.shape for stage in outputs.stages]
    assert outputs.embedding.shape == (2, embedding)
    F.cross_entropy(outputs.logits, torch.tensor([3, 7])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_head_makes_the_logits_of_the_embedding(name: str, images: Tensor) -> None:
    model = network(name).eval()
    with torch.no_grad():
        outputs = observe(model, images, "embedding")
        torch.testing.assert_close(model.get_submodule(model.head_name)(outputs.embedding), outputs.logits)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "vgg8", "vgg13", "shufflenetv1", "resnet50_cifar"])
def test_a_stage_is_its_preactivation_after_a_relu(name: str, images: Tensor) -> None:
    with torch.no_grad():
        outputs = observe(network(name).eval(), images)
    for stage, before in zip(outputs.stages, outputs.preactivations, strict=True):
        assert before.min() < 0
        assert torch.equal(before.relu(), stage)


def test_a_preactivation_of_shufflenetv2_is_not_shuffled_yet(images: Tensor) -> None:
    with torch.no_grad():
        outputs = observe(network("shufflenetv2").eval(), images)
    for stage, before in zip(outputs.stages, outputs.preactivations, strict=True):
        half = before.shape[1] // 2
        assert before[:, :half].min() == 0  # what the last unit keeps
        assert before[:, half:].min() < 0  # what its convolutions make
        assert torch.equal(stage[:, 0::2], before[:, :half].relu())
        assert torch.equal(stage[:, 1::2], before[:, half:].relu())


def test_a_preactivation_of_a_wide_resnet_is_its_stage_after_the_next_batchnorm(images: Tensor) -> None:
    model = unlike_new(network("wrn_16_1")).eval()
    with torch.no_grad():
        outputs = observe(model, images)
        norms = [model.block2[0].bn1, model.block3[0].bn1, model.bn]
        for stage, before, norm in zip(outputs.stages, outputs.preactivations, norms, strict=True):
            assert stage.min() < 0
            assert torch.equal(norm(stage), before)
        assert torch.equal(outputs.preactivations[-1].relu().mean(dim=(2, 3)), outputs.embedding)


def test_mobilenetv2s_stages_end_without_a_relu(images: Tensor) -> None:
    with torch.no_grad():
        outputs = observe(network("mobilenetv2_half").eval(), images)
    for stage, before in zip(outputs.stages, outputs.preactivations, strict=True):
        assert stage.min() < 0
        assert torch.equal(before, stage)


# The same layers in torchvision


def test_shufflenetv2_is_torchvisions_with_another_beginning(images: Tensor) -> None:
    theirs = torchvision.models.shufflenet_v2_x1_0(num_classes=100)
    theirs.conv1[0] = nn.Conv2d(3, 24, kernel_size=1, bias=False)
    theirs.maxpool = nn.Identity()
    take_over(network("shufflenetv2"), unlike_new(theirs))
    with torch.no_grad():
        torch.testing.assert_close(network("shufflenetv2").eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("vgg8", [64, "M", 128, "M", 256, "M", 512, 512]),
        ("vgg13", [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, 512, 512]),
    ],
)
def test_vgg_has_torchvisions_layers(name: str, widths: list[int | str], images: Tensor) -> None:
    layers = torchvision.models.vgg.make_layers(widths, batch_norm=True)
    theirs = nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))
    take_over(network(name), unlike_new(theirs))
    with torch.no_grad():
        torch.testing.assert_close(network(name).eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(("stride", "channels"), [(1, 8), (1, 12), (2, 8)])
def test_a_block_of_mobilenetv2_is_torchvisions(stride: int, channels: int) -> None:
    theirs = unlike_new(torchvision.models.mobilenetv2.InvertedResidual(8, channels, stride, expand_ratio=6)).eval()
    ours = InvertedResidual(8, channels, stride, expansion=6).eval()
    take_over(ours, theirs)
    inputs = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs), theirs(inputs))


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 1), (6, 2)])
def test_a_block_of_a_wide_resnet_activates_before_it_convolves(channels: int, stride: int) -> None:
    block = unlike_new(WideBlock(4, channels, stride)).eval()
    inputs = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        activated = block.bn1(inputs).relu()
        inner = F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)
        outputs = F.conv2d(block.bn2(inner).relu(), block.conv2.weight, padding=1)
        # Where channels change, the shortcut starts from what is activated.
        kept = inputs if channels == 4 else F.conv2d(activated, block.shortcut.weight, stride=stride)
        torch.testing.assert_close(block(inputs), kept + outputs)


def test_a_unit_of_shufflenetv1_mixes_the_groups_of_channels(images: Tensor) -> None:
    shuffle = network("shufflenetv1").stages[0][1].layers[3]
    channels = torch.arange(12.0).reshape(1, 12, 1, 1)
    assert shuffle(channels).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


# First weights


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "vgg8", "mobilenetv2_half", "resnet50_cifar"])
def test_convolutions_start_with_the_variance_that_keeps_gradients_in_size(name: str) -> None:
    for module in fresh(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / out), rel=0.1)


@pytest.mark.parametrize("name", ["shufflenetv1", "shufflenetv2"])
def test_shufflenets_start_as_pytorch_has_it(name: str) -> None:
    for module in fresh(name).modules():
        if isinstance(module, nn.Conv2d):
            inputs = module.in_channels // module.groups * math.prod(module.kernel_size)
            assert module.weight.abs().max() <= 1 / math.sqrt(inputs)


@pytest.mark.parametrize(("name", "deviation"), [("vgg8", 0.01), ("mobilenetv2_half", 0.01), ("wrn_16_2", 0.051)])
def test_heads_start_small_and_without_a_bias(name: str, deviation: float) -> None:
    head = fresh(name).get_submodule(network(name).head_name)
    assert head.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert not head.bias.any()


def fresh(name: str) -> nn.Module:
    """A network that no other test has touched."""
    return network.__wrapped__(name)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WideResNet(18, 2, 10), "depth=18: expected 6n + 4, such as 16, 28, 40"),
        (lambda: WideResNet(4, 2, 10), "depth=4: expected 6n + 4, such as 16, 28, 40"),
        (lambda: WideResNet(16, 0, 10), "width=0: expected a whole number from 1"),
        (lambda: WideResNet(16, 1.5, 10), "width=1.5: expected a whole number from 1"),
        (lambda: VGG(16, 10), "depth=16: expected one of 8, 13"),
        (lambda: MobileNetV2(10, 0), "width=0: expected a number from 0.1"),
        (
            lambda: ResNet(20, 10, widths=[16, 32, 64]),
            "widths=[16,32,64]: expected four whole numbers from 1, such as [16,16,32,64]",
        ),
        (lambda: ResNet(20, 10, widths=64), "widths=64: expected four whole numbers from 1, such as [16,16,32,64]"),
        (lambda: ResNet(20, 10, widths=[16, 16, 32, 0]), "widths=0: expected a whole number from 1"),
    ],
)
def test_another_depth_or_width_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message


# Roles of the other networks


@pytest.mark.parametrize(
    ("build", "side", "shapes", "embedding"),
    [
        (lambda: ResNet(8, 10), 32, [(16, 32), (32, 16), (64, 8)], 64),
        (lambda: StudentCNN(10), 128, [(16, 31), (32, 7), (64, 3)], 50),
        (lambda: densenet121(10), 64, [(256, 16), (512, 8), (1024, 4), (1024, 2)], 50),
        (lambda: torchvision_classifier("densenet121", 10), 64, [(256, 16), (512, 8), (1024, 4), (1024, 2)], 1024),
        (lambda: torchvision_classifier("resnet18", 10), 64, [(64, 16), (128, 8), (256, 4), (512, 2)], 512),
        (
            lambda: torchvision_classifier("squeezenet1_1", 10, stages=["features.4", "features.7"]),
            64,
            [(128, 15), (256, 7)],
            512,
        ),
    ],
    ids=["resnet8", "student_cnn", "densenet121", "torchvision densenet121", "resnet18", "squeezenet1_1"],
)
def test_other_networks_say_what_their_stages_and_embedding_are(
    build: Callable[[], nn.Module], side: int, shapes: list[tuple[int, int]], embedding: int
) -> None:
    model = build().eval()
    with torch.no_grad():
        outputs = observe(model, torch.randn(2, 3, side, side))
    assert [tuple(stage.shape) for stage in outputs.stages] == [(2, width, size, size) for width, size in shapes]
    assert outputs.embedding.shape == (2, embedding)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvisions_resnets_show_their_stages_before_and_after_the_relu(architecture: str) -> None:
    torch.manual_seed(0)
    model = torchvision_classifier(architecture, 10).eval()
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(architecture, num_classes=10).eval()
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = observe(model, images)
        assert torch.equal(outputs.logits, theirs(images))
    for stage, before in zip(outputs.stages, outputs.preactivations, strict=True):
        assert before.min() < 0
        assert torch.equal(before.relu(), stage)


@pytest.mark.parametrize(
    ("architecture", "widths"), [("resnet10t", [64, 64, 128, 256, 512]), ("convnext_atto", [40, 80, 160, 320])]
)
def test_a_networks_stages_are_those_that_timm_takes_features_from(architecture: str, widths: list[int]) -> None:
    pytest.importorskip("timm", reason="timm is an extra (kdpipe[timm]), and not installed here")
    model = timm_classifier(architecture, 10).eval()
    with torch.no_grad():
        outputs = observe(model, torch.randn(2, 3, 64, 64))
    assert [stage.shape[1] for stage in outputs.stages] == widths
    named = timm_classifier(architecture, 10, stages=model.roles["stages"][-2:])
    assert named.roles["stages"] == model.roles["stages"][-2:]


@pytest.mark.parametrize(
    ("stages", "value"),
    [
        (["layer1", "layer5"], "[layer1,layer5]"),
        ([], "[]"),
        ("layer1", "layer1"),
        ([1], "[1]"),
        ([["fc"]], "[[fc]]"),
        (3, "3"),
    ],
)
def test_a_stage_that_a_network_lacks_is_refused(stages: object, value: str) -> None:
    with pytest.raises(ValueError) as error:
        torchvision_classifier("resnet18", 10, stages=stages)
    known = "conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, avgpool, fc"
    assert str(error.value) == f"stages={value}: expected a list of submodules' names, such as {known}"


@pytest.mark.parametrize(("stage", "given"), [("flatten", "[2, 48]"), ("unused", "NoneType"), ("pair", "tuple")])
def test_a_stage_that_gives_no_maps_is_refused_when_it_is_run(stage: str, given: str) -> None:
    class Pair(nn.Module):
        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return inputs, inputs

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.pair, self.unused = nn.Flatten(), Pair(), nn.ReLU()
            self.roles = {"stages": [stage]}

        def forward(self, images: Tensor) -> Tensor:
            return self.flatten(self.pair(images)[0])

    with pytest.raises(ValueError) as error:
        observe(Odd(), torch.zeros(2, 3, 4, 4), "stages")
    assert str(error.value) == f"model.stages: {stage} returns {given}; expected maps [N, C, H, W]"
