"""A run that meets a limit (a full disk, no more memory, numbers that are none) ends with a clear line, and what was
there before is intact."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import OFTEN, STUDENT, Started, checkpoints, classifier, fit_for_test, result, some_digits, the_run
from torch import Tensor, nn

from kdpipe.losses.outputs import Outputs
from kdpipe.models.weights import save_weights
from kdpipe.system.files import append_atomically, write_atomically
from kdpipe.training.checkpoint import load_checkpoint, save_checkpoint

DIGITS = ["dataset=digits", "dataset.train_fraction=0.3", "train.threads=1", "experiment=student"]


def fill(disk: Path, leave: int) -> Path:
    """A file that takes all the space of a file system but for `leave` bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    file = disk / "filler"
    with suppress(OSError), file.open("wb") as opened:  # the run takes some of it meanwhile
        opened.write(bytes(max(free - leave, 0)))
    return file


def test_a_disk_that_fills_up_stops_the_run_and_with_space_it_goes_on(
    start: Callable[..., Started],
    whole: dict[str, object],
    disk: Callable[[str], Path],
) -> None:
    folder = disk("64M")
    Path("outputs/runs").symlink_to(folder)
    run = start(*STUDENT)
    run.wait_for("epoch 2/4")
    filler = fill(folder, 1_000_000)
    assert run.end() == 1, run.output
    (said,) = [line for line in run.output.splitlines() if line.startswith("kdpipe:")]
    assert "No space left on device; existing files are intact" in said
    assert "Traceback" not in run.output and "Logging error" not in run.output
    assert the_run().info.status == "FAILED"
    assert checkpoints() and load_checkpoint(checkpoints()[0].parent)
    filler.unlink()
    again = start(*STUDENT)
    assert again.end() == 0, again.output
    assert "epoch 1/4" not in again.output
    assert result(Path(), the_run()) == whole


@pytest.mark.faults
@pytest.mark.parametrize("number", range(4))
def test_the_disk_may_be_full_at_any_write(
    start: Callable[..., Started],
    whole: dict[str, object],
    disk: Callable[[str], Path],
    number: int,
) -> None:
    """Everything on one disk, the store too; it has ever more space, from nothing to what the run needs."""
    folder = disk("64M")
    for file in Path("outputs").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        file.unlink()
    Path("outputs").rmdir()
    Path("outputs").symlink_to(folder)
    draw = random.Random(number)
    for attempt in range(20):
        filler = fill(folder, int(draw.expovariate(1 / 200_000)) + 3_000_000 * attempt)
        run = start(*STUDENT, OFTEN)
        status = run.end()
        assert "Traceback" not in run.output and "Logging error" not in run.output, run.output
        filler.unlink()
        if status == 0 and "does not have all" not in run.output:
            break
        told = [line for line in run.output.splitlines() if line.startswith("kdpipe:")]
        assert len(told) == (1 if status else 0), run.output
    if "does not have all" in run.output:
        assert start(*STUDENT).end() == 0
    print(f"{attempt} full disks")
    assert result(Path(), the_run(name="squeezenet1_1_alone_s0")) == whole


def test_a_file_is_written_whole_or_not_at_all(disk: Callable[[str], Path]) -> None:
    folder = disk("1M")
    write_atomically(folder / "file", b"before")
    (folder / "lines").write_text("first\n")
    save_checkpoint(folder / "checkpoints", {"step": torch.tensor(1)})
    fill(folder, 8192)
    for write in (
        lambda: write_atomically(folder / "file", bytes(500_000)),
        lambda: append_atomically(folder / "lines", "x" * 500_000),
        lambda: save_checkpoint(folder / "checkpoints", {"step": torch.zeros(200_000)}),
        lambda: save_weights(nn.Linear(400, 400), folder / "weights", []),
    ):
        with pytest.raises(OSError, match=r"No space left on device: .*disk"):
            write()
    assert (folder / "file").read_bytes() == b"before"
    assert (folder / "lines").read_text() == "first\n"
    state = load_checkpoint(folder / "checkpoints")
    assert state and state["step"] == 1
    assert not list(folder.rglob("*.tmp")) and not (folder / "weights").exists()


def test_without_memory_the_line_says_what_to_lower(kdpipe: Callable, tmp_path: Path) -> None:
    """A real limit: the process may have two gigabytes more than what it has when it starts to train."""
    code = (
        "import resource, sys, kdpipe.main, kdpipe.tracking, torch.optim.adam, torchvision\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 2_000_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "kdpipe.main.cli()\n"
    )
    overrides = [*DIGITS, "model=resnet20", "model.image_size=256", "train.batch_size=300", "train.epochs=1"]
    done = subprocess.run([sys.executable, "-c", code, *overrides], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (said,) = done.stderr.splitlines()
    assert "out of memory; lower train.batch_size or the image size" in said
    assert the_run().info.status == "FAILED"


class Poisoned(nn.Module):
    """Cross-entropy that becomes infinite, or what it is told to, at a step."""

    def __init__(self, step: int, factor: float) -> None:
        super().__init__()
        self.step, self.factor, self.steps = step, factor, 0

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        self.steps += 1
        loss = nn.functional.cross_entropy(student.logits, labels)
        return {"loss": loss * self.factor if self.steps == self.step else loss}


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 7, 10, 13])
def test_a_loss_that_is_no_number_ends_the_training_within_the_epoch(step: int, factor: float) -> None:

    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = some_digits()  # five steps an epoch
    assert math.ceil(len(data.splits["train"]) / 50) == 5
    epoch = 1 + (step - 1) // 5
    with pytest.raises(ValueError, match=rf"epoch {epoch}: the loss is (nan|inf), .*optimizer.lr than 0.01.*clip_norm"):
        fit_for_test(model, data, Poisoned(step, factor), optimizer, epochs=3)


def test_a_training_that_diverges_keeps_its_last_good_checkpoint(start: Callable[..., Started]) -> None:
    leap = ["scheduler=multistep", "scheduler.milestones=[2]", "scheduler.gamma=1e30"]
    diverging = [*DIGITS, "optimizer=sgd", "optimizer.lr=0.01", *leap, "train.epochs=9", OFTEN]
    run = start(*diverging)
    assert run.end() == 1, run.output
    assert "epoch 3: " in run.output and "try a lower optimizer.lr than 1e+28" in run.output
    assert the_run().info.status == "FAILED"
    assert "the training has diverged" in the_run().data.tags["kdpipe.reason"]
    state = load_checkpoint(checkpoints()[0].parent)
    assert state
    assert all(weight.isfinite().all() for weight in state["training"]["learner"].values())
    assert state["training"]["epoch"] == 3


def test_gradients_are_clipped_to_their_norm(kdpipe: Callable) -> None:

    norms = []
    for clip_norm in (None, 1e-3):
        torch.manual_seed(0)
        model, seen = classifier(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.register_step_pre_hook(
            lambda optimizer, args, kwargs, model=model, seen=seen: seen.append(
                nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
            )
        )
        fit_for_test(model, some_digits(), Poisoned(0, 1), optimizer, epochs=1, clip_norm=clip_norm)
        norms.append(max(seen).item())
    assert norms[0] > 0.1 and norms[1] == pytest.approx(1e-3, rel=1e-3)
