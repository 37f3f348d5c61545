"""Two students that teach each other."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

from kdpipe.losses import Mutual
from kdpipe.losses.outputs import Outputs

SMALL = [
    *("experiment=mutual", "model=resnet20", "model@teacher=resnet20"),
    *("dataset=digits", "dataset.train_fraction=0.3", "train.epochs=2", "train.threads=1"),
]


def two(images: int = 5, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draw = np.random.default_rng(0)
    student, peer = (torch.from_numpy(draw.standard_normal((images, classes))) for _ in range(2))
    return student, peer, torch.from_numpy(draw.integers(0, classes, images))


def parts(student: Tensor, peer: Tensor, labels: Tensor, weight: float = 1) -> dict[str, Tensor]:
    return Mutual(weight)(Outputs(student), Outputs(peer), labels, torch.arange(len(labels)), 1)


def test_each_learns_from_the_labels_and_from_the_other() -> None:
    student, peer, labels = two()
    named = parts(student, peer, labels, weight=0.5)
    of_student, of_peer = (softmax(logits.numpy(), axis=1) for logits in (student, peer))
    rows = np.arange(len(labels))
    for key, logits in (("ce", student), ("peer_ce", peer)):
        assert named[key].item() == pytest.approx(-log_softmax(logits.numpy(), axis=1)[rows, labels.numpy()].mean())
    assert named["mutual"].item() == pytest.approx(rel_entr(of_peer, of_student).sum() / 5)
    assert named["peer_mutual"].item() == pytest.approx(rel_entr(of_student, of_peer).sum() / 5)
    total = named["ce"] + named["peer_ce"] + 0.5 * (named["mutual"] + named["peer_mutual"])
    assert named["loss"].item() == pytest.approx(total.item())


def test_no_gradient_goes_through_what_the_other_says() -> None:
    student, peer, labels = two()
    student.requires_grad_()
    parts(student, peer, labels)["loss"].backward()
    one_hot = torch.eye(4)[labels]
    expected = (2 * student.softmax(1) - one_hot - peer.softmax(1)) / 5
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.fixture
def done(kdpipe: Callable) -> Path:
    """The folder of a finished run of two ResNet-20."""
    outcome = kdpipe(*SMALL)
    assert outcome.status == 0, outcome.errors
    (folder,) = Path("outputs/runs").iterdir()
    return folder


def test_both_learn_from_different_first_weights_and_are_kept(done: Path) -> None:
    client = MlflowClient("sqlite:///outputs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])
    history = {
        name: [point.value for point in client.get_metric_history(run.info.run_id, name)]
        for name in ("train/peer_ce", "train/ce")
    }
    assert all(last < first for first, last in history.values())
    assert run.data.metrics["peer/accuracy"] > 0.1
    student, peer = load_file(done / "model.safetensors"), load_file(done / "peer.safetensors")
    assert student.keys() == peer.keys()
    assert not any(torch.equal(student[name], peer[name]) for name in student if name.endswith("conv1.weight"))
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"model.safetensors", "peer.safetensors"}


@pytest.mark.faults
def test_an_interrupted_run_goes_on_with_both(done: Path, start: Callable) -> None:
    whole = [(done / f"{name}.safetensors").read_bytes() for name in ("model", "peer")]
    for file in done.iterdir():
        file.unlink() if file.is_file() else None
    run = start(*SMALL, "train.resume=never")
    while not list(done.glob("checkpoints/*.pt")):
        time.sleep(0.02)
    run.kill()
    again = start(*SMALL)
    assert again.end() == 0, again.output
    assert "continues at epoch 2 of 2" in again.output
    assert [(done / f"{name}.safetensors").read_bytes() for name in ("model", "peer")] == whole


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.weights=a"], "teacher.weights=a: file not found"),
        (["loss.weight=0"], "loss.weight=0: expected a number above 0"),
        (["loss@also=kd"], "also=kdpipe.losses.KD: kdpipe.losses.Mutual takes no second method"),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_refused(kdpipe: Callable, overrides: list[str], said: str) -> None:
    outcome = kdpipe(*SMALL, *overrides)
    assert outcome.status == 1 and said in outcome.errors
