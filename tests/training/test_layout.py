"""The axes of feature maps: found by trying other sizes of images, against what the libraries themselves return."""

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import some_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdpipe.assembly.objectives import build_loss, fit_loss
from kdpipe.assembly.parts import _inputs_digest
from kdpipe.losses import attention
from kdpipe.losses.outputs import Outputs
from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.models.timm import classifier as timm_classifier
from kdpipe.models.torchvision import classifier as torchvision_classifier
from kdpipe.settings.schema import Settings
from kdpipe.training.layout import axes_from_shapes
from kdpipe.training.observed import Observed
from kdpipe.training.teacher import FrozenTeacher

METHODS = ["hint", "attention", "similarity", "rkd", "pkt", "vid", "correlation", "crd", "reviewkd"]


@pytest.fixture
def timm() -> None:
    pytest.importorskip("timm", reason="timm is an extra (kdpipe[timm]), and not installed here")


@torch.no_grad()
def observed(network: nn.Module, images: Tensor, *roles: str) -> Outputs:
    return Observed(network.eval(), network, roles or ("stages",))(images)


class ChannelsLast(nn.Module):
    """Two stages [N, H, W, C], and logits from the maps of the last one.

    Args:
        side: of the images, if it takes no others.
        layout: what it says about its maps.
    """

    def __init__(self, side: int | None = None, layout: str | None = "NCHW", classes: int = 10) -> None:
        super().__init__()
        self.side = side
        self.first, self.second = nn.Linear(3 * 4, 8), nn.Linear(8 * 4, 4)
        self.pool = nn.Identity()
        self.head = nn.Linear(4, classes)
        self.head_name = "head"
        self.roles = {"stages": ["first", "second"], "embedding": "pool", "layout": layout}

    def forward(self, images: Tensor) -> Tensor:
        assert self.side in (None, images.shape[2]) and self.side in (None, images.shape[3])
        maps = images.permute(0, 2, 3, 1)
        for layer in (self.first, self.second):
            count, height, width, channels = maps.shape
            pieces = maps.reshape(count, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
            maps = layer(pieces.reshape(count, height // 2, width // 2, 4 * channels)).relu()
        return self.head(self.pool(maps).mean(dim=(1, 2)))


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("architecture", "side"),
    [
        ("swin_tiny_patch4_window7_224", 224),  # takes 224 pixels only
        ("swinv2_cr_tiny_ns_224", 224),  # the same, and its maps are [N, C, H, W]
        ("swinv2_tiny_window8_256", 256),
        ("mambaout_femto", 64),
        ("sequencer2d_s", 14),
        ("convnext_atto", 64),
        ("resnet10t", 64),
    ],
)
def test_timms_maps_have_their_channels_first(architecture: str, side: int) -> None:
    with torch.device("meta"):  # shapes only
        network = timm_classifier(architecture, 10)
        stages = observed(network, torch.zeros(2, 3, side, side)).stages
    assert [maps.shape[1] for maps in stages] == [info["num_chs"] for info in network.feature_info]
    assert all(maps.shape[2] == maps.shape[3] < side for maps in stages)


@pytest.mark.usefixtures("timm")
def test_maps_are_those_that_timm_itself_gives_with_channels_first() -> None:
    network, images = timm_classifier("mambaout_femto", 10).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    for ours, theirs in zip(observed(network, images).stages, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("timm")
def test_a_submodule_with_channels_first_inside_a_network_with_channels_last() -> None:
    with torch.device("meta"):
        network = timm_classifier("swin_tiny_patch4_window7_224", 10, ["patch_embed.proj", "patch_embed"])
        seen = Observed(network.eval(), network, ["stages"])
        stages = seen(torch.zeros(2, 3, 224, 224)).stages
    assert [tuple(maps.shape) for maps in stages] == [(2, 96, 56, 56)] * 2
    assert seen.places == {"stages": ["patch_embed.proj", "patch_embed (0, 3, 1, 2)"]}


@pytest.mark.parametrize("architecture", ["swin_t", "swin_v2_t", "convnext_tiny"])
def test_torchvisions_maps_have_their_channels_first(architecture: str) -> None:
    with torch.device("meta"):
        network = torchvision_classifier(architecture, 10, stages=["features.1", "features.7"])
        stages = observed(network, torch.zeros(2, 3, 64, 64)).stages
    assert [tuple(maps.shape) for maps in stages] == [(2, 96, 16, 16), (2, 768, 2, 2)]


def test_maps_with_as_many_channels_as_rows_are_told_apart() -> None:
    network = ChannelsLast()
    stages = observed(network, torch.randn(2, 3, 16, 16)).stages
    assert [tuple(maps.shape) for maps in stages] == [(2, 8, 8, 8), (2, 4, 4, 4)]
    image = torch.zeros(1, 3, 16, 16)
    image[..., 2 * 4 :] = 1  # the right half
    left, right = observed(network, image).stages[0].chunk(2, dim=3)
    assert torch.equal(left, left[..., :1].expand_as(left))
    assert not torch.equal(left, right)


def test_an_embedding_is_the_mean_over_positions() -> None:
    network, images = ChannelsLast(), torch.randn(2, 3, 16, 16)
    outputs = observed(network, images, "stages", "embedding")
    torch.testing.assert_close(outputs.embedding, outputs.stages[-1].relu().mean(dim=(2, 3)))
    network.roles["embedding"] = "head"
    torch.testing.assert_close(observed(network, images, "embedding").embedding, outputs.embedding)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", None])
def test_a_network_for_one_size_of_images_is_believed_if_it_says_its_layout(layout: str | None) -> None:
    network, images = ChannelsLast(side=16, layout=layout), torch.randn(2, 3, 16, 16)
    if layout is None:
        with pytest.raises(ValueError) as error:
            observed(network, images)
        said = (
            "first returns [2, 8, 8, 8], and which axes are its height and width cannot be tried: it takes images of "
        )
        assert str(error.value) == f"model.stages: {said}one size; expected maps [N, C, H, W]"
    else:
        with torch.no_grad():
            maps = network.first(torch.zeros(2, 8, 8, 12)).relu()
        axes = (0, 3, 1, 2) if layout == "NHWC" else (0, 1, 2, 3)
        assert observed(network, torch.zeros(2, 3, 16, 16)).stages[0].stride() == maps.permute(axes).stride()


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("build", "stage", "said"),
    [
        (lambda stages: timm_classifier("deit_tiny_patch16_224", 10, stages), "blocks.3", "[2, 197, 192], a sequence"),
        (lambda stages: torchvision_classifier("vit_b_16", 10, stages), "encoder.layers.encoder_layer_0", "[2, 197"),
    ],
)
def test_tokens_are_no_maps(build: Callable[[Sequence[str]], nn.Module], stage: str, said: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError) as error:
        observed(build([stage]), torch.zeros(2, 3, 224, 224))
    assert str(error.value).startswith(f"model.stages: {stage} returns {said}")


def test_attention_weights_are_no_maps() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.roles = {"stages": ["softmax"]}
            self.softmax = nn.Softmax(dim=-1)

        def forward(self, images: Tensor) -> Tensor:
            tokens = images.flatten(2)
            return self.softmax((tokens.transpose(1, 2) @ tokens)[:, None]).sum(dim=(1, 2))

    with pytest.raises(ValueError, match="returns \\[2, 1, 64, 64\\], whose axes do not follow an image's height and"):
        observed(Attention(), torch.randn(2, 3, 8, 8))


def test_what_is_tried_leaves_the_network_as_it_was() -> None:
    network = ResNet(8, 10).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    once = ResNet(8, 10).train()
    once.load_state_dict(before)
    images = torch.randn(4, 3, 8, 8)
    state = torch.random.get_rng_state()
    Observed(network, network, ("stages", "embedding"))(images)
    assert torch.equal(torch.random.get_rng_state(), state)
    once(images)
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_compares_channels_with_channels(composed: Callable[..., Settings], method: str) -> None:
    """A network whose maps have their channels last teaches as one that gives them rearranged by hand."""
    torch.manual_seed(0)
    config, data = composed(f"loss={method}"), some_digits()
    student = Classifier(ResNet(8, 10), 8, [0.5] * 3, [0.5] * 3)
    plain = Classifier(ChannelsLast(), 16, [0.5] * 3, [0.5] * 3)

    class First(nn.Module):
        """The same network with its maps rearranged by hand."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = plain.network
            self.first, self.second, self.pool = nn.Identity(), nn.Identity(), nn.Identity()
            self.roles = {"stages": ["first", "second"], "embedding": "pool"}

        def forward(self, images: Tensor) -> Tensor:
            caught = []
            hooks = [
                module.register_forward_hook(lambda module, inputs, output: caught.append(output))
                for module in (self.inner.first, self.inner.second, self.inner.pool)
            ]
            logits = self.inner(images)
            for layer, maps in zip((self.first, self.second, self.pool), caught, strict=True):
                layer(maps.permute(0, 3, 1, 2).contiguous())
            for hook in hooks:
                hook.remove()
            return logits

    by_hand = Classifier(First(), 16, [0.5] * 3, [0.5] * 3)
    positions = data.splits["train"][:8]
    terms = []
    for teacher in (FrozenTeacher(plain), FrozenTeacher(by_hand)):
        loss = build_loss(config)
        teacher.observe(loss.roles)
        ours = Observed(student, student.network, loss.roles)
        fit_loss(config, loss, ours, teacher, data, torch.device("cpu"))
        outputs = ours(data.images[positions]), teacher.answer(data.images[positions])
        terms.append(loss(*outputs, data.labels[positions], positions, 1)["loss"].item())
        ours.remove()
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)


def test_answers_and_runs_of_rearranged_maps_are_others_than_before() -> None:
    network = Classifier(ChannelsLast(), 16, [0.5] * 3, [0.5] * 3)
    data, teacher = some_digits(), FrozenTeacher(network)
    teacher.observe(["stages"])
    teacher.answer(data.images[torch.arange(2)])
    assert teacher.observed == {"stages": ["first (0, 3, 1, 2)", "second (0, 3, 1, 2)"]}
    digests = [_inputs_digest(data, teacher, network, is_rearranged) for is_rearranged in (False, True)]
    assert digests[0] != digests[1]
    assert digests[0].rpartition("-")[2] == digests[1].rpartition("-")[2]  # the teacher's weights


@settings(max_examples=50, deadline=None)
@given(
    st.permutations(["channels", "height", "width"]),
    *(st.integers(1, 6) for _ in range(3)),
    *(st.integers(1, 6) for _ in range(2)),
)
def test_axes_are_found_in_any_order(
    order: list[str], channels: int, height: int, width: int, more_height: int, more_width: int
) -> None:
    def shape(images: int, **sizes: int) -> list[int]:
        return [images, *(sizes[name] for name in order)]

    here = shape(2, channels=channels, height=height, width=width)
    wider = shape(1, channels=channels, height=height, width=width + more_width)
    taller = shape(1, channels=channels, height=height + more_height, width=width)
    expected = (0, *(1 + order.index(name) for name in ("channels", "height", "width")))
    assert axes_from_shapes(here, wider, taller) == expected
    assert axes_from_shapes(here, None, taller) is axes_from_shapes(here, [1, *here[1:]], [1, *here[1:]]) is None


def test_the_attention_of_a_swin_is_that_of_its_positions() -> None:
    torch.manual_seed(0)
    student, images = torch.rand(2, 5, 4, 4), torch.randn(2, 3, 64, 64)
    network = torchvision_classifier("swin_t", 10, stages=["features.1"])
    ours = attention(student, observed(network, images).stages[0])
    with torch.no_grad():
        maps = network.features[:2](images)  # [N, H, W, C]
    assert ours.item() == pytest.approx(attention(student, maps.permute(0, 3, 1, 2)).item())
    assert ours.item() != pytest.approx(attention(student, maps).item(), rel=0.1)
