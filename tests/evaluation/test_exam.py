"""The end of a run: metrics, predictions.csv, classes.csv, figures."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Taught
from mlflow import MlflowClient
from PIL import Image
from torch import nn

from kdpipe.assembly.finished_runs import open_data, open_run
from kdpipe.cost import cost_arguments, measure_cost
from kdpipe.data import ImageDataset
from kdpipe.evaluation.exam import (
    FILES,
    Exam,
    _most_differing,
    caveats,
    class_frame,
    prediction_frame,
    require_finite,
    write_exam,
)
from kdpipe.evaluation.figures import as_png, draw_confusion
from kdpipe.evaluation.inference import evaluate, logits_of
from kdpipe.runs.names import DIFFERING
from kdpipe.system.hardware import Hardware
from kdpipe.tracking import RunStore

TEACHER = ["experiment=teacher", "model=resnet20", "dataset=digits", "train.epochs=1", "train.threads=1"]
DISTILL = ["experiment=distill", "model@teacher=resnet20", "dataset=digits", "train.epochs=3", "train.threads=1"]
DISTILL += ["train.batch_size=50", "optimizer.lr=3e-3"]
NAMES = ("cat", "dog, large", "$x$ 鳥")


def exam(**changes: torch.Tensor | None) -> tuple[Exam, ImageDataset]:
    """Five images of three classes; the student gets three right, the teacher four."""
    labels = torch.tensor([0, 0, 1, 1, 2])
    student = 3 * torch.eye(3)[torch.tensor([0, 1, 1, 2, 2])]
    teacher = 9 * torch.eye(3)[torch.tensor([0, 0, 1, 2, 2])]
    images = torch.randint(0, 256, (10, 3, 6, 8), dtype=torch.uint8)
    positions = torch.tensor([1, 3, 5, 7, 9])
    data = ImageDataset("five", images, torch.zeros(10).long(), NAMES, {"test": positions}, "")
    return Exam(**{"positions": positions, "labels": labels, "student": student, "teacher": teacher, **changes}), data


def test_predictions_have_a_line_for_each_image() -> None:
    taken, data = exam()
    table = prediction_frame(taken, data.class_names)
    assert [*table] == ["image", "label", "answer", "probability", "teacher_answer", "teacher_probability"]
    assert [*table.loc[1]] == [3, "cat", "dog, large", "0.9094", "cat", "0.9998"]
    alone, _ = exam(teacher=None)
    assert [*prediction_frame(alone, data.class_names).loc[1]] == [3, "cat", "dog, large", "0.9094"]


def test_classes_have_a_line_each_with_what_they_are_mistaken_for() -> None:
    taken, data = exam()
    table = class_frame(taken, data.class_names)
    assert [*table] == ["class", "images", "accuracy", "teacher_accuracy", "mistaken_for", "mistaken"]
    assert table.to_numpy().tolist() == [
        ["cat", 2, "0.5000", "1.0000", "dog, large", 1],
        ["dog, large", 2, "0.5000", "0.5000", "$x$ 鳥", 1],
        ["$x$ 鳥", 1, "1.0000", "1.0000", "", 0],
    ]


def test_a_class_without_test_images_is_no_error() -> None:
    taken, data = exam(labels=torch.tensor([0, 0, 1, 1, 1]))
    assert [*class_frame(taken, data.class_names).loc[2]] == ["$x$ 鳥", 0, "", "", "", 0]
    assert taken.metrics()["test/accuracy"] == 0.4


def test_files_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    taken, data = exam()
    assert [file.name for file in write_exam(taken, data, tmp_path, with_figures=True)] == list(FILES)
    for name in FILES[2:]:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 500
    content = list(csv.reader((tmp_path / "predictions.csv").open(newline="")))
    assert content[5][1] == "$x$ 鳥" and content[3][1] == "dog, large"
    assert (tmp_path / "classes.csv").read_bytes().decode().splitlines(keepends=True)[:2] == [
        "class,images,accuracy,teacher_accuracy,mistaken_for,mistaken\n",
        'cat,2,0.5000,1.0000,"dog, large",1\n',
    ]
    alone, _ = exam(teacher=None)
    write_exam(alone, data, tmp_path, with_figures=True)
    assert not (tmp_path / DIFFERING).exists()
    write_exam(alone, data, tmp_path, with_figures=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["classes.csv", "predictions.csv"]


@pytest.mark.parametrize("classes", [2, 10, 40, 100])
def test_a_confusion_matrix_of_any_number_of_classes_can_be_drawn(classes: int) -> None:
    counts = torch.eye(classes).long().numpy() * 7
    assert as_png(draw_confusion(counts, [f"a class with a long name {number}" for number in range(classes)]))


def test_the_image_with_the_largest_difference_comes_first() -> None:
    """The second one, at position 3: they agree on all others, on a wrong answer, too."""
    taken, data = exam()
    images, captions = _most_differing(taken, taken.teacher, data)
    assert captions[0] == ("cat", "dog, large", "0.9094", "cat", "0.9998")
    assert torch.equal(images[0], data.images[3]) and len(images) == len(captions) == 5


def test_the_end_of_a_run(kdpipe: Callable, tmp_path: Path) -> None:
    """What a teacher and its student log, and what `kdpipe.cost` finds of them afterwards."""
    assert kdpipe(*TEACHER).status == 0
    outcome = kdpipe(*DISTILL, "evaluation.pictures=true", "evaluation.timing_seconds=0.1")
    assert outcome.status == 0, outcome.errors
    for expected in (
        "calibration error",
        "agrees with it",
        "MFLOP",
        "times less / faster",
        "ms for an image, median (95 %), one thread",
    ):
        assert expected in outcome.output
    client = MlflowClient(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("kdpipe").experiment_id
    (run,) = client.search_runs([experiment], "tags.`kdpipe.stage` = 'distill'")
    metrics = run.data.metrics
    assert metrics["model/params"] == 189854 and metrics["teacher/params"] == 269722
    assert metrics["model/temperature"] > 0 and metrics["test/ece_scaled"] < metrics["test/ece"]
    assert metrics["test/loss_scaled"] < metrics["test/loss"]
    assert 0 <= metrics["teacher/agreement_where_wrong"] <= 1
    assert run.data.tags["kdpipe.image_shape"] == "1x8x8" and "cpu" in run.data.tags["kdpipe.timed_on"]
    assert set(FILES) <= {file.path for file in client.list_artifacts(run.info.run_id)}

    written = tmp_path / "outputs" / "runs" / run.data.tags["kdpipe.identity"] / "predictions.csv"
    lines = list(csv.DictReader(written.open(newline="")))
    right = [line["label"] == line["answer"] for line in lines]
    agree = [line["teacher_answer"] == line["answer"] for line in lines]
    assert sum(right) / len(lines) == pytest.approx(metrics["test/accuracy"])
    assert sum(agree) / len(lines) == pytest.approx(metrics["teacher/agreement"])

    output = measure_cost(cost_arguments([run.info.run_id, "--seconds", "0.2"]))
    assert "resnet20" in output and "student_cnn" in output and f"logged to run {run.info.run_id}" in output
    after = client.get_run(run.info.run_id)
    assert after.info.status == "FINISHED" and after.info.end_time == run.info.end_time
    assert after.data.metrics["model/flops"] == metrics["model/flops"]
    assert after.data.metrics["model/latency_ms"] != metrics["model/latency_ms"]


def test_times_of_a_student_whose_teacher_is_gone_are_not_logged(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise ValueError("teacher.weights=teacher.pt: file not found")

    monkeypatch.setattr("kdpipe.assembly.finished_runs.open_teacher", gone)
    before = MlflowClient(taught.uri).get_run(taught.student).data
    output = measure_cost(cost_arguments([taught.student, "--uri", taught.uri, "--seconds", "0.1"]))
    assert "student_cnn" in output and "resnet20" not in output
    assert "without its teacher, which cannot be opened: teacher.weights=teacher.pt: file not found" in output
    assert output.endswith("; not logged")
    after = MlflowClient(taught.uri).get_run(taught.student).data
    assert (after.metrics, after.tags) == (before.metrics, before.tags)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing"], "runs:/nothing: no such run in "),
        (["nothing", "--seconds", "0"], "--seconds 0: expected a number above 0"),
        (["nothing", "--threads", "0"], "--threads 0: expected a whole number from 1 "),
        (["nothing", "--device", "cuda:99"], "--device cuda:99: expected "),
        (["nothing", "--uri", "sqlite:///nowhere.db"], "nowhere.db: MLflow store not found"),
    ],
)
def test_bad_arguments_are_one_line_errors(kdpipe: Callable, words: list[str], expected: str) -> None:
    with pytest.raises(ValueError) as error:
        measure_cost(cost_arguments(words))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_the_trained_head_of_a_frozen_backbone_is_examined(kdpipe: Callable, tmp_path: Path) -> None:
    """It learns from features, and its answers are those of the whole network to the images."""
    assert kdpipe(*TEACHER, "model.freeze=backbone").status == 0
    (file,) = (tmp_path / "outputs" / "runs").glob("*/predictions.csv")
    client = MlflowClient(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])
    whole = open_run(run.info.run_id, RunStore(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}"))
    with torch.no_grad():
        logits = whole.classifier(open_data(whole).images)
    lines = list(csv.DictReader(file.open(newline="")))
    assert len(lines) == 449
    for line in lines:
        probability, answer = logits[int(line["image"])].softmax(dim=0).max(dim=0)
        assert float(line["probability"]) == pytest.approx(float(probability), abs=1e-3)
        assert line["answer"] == str(int(answer)) or probability < 0.2


def test_constant_predictions_and_classes_without_images_are_reported() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 4)
    exam = Exam(torch.arange(4), torch.tensor([0, 1, 0, 1]), logits, teacher=logits.flip(0).roll(1, dims=1))
    assert caveats(exam, ("cat", "dog", "owl")) == [
        "the trained network predicts cat for all 4 test images",
        "its teacher predicts dog for all 4 test images",
        "no test images of owl: the metrics say nothing about them",
    ]
    assert caveats(Exam(torch.arange(3), torch.arange(3), torch.eye(3)), ("cat", "dog", "owl")) == []


def test_logits_that_are_not_finite_are_an_error() -> None:
    logits = torch.zeros(5, 3)
    logits[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^the teacher resnet20 has .* NaN or infinite for 1 of 5 test images$"):
        require_finite("the teacher resnet20", logits)


@pytest.mark.parametrize("run", [evaluate, logits_of])
def test_a_model_is_in_training_mode_again_after_an_error(run: Callable) -> None:
    class Failing(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert not self.training
            raise KeyboardInterrupt

    _, data = exam()
    model = Failing().train()
    with pytest.raises(KeyboardInterrupt) as error:  # which holds on to the frames of `run`
        run(model, data, "test", Hardware(torch.device("cpu")))
    assert model.training and error.tb


def test_a_sum_over_processes_is_a_new_tensor() -> None:
    values = torch.ones(2)
    total = Hardware(torch.device("cpu")).sum(values)
    assert torch.equal(total, values)
    assert total.data_ptr() != values.data_ptr()
