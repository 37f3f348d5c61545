"""kdpipe in Python: any modules, any data, and the same loop as the command."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import Taught, some_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kdpipe as package
from kdpipe.data.examples import Examples, examples
from kdpipe.library import ALONE, TAUGHT, distill, evaluate, fit
from kdpipe.losses import KD, AlphaLoss, Attention
from kdpipe.settings.errors import ConfigError


class Small(nn.Module):
    """A network of the user's, for digits as float images [N, 1, 8, 8]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, stride=2), nn.ReLU())
        self.fc = nn.Linear(9 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.second(self.first(images)).flatten(1))


def part(split: str) -> TensorDataset:
    data = some_digits()
    positions = data.splits[split]
    return TensorDataset(data.images[positions].float() / 255, data.labels[positions])


@pytest.fixture(scope="module")
def data() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    torch.set_num_threads(1)
    return part("train"), part("validation"), part("test")


@pytest.fixture(scope="module")
def teacher(data: tuple[TensorDataset, ...]) -> nn.Module:
    network, _ = fit(partial(Small, 32), *data, epochs=12, batch_size=32, optimizer=partial(torch.optim.Adam, lr=3e-3))
    return network


def test_a_student_is_taught_beside_the_same_one_alone(data: tuple, teacher: nn.Module) -> None:
    result = distill(Small, teacher, *data, loss=KD(alpha=0.9, temperature=4), epochs=3, seeds=2, batch_size=32)
    assert [(row["arm"], row["seed"]) for row in result.rows] == [(ALONE, 0), (TAUGHT, 0), (ALONE, 1), (TAUGHT, 1)]
    assert list(result.frame["test/accuracy"]) == [row["test/accuracy"] for row in result.rows]
    gains = [result.rows[place + 1]["test/accuracy"] - result.rows[place]["test/accuracy"] for place in (0, 2)]
    assert result.gain.mean == pytest.approx(sum(gains) / 2)
    assert str(result).endswith(result.verdict)
    assert result.teacher["accuracy"] == evaluate(teacher, data[2])["accuracy"] > 0.7
    taught = result.networks[TAUGHT, 1]
    assert isinstance(taught, Small) and not taught.training
    assert evaluate(taught, data[2])["accuracy"] == result.rows[3]["test/accuracy"]
    assert teacher.training is False and all(weight.requires_grad for weight in teacher.parameters())


def test_a_seed_gives_the_same_weights_again_and_both_arms_begin_alike(data: tuple, teacher: nn.Module) -> None:
    short = partial(fit, Small, *data, epochs=1, batch_size=32)
    once, again = short(seed=3)[0].state_dict(), short(seed=3)[0].state_dict()
    assert all(torch.equal(once[name], again[name]) for name in once)
    still = partial(torch.optim.SGD, lr=0.0)
    alone, taught = (short(seed=3, teacher=by, optimizer=still)[0].fc.weight for by in (None, teacher))
    assert torch.equal(alone, taught)
    assert not torch.equal(alone, short(seed=4, optimizer=still)[0].fc.weight)


def test_a_module_is_initialised_anew_for_each_seed(data: tuple) -> None:
    torch.manual_seed(0)
    given, still = Small(), partial(torch.optim.SGD, lr=0.0)
    before = given.fc.weight.clone()
    first, second = (fit(given, *data, epochs=1, seed=seed, optimizer=still)[0].fc.weight for seed in (0, 1))
    assert not torch.equal(first, second) and not torch.equal(first, before)
    assert torch.equal(given.fc.weight, before)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(ConfigError, match=r"student=Own: .*no reset_parameters.*a function that makes the student"):
        fit(Own(), *data)


def test_losses_on_features_go_by_the_names_of_modules(data: tuple, teacher: nn.Module) -> None:
    named = {"stages": ["first", "second"], "teacher_stages": ["first", "second"]}
    _, metrics = fit(Small, *data, teacher=teacher, loss=Attention(p=2, weight=1000, ce_weight=1), epochs=1, **named)
    assert metrics["train/attention"] > 0
    with pytest.raises(ConfigError, match=r"stages=third: expected the name of a submodule"):
        fit(Small, *data, teacher=teacher, loss=Attention(p=2, weight=1000, ce_weight=1), stages=["third"])
    with pytest.raises(ConfigError, match=r"^teacher_stages=null: Attention compares the stages of both networks"):
        fit(Small, *data, teacher=teacher, loss=Attention(p=2, weight=1000, ce_weight=1), stages=["first"])


