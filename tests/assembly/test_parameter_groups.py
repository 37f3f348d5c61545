"""Which weight decay and learning rate each parameter gets, and optimizers of timm."""

import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import classifier
from torch import nn

from kdpipe.assembly.objectives import build_loss, build_optimizer, check_step
from kdpipe.assembly.parameter_groups import parameter_groups
from kdpipe.models import Classifier
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Settings

Composed = Callable[..., Settings]


def optimizer_of(settings: Settings, model: nn.Module, loss: nn.Module | None = None) -> torch.optim.Optimizer:
    return build_optimizer(settings, model, loss or build_loss(settings), steps_per_epoch=5)[0]


def by_name(optimizer: torch.optim.Optimizer, key: str, *modules: nn.Module) -> dict[str, float]:
    """The value of each parameter's group."""
    names = {parameter: name for module in modules for name, parameter in module.named_parameters()}
    return {names[parameter]: group[key] for group in optimizer.param_groups for parameter in group["params"]}


def vision_transformer() -> Classifier:
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32)
    return Classifier(network, 32, [0.5] * 3, [0.5] * 3)


def test_without_the_keys_the_optimizer_gets_a_list_as_before(composed: Composed) -> None:
    settings, model = composed("optimizer=adamw"), classifier()
    loss = build_loss(settings)
    assert parameter_groups(settings.optimizer, model, loss) == [*model.parameters(), *loss.parameters()]


def test_norms_and_biases_can_do_without_weight_decay_in_the_loss_too(composed: Composed) -> None:
    settings, model = composed("optimizer=adamw", "optimizer.decay_norm_and_bias=false"), classifier()
    loss = build_loss(settings)
    loss.projection = nn.Conv2d(4, 8, 1)
    decays = by_name(optimizer_of(settings, model, loss), "weight_decay", model, loss)
    shapes = {name: weight for module in (model, loss) for name, weight in module.named_parameters()}
    assert decays.keys() == shapes.keys()
    assert decays["projection.weight"] == 0.01 and decays["projection.bias"] == 0
    for name, decay in decays.items():
        assert decay == (0.01 if shapes[name].ndim > 1 else 0), name


@pytest.mark.parametrize("decays_all", [True, False])
def test_each_layer_learns_at_a_share_of_the_next_one_s_rate(composed: Composed, decays_all: bool) -> None:
    overrides = ["optimizer.layer_decay=0.5", f"optimizer.decay_norm_and_bias={str(decays_all).lower()}"]
    settings, model = composed("optimizer=adamw", *overrides, "optimizer.lr=1e-3"), vision_transformer()
    optimizer = optimizer_of(settings, model)
    rates = by_name(optimizer, "lr", model)
    assert rates["network.head.weight"] == 1e-3
    blocks = [rates[f"network.blocks.{number}.attn.qkv.weight"] for number in range(12)]
    assert all(later == pytest.approx(2 * earlier) for earlier, later in pairwise(blocks))
    assert rates["network.patch_embed.proj.weight"] == pytest.approx(blocks[0] / 2)
    decays = by_name(optimizer, "weight_decay", model)
    for name in ("network.norm.weight", "network.pos_embed", "network.head.bias"):
        assert decays[name] == (0.01 if decays_all else 0), name
    assert decays["network.head.weight"] == 0.01


def test_the_schedule_keeps_the_ratios_of_layers(composed: Composed) -> None:
    settings = composed("optimizer=adamw", "optimizer.layer_decay=0.5", "scheduler=cosine")
    optimizer, schedule = build_optimizer(settings, vision_transformer(), build_loss(settings), steps_per_epoch=5)
    ratios = [group["lr"] / optimizer.param_groups[-1]["lr"] for group in optimizer.param_groups]
    for _ in range(7):
        optimizer.step()
        schedule.step()
    after = [group["lr"] / optimizer.param_groups[-1]["lr"] for group in optimizer.param_groups]
    assert after == pytest.approx(ratios)


@pytest.mark.parametrize("name", ["lion", "lamb", "adafactor", "muon"])
def test_each_optimizer_lowers_the_loss_of_a_network(composed: Composed, name: str) -> None:
    if name != "adafactor":
        pytest.importorskip("timm")
    settings = composed(f"optimizer={name}", "optimizer.decay_norm_and_bias=false")
    check_step(settings, build_loss(settings))
    torch.manual_seed(0)
    model, images = classifier(), torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    labels, optimizer = torch.arange(20) % 10, optimizer_of(settings, model)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses


class WithoutTimm:
    """Finds modules as where timm is not installed."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("override", ["optimizer=lion", "optimizer=lamb", "optimizer=muon"])
def test_without_timm_its_optimizers_are_refused_in_one_line(
    composed: Composed, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [WithoutTimm, *sys.meta_path])
    settings = composed(override)
    with pytest.raises(ConfigError, match=r"^optimizer\._target_=timm\.optim\.\w+: timm is not installed; pip install"):
        check_step(settings, build_loss(settings))


def test_without_timm_layers_have_no_rates_of_their_own(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    settings = composed("optimizer.layer_decay=0.5")
    with pytest.raises(ConfigError, match=r"^optimizer\.layer_decay=0\.5: timm is not installed; pip install"):
        optimizer_of(settings, classifier())
