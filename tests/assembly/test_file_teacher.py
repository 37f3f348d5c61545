"""A file of answers teaches as the network that gave them would."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_refused, some_digits
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from kdpipe.assembly.finished_runs import open_data, open_run, teacher_if_there
from kdpipe.assembly.parts import check_components
from kdpipe.assembly.run_networks import _with_digest_of_answers
from kdpipe.compare.__main__ import run_comparison
from kdpipe.data import PerImageValues, split
from kdpipe.data.answers import read_answers
from kdpipe.data.image_folder import image_folder
from kdpipe.data.unlabelled import with_unlabelled
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Settings
from kdpipe.system.hardware import Hardware
from kdpipe.system.once import log_once
from kdpipe.tracking import RunStore
from kdpipe.training.teacher import FileTeacher
from kdpipe.training.teacher_check import check_teacher

CPU = Hardware(torch.device("cpu"))
SMALL = ["dataset=digits", "dataset.train_fraction=0.2", "train.threads=1", "train.epochs=2"]
SMALL += ["model=resnet20", "model.depth=8", "model.image_size=8"]
ANSWERS = ["model@teacher=answers", "teacher.file=answers.parquet"]


def newest_run() -> Run:
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("kdpipe").experiment_id
    return client.search_runs([experiment], order_by=["attributes.start_time DESC"])[0]


def store() -> RunStore:
    return RunStore(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")


@torch.no_grad()
def write_answers(run: Run, file: str, *without: str) -> None:
    """What a run's network says of the images of its data set, but those of some splits."""
    finished = open_run(run.info.run_id, store())
    data = open_data(finished)
    rows = {}
    for name, positions in data.splits.items():
        for batch in () if name in without else positions.sort().values.split(CPU.inference_batch_size):
            rows |= dict(zip(batch.tolist(), finished.classifier(data.images[batch]).numpy(), strict=True))
    frame = pd.DataFrame(rows.values(), columns=data.class_names).assign(index=rows.keys())
    frame.sample(frac=1, random_state=0).to_parquet(file)


