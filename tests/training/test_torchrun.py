"""Several processes share the batches of one run: `torchrun --nproc-per-node 2 -m kdpipe …`, on the CPU with gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import in_a_hurry

from kdpipe.models import Classifier
from kdpipe.models.resnet import ResNet
from kdpipe.system.hardware import Hardware

RUN = ["dataset=digits", "dataset.train_fraction=0.3", "augmentation=crop_flip", "train.epochs=2"]
# 323 images in batches of 107: the last batch is of two images, one for each process.
DISTILL = [*RUN, "experiment=distill", "model@teacher=resnet20", "train.batch_size=107"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "kdpipe"]


def torchrun(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TORCHRUN, *in_a_hurry(overrides)], capture_output=True, text=True, timeout=300)


def epochs(output_dir: str) -> list[dict[str, float]]:
    (file,) = Path(output_dir).glob("runs/*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.mark.faults
def test_two_processes_give_the_losses_of_one(kdpipe: Callable) -> None:
    teacher = kdpipe(*RUN, "experiment=teacher", "model=resnet20", "train.epochs=1", "output_dir=teacher")
    assert teacher.status == 0, teacher.errors
    (weights,) = Path("teacher/runs").glob("*/model.safetensors")
    taught = [*DISTILL, f"teacher.weights={weights}"]
    assert kdpipe(*taught, "output_dir=one").status == 0
    done = torchrun(*taught, "output_dir=two")
    assert done.returncode == 0, done.stderr
    assert epochs("two") == [pytest.approx(epoch, rel=1e-3) for epoch in epochs("one")]
    assert done.stdout.count("epoch 2/2") == 1  # one of them tells
    (log,) = Path("two/runs").glob("*/kdpipe.log")
    assert log.read_text().count("epoch 2/2") == 1


@pytest.mark.faults
def test_two_processes_that_were_killed_go_on_after_the_last_epoch(kdpipe: Callable) -> None:
    # Dropout, whose draws each process makes for itself.
    student = [*RUN, "experiment=student", "model=torchvision", "model.name=squeezenet1_1", "model.weights=null"]
    student += ["model.image_size=32", "train.epochs=4", "optimizer.lr=3e-4"]
    assert torchrun(*student, "output_dir=whole").returncode == 0
    process = subprocess.Popen([*TORCHRUN, *in_a_hurry(student), "output_dir=killed"], start_new_session=True)
    while len(list(Path("killed/runs").glob("*/checkpoints/*.pt"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    for child in subprocess.run(["pgrep", "-f", "output_dir=killed"], capture_output=True, text=True).stdout.split():
        os.kill(int(child), signal.SIGKILL)
    process.wait()
    done = torchrun(*student, "output_dir=killed")
    assert done.returncode == 0, done.stderr
    assert "continues at epoch 3 of 4, step 1" in done.stdout
    assert epochs("killed") == epochs("whole")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experiment=student", "train.batch_size=1"], "train.batch_size=1: expected at least 2, for the 2 processes"),
        (["-m", "experiment=student", "seed=0,1"], "torchrun: it shares one run"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    kdpipe: Callable, monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun sets it")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    outcome = kdpipe(*overrides, *RUN)
    assert outcome.status == 1
    assert said in outcome.errors


def test_batchnorm_on_a_cpu_is_refused() -> None:
    hardware = Hardware(torch.device("cpu"), processes=2)
    with pytest.raises(ValueError, match="BatchNorm"):
        hardware.distribute(Classifier(ResNet(8, 10), 8, [0.5] * 3, [0.5] * 3))