class Shaken(Dataset):
    """Its views are random, as a user's transforms make them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.targets = images, labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.images[place] + torch.rand(1), int(self.targets[place])


def test_random_views_depend_on_seed_epoch_and_image_alone(data: tuple) -> None:
    shaken = Shaken(*data[0].tensors)
    images = examples({"train": shaken, "test": shaken}, seed=0).images
    assert isinstance(images, Examples)
    some = torch.tensor([3, 0, 7])
    torch.manual_seed(1)
    following = torch.rand(1)
    torch.manual_seed(1)
    first = images[some]
    assert torch.equal(torch.rand(1), following)  # the rest of the training is left alone
    assert torch.equal(images[some.flip(0)], first.flip(0))
    tested = images[some + len(shaken)]
    images.epoch = 2
    assert not torch.equal(images[some], first)
    assert torch.equal(images[some + len(shaken)], tested)
    assert not torch.equal(examples({"train": shaken}, seed=1).images[some], first)


def test_a_loader_and_batches_are_the_same_data(data: tuple) -> None:
    def weights(train: object) -> Tensor:
        return fit(Small, train, None, data[2], epochs=1, batch_size=32)[0].fc.weight

    whole = weights(data[0])
    assert torch.equal(weights(DataLoader(data[0], batch_size=7, shuffle=True)), whole)
    assert torch.equal(weights(list(DataLoader(data[0], batch_size=7))), whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"select": "first"}, "select=first: expected last, best or ema"),
        ({"select": "ema"}, "select=ema: expected last, or ema=0.999"),
        ({"ema": 1.0}, "ema=1: expected None or a number above 0 below 1"),
        ({"stages": ["third"]}, "stages=third: expected the name of a submodule"),
        ({"device": "tpu"}, "device=tpu: expected auto or one of cpu"),
        ({"precision": "half"}, "precision=half: expected float32, bfloat16 or float16"),
        ({"loss": KD(0.5, 4)}, "teacher=null: expected a network: KD learns from one"),
    ],
)
def test_bad_values_are_named_before_training(data: tuple, words: dict, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        fit(Small, *data, **words)
    assert str(raised.value).startswith(said)


def test_the_best_or_the_averaged_weights_are_returned_where_they_are_wanted(data: tuple) -> None:
    chosen = {
        name: fit(Small, *data, epochs=3, batch_size=32, ema=0.9, select=name) for name in ("last", "best", "ema")
    }
    for name, (network, metrics) in chosen.items():
        assert (
            evaluate(network, data[2])["accuracy"]
            == metrics["test/accuracy"]
            == (chosen["last"][1].get(f"test/accuracy_{name}", metrics["test/accuracy"]))
        )
    with pytest.raises(ConfigError, match="select=best: the best weights are chosen on validation_data"):
        fit(Small, data[0], None, data[2], select="best")


def test_a_network_of_a_run_is_loaded_with_its_preprocessing(taught: Taught) -> None:
    network = package.load(taught.student, uri=taught.uri)
    assert network(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 10)


def test_kdpipe_is_imported_in_no_time() -> None:
    code = "import kdpipe, sys; print(sorted({'torch', 'mlflow', 'hydra', 'pydantic'} & sys.modules.keys()))"
    code += "; kdpipe.distill; print(sorted({'mlflow', 'hydra'} & sys.modules.keys()))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split("\n")[:2] == ["[]", "[]"]
    assert set(package.__all__) <= {*package.__all__, *dir(package)}
    assert callable(package.distill) and issubclass(KD, AlphaLoss)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_the_loss_of_the_student_alone_weighs_and_smooths_as_the_taught_one(data: tuple, teacher: Callable) -> None:
    loss = KD(alpha=0.0, temperature=4)
    loss.label_smoothing = 0.2
    result = distill(Small, teacher, *data, loss=loss, epochs=1, seeds=1, batch_size=32)
    assert result.rows[0]["test/loss"] == pytest.approx(result.rows[1]["test/loss"], rel=1e-5)