def results() -> tuple[list[dict[str, float]], bytes, dict[str, str]]:
    """The lines of the newest run's metrics, without what depends on the clock; its weights and its tags."""
    run = newest_run()
    folder = Path("outputs/runs") / run.data.tags["kdpipe.identity"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("train/images_per_second", None)
    return lines, (folder / "model.safetensors").read_bytes(), run.data.tags


def test_a_student_of_a_file_is_the_student_of_the_network_to_the_last_bit(kdpipe: Callable) -> None:
    assert kdpipe(*SMALL, "experiment=teacher").status == 0
    write_answers(newest_run(), "answers.parquet")
    taught = kdpipe(*SMALL, "model@teacher=resnet20", "teacher.depth=8", "teacher.image_size=8")
    assert taught.status == 0, taught.errors
    lines, weights, _ = results()
    told = kdpipe(*SMALL, *ANSWERS)
    assert told.status == 0, told.errors
    assert "teacher: logits for 935 images from answers.parquet" in told.output
    same_lines, same_weights, tags = results()
    costs = {name for name in lines[-1] if name.startswith("teacher/") and name not in same_lines[-1]}
    assert costs == {f"teacher/{name}" for name in ("params", "size_mb", "flops", "activation_mb")}
    validation = same_lines[-1].pop("teacher/val_accuracy")
    assert f"teacher answers: {100 * validation:.1f} % of 270 validation images" in told.output
    assert same_weights == weights
    assert same_lines == [{name: line[name] for name in line if name not in costs} for line in lines]
    assert tags["kdpipe.stage"] == "distill" and tags["kdpipe.inputs"].endswith(tags["kdpipe.teacher_run"])

    shutil.copy("answers.parquet", "copy.parquet")
    again = kdpipe(*SMALL, "model@teacher=answers", "teacher.file=copy.parquet")
    assert "this run is already finished" in again.output


def test_what_needs_answers_that_a_file_lacks_is_left_out(kdpipe: Callable) -> None:
    assert kdpipe(*SMALL, "experiment=teacher").status == 0
    write_answers(newest_run(), "answers.parquet", "test")
    done = kdpipe(*SMALL, *ANSWERS)
    assert done.status == 0, done.errors
    assert "teacher: answers for none of the test images, so what needs all of them is left out" in done.output
    assert "teacher's, validation" in done.output and "agrees with it" not in done.output
    run = newest_run()
    found = {name for name in run.data.metrics if name.startswith(("teacher/", "speedup/"))}
    assert found == {"teacher/val_accuracy"}
    text = run_comparison(["--experiment", "kdpipe"])
    share = 100 * run.data.metrics["teacher/val_accuracy"]
    assert f"its teacher gets {share:.2f} % of the validation images right" in text
    assert "the teacher's answers come from answers.parquet: it may have been trained on the validation" in text
    finished = open_run(run.info.run_id, store())
    assert finished.teacher_weights == ["answers.parquet"] and teacher_if_there(finished, store()) == (None, [])


def test_one_answer_holds_for_all_views(kdpipe: Callable) -> None:
    np.savez("answers.npz", probabilities=np.full((1797, 10), 0.1))
    command = [*SMALL, "model@teacher=answers", "teacher.file=answers.npz", "augmentation=crop_flip"]
    done = kdpipe(*command, "distillation.outputs=cached")
    assert done.status == 0, done.errors
    assert "each view of an image is taught the same answer" in done.output
    assert "are the rows of teacher.file about these images" in done.output  # no better than chance


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("teacher.file=no.csv", "teacher.file=no.csv: file not found; expected a .npz, .parquet or .csv file"),
        ("teacher.file=answers.json", "teacher.file=answers.json: expected a .npz, .parquet or .csv file"),
        ("teacher.digest=0123456789abcdef", "teacher.digest=0123456789abcdef: expected .*, that of answers.npz"),
        ("teacher.values=scores", "teacher.values=scores: expected one of auto, logits, probabilities"),
        ("teacher.floor=0", "teacher.floor=0: expected a number above 0 below 1"),
        ("teacher.weights=runs:/abc", "teacher.weights=runs:/abc: the answers are those of answers.npz; expected auto"),
        (
            "loss=attention",
            "model@teacher=answers: a file of answers teaches with logits alone, .*stages; expected one",
        ),
        (
            "loss@also=rkd",
            "model@teacher=answers: a file of answers teaches with logits alone, .*embedding; expected one",
        ),
        ("train.mixup=0.2", "train.mixup=0.2: a file of answers knows the images as they are stored.*; expected null"),
        ("train.cutmix=1", "train.cutmix=1: a file of answers knows the images as they are stored.*; expected null"),
        ("distillation.outputs=online", "distillation.outputs=online: .*; expected auto or cached"),
        (
            "augmentation=crop_flip distillation.outputs=views",
            "distillation.outputs=views: .*; expected auto or cached",
        ),
        ("loss=mutual", "model@teacher=answers: expected one network, as the second student"),
        ("model=answers model.file=answers.npz", "model=answers: expected a network; answers can teach it"),
        ("+teacher.depth=8", "teacher.depth: no such key"),
    ],
)
def test_what_does_not_go_with_a_file_is_refused(
    composed: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("answers.npz", logits=np.ones((5, 10)))
    command = ["dataset=digits", "model@teacher=answers", "teacher.file=answers.npz"]
    with pytest.raises(ConfigError, match=f"^{said}"):
        check_components(_with_digest_of_answers(composed(*command, *overrides.split())))


def test_a_file_that_does_not_fit_is_refused_before_training(kdpipe: Callable) -> None:
    np.savez("answers.npz", logits=np.ones((5, 10)))
    done = kdpipe(*SMALL, "model@teacher=answers", "teacher.file=answers.npz")
    assert_refused(done, "teacher.file=answers.npz: no answer for 216 of 216 training images (16, 20, 53 and 213 more)")
    assert_refused(kdpipe(*SMALL, *ANSWERS), "teacher.file=answers.parquet: file not found")
    assert not list(Path().glob("outputs/runs/*/checkpoints"))


def test_a_file_is_no_member_of_an_ensemble(composed: Callable[..., Settings]) -> None:
    with pytest.raises(ConfigError, match=r"^teacher.members=answers.npz: expected a list of runs"):
        composed("model@teacher=ensemble", "teacher.members=[answers.npz]")


def test_no_file_is_read_where_no_teacher_is_needed(composed: Callable[..., Settings]) -> None:
    settings = _with_digest_of_answers(composed(*SMALL, *ANSWERS, "loss.alpha=0"))
    assert settings.identity == composed(*SMALL, "loss.alpha=0").identity
    check_components(settings)


def test_a_run_is_known_by_what_is_in_the_file(composed: Callable[..., Settings], tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.npz", "copy.npz", "other.npz")]
    for file, value in zip(files, (0, 0, 1), strict=True):
        np.savez(file, logits=np.full((5, 10), value))
    commands = [composed(*SMALL, "model@teacher=answers", f"teacher.file={file}") for file in files]
    one, copy, other = (_with_digest_of_answers(settings).identity for settings in commands)
    assert one == copy != other


def test_images_without_labels_are_taught_by_their_names(
    class_folders: Path, photo: Callable[..., Image.Image]
) -> None:
    more = class_folders.parent / "more"
    more.mkdir()
    photo(0, 99).save(more / "new.jpg")
    cache = str(class_folders.parent / "cache")
    source = image_folder(str(class_folders), None, "stop", cache)
    data = split(source, "photos", train_fraction=1, val_fraction=0, test_fraction=0.2, split_seed=0)
    whole = with_unlabelled(data, str(more), "stop", cache)
    file = str(class_folders.parent / "answers.csv")
    frame = pd.DataFrame({"image": whole.names, "flower": range(41), "temple": -1})
    frame[::-1].to_csv(file, index=False)
    assert whole.names[-1] == "new.jpg" and whole.names[0].startswith("flower/")
    assert read_answers(whole, file, "auto", 1e-8)[torch.tensor([40, 3])].tolist() == [[40, -1], [3, -1]]
    frame[:-1].to_csv(file, index=False)
    with pytest.raises(ValueError, match=r"no answer for 1 of 33 training images \(new.jpg\)"):
        read_answers(whole, file, "auto", 1e-8)


@pytest.mark.parametrize("has_validation", [True, False])
def test_whether_it_has_anything_to_teach_is_seen_in_its_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_validation: bool
) -> None:
    data = some_digits()
    splits = ["train", "validation"] if has_validation else ["train"]
    positions = torch.cat([data.splits[name] for name in splits]).sort().values
    right = torch.nn.functional.one_hot(data.labels[positions], 10).float()
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "kdpipe"):
        for logits in (right, right.roll(1, dims=1)):
            teacher = FileTeacher(PerImageValues(positions, logits), "0")
            assert teacher.covers(data.splits["validation"]) == has_validation
            check_teacher("answers", teacher, 4, data, tmp_path, CPU)
    judged = "180 validation" if has_validation else "234 training"
    assert f"teacher answers: 100.0 % of {judged} images" in caplog.messages[0]
    assert f"teacher answers: 0.0 % of {judged} images" in caplog.messages[1]
    assert "no better than chance" in caplog.messages[2] and "rows of teacher.file" in caplog.messages[2]
    assert not list(tmp_path.iterdir())  # nothing had to be computed


def test_epochs_are_taught_the_answers_of_their_images() -> None:
    answers = PerImageValues(torch.tensor([2, 5, 9]), torch.arange(6.0).view(3, 2))
    teacher = FileTeacher(answers, "0").train()
    teacher.stay_near(torch.device("cpu"))
    views = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for epoch in (1, 2):
        assert teacher(views, torch.tensor([9, 2]), epoch).logits.tolist() == [[4, 5], [0, 1]]
    data = replace(some_digits(), labels=torch.ones(10, dtype=torch.int64), splits={"test": torch.tensor([2, 9])})
    assert teacher.accuracy(data, "test") == 1 and teacher.accuracy(data, "validation") is None
