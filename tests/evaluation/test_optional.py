"""Nothing that a result does not depend on ends a finished run."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import the_run
from torch import Tensor, nn

from kdpipe.evaluation.costs import cost
from kdpipe.evaluation.report import cost_table
from kdpipe.models import Classifier
from kdpipe.system.hardware import Hardware
from kdpipe.system.optional import optional

RUN = ("dataset=digits", "experiment=student", "train.epochs=0", "train.threads=1")


class Fussy(nn.Linear):
    """Takes several images at once only."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == 1:
            raise RuntimeError("one image is too few")
        return super().forward(images.flatten(1))


def test_a_run_started_from_a_notebook_has_its_pictures(tmp_path: Path, empty_store: Path) -> None:
    words = [*RUN, "evaluation.pictures=true", "evaluation.timing_seconds=0"]
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, "-m", "kdpipe", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert the_run(tmp_path).info.status == "FINISHED"
    assert [file.name for file in tmp_path.glob("outputs/runs/*/*.png")]


def test_what_cannot_be_measured_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    network = Classifier(Fussy(3 * 8 * 8, 10), 8, [0.5] * 3, [0.5] * 3)
    images, hardware = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), Hardware(torch.device("cpu"))
    with caplog.at_level(logging.WARNING, "kdpipe"):
        found = cost({"model": network}, images, hardware, seconds=0.1, attempt=optional)
    assert found.keys() == {"model/params", "model/size_mb"}
    assert "model: operations and activations: left out" in caplog.text and "timing: left out" in caplog.text
    assert "size, MB" in cost_table(found, {"model": "fussy"})
    with pytest.raises(RuntimeError, match="too few"):  # the command that measures says so
        cost({"model": network}, images, hardware, seconds=0)


def test_an_interruption_is_not_left_out() -> None:
    with pytest.raises(KeyboardInterrupt), optional("anything"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("words", [(), ("-m", "seed=0,1")])
def test_a_run_that_changes_its_folder_finds_its_paths(kdpipe: Callable, words: tuple[str, ...]) -> None:
    outcome = kdpipe(*words, *RUN, "hydra.job.chdir=true")
    assert outcome.status == 0, outcome.errors
    assert [str(path) for path in Path().rglob("mlflow.db")] == ["outputs/mlflow.db"]
    assert len(list(Path("outputs/runs").glob("*/model.safetensors"))) == max(len(words), 1)
    assert not list(Path("outputs/runs").glob("*/outputs"))
