"""Every mistake ends in one line that names the key, the value and what was expected."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_refused

from kdpipe.settings.errors import ConfigError, one_line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=resnt20"], ["model=resnt20", "did you mean resnet20", "student_cnn"]),
        (["experiment=teachr"], ["experiment=teachr", "did you mean teacher"]),
        (["modle=resnet20"], ["modle: no such key", "did you mean model"]),
        (["loss.alfa=1"], ["loss.alfa: no such key", "did you mean loss.alpha"]),
        (["alpha=1"], ["alpha: no such key", "did you mean loss.alpha"]),
        (["train.bach_size=3"], ["did you mean train.batch_size"]),
        (["loss=cross_entropy", "loss.alpha=0.5"], ["loss.alpha: no such key"]),
        (["loss.alpha=[1"], ["loss.alpha=[1", "expected key=value"]),
        (["loss.alpha=2"], ["loss.alpha=2", "expected a number from 0 to 1"]),
        (["loss.alpha=-0.1"], ["loss.alpha=-0.1", "expected a number from 0 to 1"]),
        (["loss.temperature=0"], ["loss.temperature=0", "expected a number above 0"]),
        (["loss.temperature=abc"], ["loss.temperature=abc", "expected a number above 0"]),
        (["loss.class_weight=balanced"], ["loss.class_weight: no such key", "did you mean loss.class_weights"]),
        (["loss.class_weights=even"], ["loss.class_weights=even", "balanced, a list", "for each class, or null"]),
        (["loss.class_weights=[1,0]"], ["loss.class_weights=[1,0]", "a number above 0 for each class"]),
        (
            ["experiment=student", "dataset=digits", "loss.class_weights=[1,2]"],
            ["loss.class_weights=[1,2]", "expected 10 numbers, one for each class"],
        ),
        (["loss@also=dist", "+also.class_weights=balanced"], ["also.class_weights=balanced", "expected one of beta"]),
        (["dataset.sampler=even"], ["dataset.sampler=even", "expected balanced or null"]),
        (["train.metric=f1"], ["train.metric=f1", "accuracy, balanced_accuracy, macro_f1"]),
        (["loss=kd_tutorial", "loss.temperature=null"], ["loss.temperature=null", "above 0"]),
        (["seed=-1"], ["seed=-1", "expected a whole number from 0"]),
        (["stage=pupil"], ["stage=pupil", "student, teacher"]),
        (["train.epochs=1.5"], ["train.epochs=1.5", "expected a whole number from 0"]),
        (["train.batch_size=0"], ["train.batch_size=0", "expected a whole number from 1"]),
        (["train.threads=0"], ["train.threads=0", "expected a whole number from 1"]),
        (["train.precision=half"], ["train.precision=half", "auto, float32, bfloat16"]),
        (["train.resume=yes"], ["train.resume=yes", "auto, never"]),
        (["train.select=first"], ["train.select=first", "last, best, ema"]),
        (["train.select=ema"], ["train.select=ema", "expected train.ema with it"]),
        (["train.ema=1"], ["train.ema=1", "expected a number above 0 below 1 or null"]),
        (["train.ema=0.9", "train.epochs=0"], ["train.ema=0.9", "null with train.epochs=0"]),
        (["experiment=mutual", "train.ema=0.9"], ["train.ema=0.9", "second student are not averaged"]),
        (["train.accumulate=0"], ["train.accumulate=0", "expected a whole number from 1"]),
        (["train.early_stop=0"], ["train.early_stop=0", "expected a whole number from 1 or null"]),
        (["dataset=digits", "dataset.val_fraction=0", "train.early_stop=3"], ["train.early_stop=3", "val_fraction"]),
        (["train.device=cpu", "train.precision=float16"], ["train.precision=float16", "float32 or bfloat16 on this"]),
        (["train.compile=fastest"], ["train.compile=fastest", "default, reduce-overhead, max-autotune"]),
        (["loss.label_smoothing=1"], ["loss.label_smoothing=1", "expected a number from 0 below 1"]),
        (["loss=label_smoothing", "loss.label_smoothing=0.1"], ["loss.label_smoothing=0.1", "loss.smoothing"]),
        (["loss@also=dist", "+also.label_smoothing=0.1"], ["also.label_smoothing=0.1", "expected one of beta"]),
        (["loss=bce", "loss.threshold=2"], ["loss.threshold=2", "expected a number above 0 to 1 or null"]),
        (["loss=hard", "loss.alpha=2"], ["loss.alpha=2", "expected a number from 0 to 1"]),
        (["optimizer.decay_norm_and_bias=some"], ["optimizer.decay_norm_and_bias=some", "true or false"]),
        (["optimizer.layer_decay=1.5"], ["optimizer.layer_decay=1.5", "expected a number above 0 to 1 or null"]),
        (
            ["experiment=student", "dataset=digits", "optimizer.layer_decay=0.75"],
            ["optimizer.layer_decay=0.75", "StudentCNN does not say what its layers are"],
        ),
        (
            ["model=resnet20", "model.freeze=backbone", "optimizer.layer_decay=0.75"],
            ["optimizer.layer_decay=0.75", "the head alone is trained"],
        ),
        (["optimizer=lion", "optimizer.lr=0"], ["optimizer.lr=0", "expected a number above 0"]),
        (["scheduler=onecycle", "scheduler.pct_start=1"], ["scheduler.pct_start=1", "a number above 0 below 1"]),
        (["scheduler=onecycle", "optimizer=adafactor"], ["scheduler._target_=", "`cycle_momentum`"]),
        (
            ["scheduler=multistep", "scheduler.milestones=[3]", "scheduler.warmup_epochs=5"],
            ["scheduler.milestones=3", "expected epochs after warmup_epochs=5"],
        ),
        (["train.device=tpu"], ["train.device=tpu", "auto", "cpu"]),
        (["train.compile=maybe"], ["train.compile=maybe", "auto, true, false"]),
        (["evaluation.pictures=5"], ["evaluation.pictures=5", "true or false"]),
        (["distillation.outputs=twice"], ["distillation.outputs=twice", "auto, cached, online, views"]),
        (["distillation.outputs=views"], ["distillation.outputs=views", "there is only one view"]),
        (["augmentation=crop_flip", "distillation.outputs=cached"], ["distillation.outputs=cached", "views"]),
        (["distillation.views=0"], ["distillation.views=0", "expected a whole number from 1"]),
        (["distillation.cache_max_gb=-1"], ["distillation.cache_max_gb=-1", "expected a number from 0"]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1", "expected a number above 0"]),
        (["optimizer=sgd", "optimizer.momentum=-1"], ["optimizer.momentum=-1", "expected a number from 0"]),
        (["scheduler=cosine", "scheduler.warmup_epochs=20"], ["scheduler.warmup_epochs=20", "from 0 to 10"]),
        (["scheduler=multistep", "scheduler.milestones=[0]"], ["scheduler.milestones=0", "from 1"]),
        (["augmentation=crop_flip", "augmentation.flip=maybe"], ["augmentation.flip=maybe", "true or false"]),
        (["dataset=digits", "dataset.val_fraction=1.5"], ["dataset.val_fraction=1.5", "from 0 below 1"]),
        (["dataset=digits", "dataset.test_fraction=0"], ["dataset.test_fraction=0", "above 0"]),
        (["dataset=digits", "dataset.train_fraction=0.001"], ["dataset.train_fraction=0.001", "10 classes"]),
        (["dataset=digits", "dataset.val_fraction=0", "train.select=best"], ["train.select=best", "val_fraction"]),
        (["teacher=resnet20"], ["teacher=resnet20", "model@teacher=… chooses the teacher"]),
        (["dataset=dogs_vs_cats", "dataset.root="], ["dataset.root=: expected a folder"]),
        (["dataset=image_folder", "dataset.root=Bücher"], ["Bücher", "in quotes"]),
        (["dataset=image_folder"], ["dataset.root: a value is required"]),
        (["dataset=image_folder", "dataset.root=nowhere"], ["dataset.root=nowhere", "no such folder"]),
        (["dataset=dogs_vs_cats", "dataset.root=nowhere"], ["dataset.root=nowhere", "train.zip"]),
        (["tracking.uri=outputs"], ["tracking.uri=outputs", "sqlite:///FILE"]),
        (["tracking.uri=http://127.0.0.1:9"], ["tracking.uri=http://127.0.0.1:9", "no tracking server answers"]),
        (["tracking.experiment=''"], ["tracking.experiment=", "expected a name"]),
        (["dataset=digits", "model@teacher=resnet20"], ["teacher.weights=auto", "experiment=teacher dataset=digits"]),
        (["dataset=digits", "teacher.weights=null"], ["teacher.weights=null", "auto, a file or runs:/<run id>"]),
        (["dataset=digits", "teacher.weights=imagenet"], ["teacher.weights=imagenet", "auto, a file or"]),
        (["dataset=digits", "model.weights=no.pth"], ["model.weights=no.pth", "not found"]),
        (["model@teacher=resnet20", "dataset=digits", "teacher.shortcut=C"], ["teacher.shortcut=C", "A, B"]),
        (
            ["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=true"],
            ["optimizer._target_=torch.optim.SGD"],
        ),
        (["dataset=digits", "teacher.weights=no.pth"], ["teacher.weights=no.pth", "not found"]),
        (["dataset=digits", "teacher.weights=runs:/0"], ["teacher.weights=runs:/0", "run not found"]),
        (["dataset=digits", "loss.alpha=0", "model.weights=imagenet"], ["model.weights=imagenet", "student_cnn"]),
        (["dataset=digits", "loss.alpha=0", "model.freeze=all"], ["model.freeze=all", "none, backbone"]),
        (["dataset=digits", "loss.alpha=0", "model.image_size=64"], ["model.image_size=64", "student_cnn"]),
        (["dataset=digits", "loss.alpha=0", "model=resnet20", "model.shortcut=C"], ["model.shortcut=C", "A, B"]),
        (["+metrics=f1"], ["metrics: no such key"]),
        (["+train.epoch=3"], ["train.epoch: no such key", "did you mean train.epochs"]),
        (["+loss.alfa=1"], ["loss.alfa=1", "did you mean alpha", "one of alpha, temperature, standardize"]),
        (
            ["loss._target_=torch.nn.CrossEntropyLoss"],
            ["loss._target_=torch.nn.CrossEntropyLoss", "kdpipe.losses.Loss"],
        ),
        (["loss._target_=timm.loss.BinaryCrossEntropy"], ["loss._target_=timm.loss", "kdpipe.losses.Loss"]),
        (["+also._target_=torch.nn.MSELoss"], ["also._target_=torch.nn.MSELoss", "kdpipe.losses.Loss"]),
        (["dataset.split_seed=-1"], ["dataset.split_seed=-1", "a whole number from 0 to 4294967295"]),
        (["loss=cross_entropy", "loss@also=label_smoothing"], ["also=", "a method of distillation"]),
        (["loss=dkd", "train.mixup=0.2"], ["train.mixup=0.2", "expected null"]),
        (["loss.alpha=0,0.5"], ["loss.alpha=0,0.5", "a sweep: python -m kdpipe -m loss.alpha=0,0.5"]),
        (["seed=range(3)"], ["seed=range(3)", "-m seed=range(3)"]),
        (["output_dir=a,b"], ["output_dir=a,b", "-m output_dir=a,b", "'output_dir=\"a,b\"'"]),
        (["loss.alpha", "=0.5"], ["loss.alpha: cannot be parsed", "without spaces around ="]),
        (["optimizer=0.1"], ["optimizer=0.1: expected one of adafactor, adam, adamw", "optimizer.<key>=…"]),
        (["model@teacher=5"], ["model@teacher=5: expected one of", "teacher.<key>=…"]),
        (["loss=null"], ["loss=null: expected one of"]),
        (["loss=KD"], ["loss=KD", "did you mean kd?"]),
        (["model=resnet18"], ["model=resnet18", "did you mean model=torchvision model.name=resnet18?"]),
        (["model=ResNet-18"], ["model=ResNet-18", "did you mean model=torchvision model.name=resnet18?"]),
        (["model=resnet_20"], ["model=resnet_20", "did you mean resnet20?"]),
        (["model=convnext_atto"], ["did you mean model=timm model.name=convnext_atto?"]),
        (["model@teacher=swin_t"], ["model@teacher=swin_t", "model@teacher=torchvision teacher.name=swin_t?"]),
        (["dataset=./photos"], ["did you mean dataset=image_folder dataset.root=./photos?"]),
        (["experiment=benchmark"], ["experiment=benchmark", "benchmark/resnet56_resnet20"]),
        (["loss@also=dits"], ["loss@also=dits", "did you mean dist?"]),
        (["model@techer=resnet20"], ["model@techer: no such group", "did you mean model@teacher?"]),
        (["scheduler={gama: 3}"], ["scheduler.gama: no such key", "did you mean scheduler.gamma?"]),
        (["optimizer={_target_: torch.optim.SGD, momentun: 1}"], ["optimizer.momentun: no such key"]),
        (
            ["optimizer.learning_rate=1"],
            ["optimizer.learning_rate: no such key", "expected one of optimizer.", "optimizer.lr,"],
        ),
        (["optimizer.momentum=1"], ["optimizer.momentum: no such key with optimizer=adam", "optimizer=sgd have it"]),
        (["optimizer.eps=1e-5"], ["optimizer.eps: no such key", "+optimizer.eps=… adds it"]),
        (["also.weight=3"], ["also.weight: no such key with loss@also=null", "loss@also=attention"]),
        (["train.lr=1"], ["train.lr: no such key", "did you mean optimizer.lr?"]),
        (["+loss.alpha=0.3"], ["+loss.alpha=0.3", "write loss.alpha=0.3, without +"]),
        (["+model=resnet20"], ["+model=resnet20", "write model=resnet20, without +"]),
        (["~sed"], ["sed: no such key", "did you mean seed?"]),
        (["hydra/launcher=joblib", "hydra.launcher.n_job=3"], ["did you mean hydra.launcher.n_jobs?", "--cfg hydra"]),
        (["hydra.launcher.n_jobs=3"], ["hydra.launcher.n_jobs: no such key", "hydra/launcher=joblib has it"]),
        (["++loss.bta=2"], ["++loss.bta: no such key", "did you mean loss.beta?"]),
        (["-m", "loss=kd,dkd", "++loss.bta=2"], ["++loss.bta: no such key", "did you mean loss.beta?"]),
        (
            ["-m", "loss=cross_entropy,kd", "loss.alpha=0.5"],
            ["loss.alpha: no such key with loss=cross_entropy", "loss=kd", "++loss.alpha=…"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_a_bad_value_ends_in_one_line(kdpipe: Callable, overrides: list[str], said: list[str]) -> None:
    assert_refused(kdpipe(*overrides), *said)


def test_an_unwritable_output_folder_is_named(kdpipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    outcome = kdpipe("dataset=digits", "output_dir=taken")
    assert_refused(outcome, "taken", "output_dir")


def test_a_file_that_is_no_database_is_refused_as_a_store(kdpipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database")
    outcome = kdpipe("dataset=digits", "loss.alpha=0", f"tracking.uri=sqlite:///{tmp_path / 'notes.txt'}")
    assert_refused(outcome, "notes.txt is not a sqlite database")


def test_weights_of_another_network_are_refused(kdpipe: Callable) -> None:
    trained = kdpipe("dataset=digits", "experiment=teacher", "model=resnet20", "train.epochs=0")
    assert trained.status == 0, trained.errors
    weights = next(Path("outputs/runs").glob("*/model.safetensors"))
    outcome = kdpipe("dataset=digits", "model@teacher=resnet32", f"teacher.weights={weights}")
    assert_refused(outcome, f"model@teacher=resnet32: the network of teacher.weights={weights} is resnet20; expected")


def test_out_of_memory_says_what_to_lower() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert "out of memory; lower train.batch_size or the image size" in one_line(caught.value)


def test_the_traceback_is_there_for_those_who_ask(kdpipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match=r"loss\.alpha=2"):
        kdpipe("loss.alpha=2")
