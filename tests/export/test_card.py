"""How an exported folder describes its model: the card, config.yaml, and the origin of the weights."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from helpers import ALL, QUICK, Taught, no_store
from mlflow import MlflowClient
from omegaconf import DictConfig, OmegaConf

from kdpipe.assembly import finished_runs
from kdpipe.assembly.finished_runs import open_run
from kdpipe.export.predictor import open_predictor
from kdpipe.export.sources import SECTIONS
from kdpipe.export.writers import portable_config
from kdpipe.models.weights import metadata_in
from kdpipe.settings.saved import read_run_settings
from kdpipe.settings.schema import Settings
from kdpipe.tracking import RunStore


def squeezed(text: str) -> str:
    """Without the padding of tables."""
    return re.sub(" +", " ", text)


def test_the_card_describes_data_training_results_and_licence(taught: Taught, command: Callable) -> None:
    command("export", taught.student, "--out", "files", "--license", "Apache-2.0", *QUICK)
    text = Path("files/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["license"] == "apache-2.0" and "knowledge-distillation" in matter["tags"]
    accuracy = matter["model-index"][0]["results"][0]["metrics"][0]["value"]
    for expected in (
        "distilled from resnet20.",
        "449 test",
        "kdpipe.losses.KD",
        "temperature: 5",
        f"| test accuracy | {100 * accuracy:.2f} % |",
        "| student int8 |",
        "Test accuracy by class: ",
        f"with PyTorch {torch.__version__}, onnxruntime ",
        "Licence of the weights\n\nApache-2.0",
        "Training started from random weights.",
        f"- run: {taught.student} (student_cnn_distill_a0.5_T5_s0), seed 0\n- weights: runs:/{taught.student}\n",
    ):
        assert expected in squeezed(body), expected
    assert "The weights are those after" not in body

    command("export", taught.teacher, "--out", "alone", "--format", "safetensors", *QUICK)
    alone = Path("alone/README.md").read_text()
    assert "not stated" in alone and "license: unknown" in alone and "Trained on the labels alone" in alone


def test_the_code_of_the_card_predicts_what_the_command_predicts(
    taught: Taught, command: Callable, photo: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command("export", taught.student, "--out", "files", *QUICK)
    photo(0).save("files/photo.jpg")
    monkeypatch.chdir("files")
    example = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(example)
    answer, probability = capsys.readouterr().out.split()
    predicted = command("predict", ".", "photo.jpg")
    assert predicted.output.splitlines()[-1].split()[:3] == ["photo.jpg", answer, f"{100 * float(probability):.1f}"]


def test_the_card_and_the_config_describe_the_training(
    command: Callable, kdpipe: Callable, class_folders: Path
) -> None:
    shutil.copytree(class_folders / "temple", "more")
    photos = ["dataset=image_folder", f"dataset.root={class_folders}", "train.epochs=1", "train.threads=1"]
    store = ("--uri", f"sqlite:///{Path('outputs/mlflow.db').resolve()}")

    def trained(*words: str) -> str:
        run = kdpipe(*photos, "model=resnet20", *words)
        assert run.status == 0, run.errors
        return re.search(r"kdpipe\.export (\w+)", run.output)[1]

    def exported(run_id: str) -> tuple[str, DictConfig]:
        made = command("export", run_id, "--out", run_id, "--format", "safetensors", *QUICK, *store)
        assert made.status == 0, made.errors
        text = Path(run_id, "README.md").read_text()
        return text.split("## Data")[1].split("## Results")[0], OmegaConf.load(Path(run_id, "config.yaml"))

    teacher = trained("experiment=teacher")
    taught_by = ["model@teacher=resnet20", f"teacher.weights=runs:/{teacher}", "augmentation=crop_flip"]
    texts = {
        "teacher": f"Teacher: resnet20 (runs:/{teacher}), ",
        "method": "Method: CrossEntropy + Attention.",
        "also": "also:\n  _target_: kdpipe.losses.Attention\n  weight: 1000\n",
        "augmentation": "augmentation:\n  _target_: kdpipe.data.augmentation.CropFlip\n  flip: true\n",
        "mixup": "  mixup: 0.2\n",
        "cutmix": "  cutmix: 1\n",
        "clip_norm": "  clip_norm: 5\n",
        "select": "  select: best\n",
        "head": "Only the head was trained",
        "unlabelled": "In addition 20 unlabelled images (more, fingerprint ",
        "views": "distillation:\n  outputs: views\n  views: 2\n",
    }

    def found(card: str) -> set[str]:
        return {name for name, text in texts.items() if text in card}

    words = ["loss=cross_entropy", "loss@also=attention", "train.mixup=0.2", "train.cutmix=1", "train.clip_norm=5"]
    card, config = exported(trained(*taught_by, *words))
    assert found(card) == {"teacher", "method", "also", "augmentation", "mixup", "cutmix", "clip_norm"}
    assert config.also.weight == 1000 and config.augmentation.flip and config.distillation.outputs == "auto"

    more = [f"dataset.unlabelled_root={Path('more').resolve()}", "distillation.outputs=views", "distillation.views=2"]
    card, _ = exported(trained(*taught_by, *more, "model.freeze=backbone", "train.select=best"))
    assert found(card) == {"teacher", "augmentation", "head", "unlabelled", "views", "select"}
    assert "Method: KD." in card

    card, _ = exported(trained(*taught_by, *more, "loss.alpha=0", "loss@also=logit_mse", "also.alpha=0"))
    assert found(card) == {"augmentation"} and "Trained on the labels alone." in card and "Method" not in card

    members = f"runs:/{teacher}, runs:/{trained('experiment=teacher', 'seed=1')}"
    card, _ = exported(trained("model@teacher=ensemble", f"teacher.members=[{members}]", "teacher.shares=[1,3]"))
    assert found(card) == set() and f"Teacher: ensemble ({members}), " in card and "  shares:\n  - 1\n  - 3\n" in card

    card, _ = exported(trained("experiment=student", "train.epochs=0"))
    assert found(card) == set() and "Nothing was trained in this run." in card and "optimizer" not in card

    card, _ = exported(trained("model@teacher=resnet20", "loss=mutual"))
    assert (
        found(card) == set()
        and "Trained together with a second student (resnet20); each learned from the other." in card
    )


def test_a_run_of_an_older_version_with_less_config_is_exported(
    taught: Taught, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def less(file: Path) -> Settings:
        sections = {"model", "teacher", "dataset", "loss", "optimizer", "scheduler", "train"}
        return Settings.model_validate(read_run_settings(file).model_dump(include=sections, by_alias=True))

    monkeypatch.setattr(finished_runs, "read_run_settings", less)
    made = command("export", taught.student, "--out", "files", "--format", "safetensors", *QUICK)
    assert made.status == 0, made.errors
    assert "Method: KD." in Path("files/README.md").read_text()


def test_a_student_is_exported_without_its_missing_teacher(
    taught: Taught, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise ValueError("teacher.weights=runs:/0: there is no such run")

    monkeypatch.setattr("kdpipe.assembly.finished_runs.open_teacher", gone)
    made = command("export", taught.student, "--out", "files", "--format", "safetensors", *QUICK)
    assert made.status == 0 and "without its teacher, which cannot be opened: teacher.weights=runs:/0" in made.output
    assert "distilled from resnet20." in Path("files/README.md").read_text()


def test_the_config_next_to_the_weights_names_no_folders_and_no_store(taught: Taught, command: Callable) -> None:
    command("export", taught.student, "--out", "files", "--format", "safetensors", *QUICK)
    config = read_run_settings(Path("files/config.yaml"))
    assert config.model.name == "student_cnn" and config.dataset.name == "digits"
    assert config.model_fields_set <= {*SECTIONS}
    assert portable_config(open_run(taught.student, RunStore(taught.uri))) == Path("files/config.yaml").read_text()


def test_an_earlier_epoch_is_exported_without_the_results_of_the_last(taught: Taught, command: Callable) -> None:
    made = command("export", f"{taught.student}/epoch_1", "--out", "early", *QUICK)
    assert made.status == 0, made.errors
    text = squeezed(Path("early/README.md").read_text())
    assert "model-index" not in text and "test accuracy" not in text
    assert "| parameters | 189,854 |" in text
    assert open_predictor("early/model.onnx", no_store).temperature == 1
    run = MlflowClient(taught.uri).get_run(taught.student)
    assert "model/temperature" in run.data.metrics  # of the last epoch


def test_files_and_registry_name_the_epoch_of_the_weights(taught: Taught, command: Callable) -> None:
    address = f"runs:/{taught.student}/epoch_1"
    words = ("--out", "early", "--format", *ALL, "--register", "early", *QUICK)
    made = command("export", f"{address}.safetensors", *words)
    assert made.status == 0, made.errors
    for name in ("model.onnx", "model_int8.onnx"):
        metadata = {entry.key: entry.value for entry in onnx.load(f"early/{name}").metadata_props}
        assert (metadata["kdpipe.run"], metadata["kdpipe.weights"]) == (taught.student, address)
    assert metadata_in(Path("early/model.safetensors"))["kdpipe.weights"] == address
    version = MlflowClient(taught.uri).get_model_version_by_alias("early", "candidate")
    assert (version.tags["kdpipe.run"], version.tags["kdpipe.weights"]) == (taught.student, address)
    text = Path("early/README.md").read_text()
    assert "The weights are those after epoch 1 of 3." in text and f"- weights: {address}\n" in text
