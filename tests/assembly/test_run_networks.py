"""Weights come with the network that they were trained in, whatever the defaults of the command that names them."""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from helpers import assert_refused, exit_status, in_a_hurry
from mlflow import MlflowClient
from mlflow.entities import Run

from kdpipe import main
from kdpipe.assembly.finished_runs import open_run
from kdpipe.assembly.networks import build_model
from kdpipe.assembly.run_networks import network_differences, replaced
from kdpipe.data import ImageDataset
from kdpipe.export.predictor import model_metadata
from kdpipe.export.writers import portable_config, write_weights
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Settings
from kdpipe.tracking import RunStore

DIGITS = ["dataset=digits", "train.threads=1", "train.batch_size=50"]
# At 16 pixels and with a mean and std of its own: at the defaults of its option it is worthless.
NETWORK = ["model=resnet20", "model.depth=8", "model.image_size=16", "model.mean=[0,0,0]", "model.std=[1,1,1]"]
TEACHER = [*DIGITS, "experiment=teacher", "train.epochs=3", "optimizer.lr=3e-3", "train.keep_epochs=[1]"]
# Only what the teacher says counts here.
EXAM = [*DIGITS, "model=resnet20", "model.depth=8", "model.image_size=8", "train.epochs=0"]
DISTILL = [*EXAM, "train.epochs=1"]


@dataclass
class Store:
    """A store with finished runs; what a command needs to find them."""

    folder: Path
    run: Run

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'outputs' / 'mlflow.db'}"

    @property
    def address(self) -> str:
        return f"runs:/{self.run.info.run_id}"

    @property
    def here(self) -> str:
        return f"tracking.uri={self.uri}"

    @property
    def artifacts(self) -> Path:
        return Path(self.run.info.artifact_uri.removeprefix("file://"))

    def newest(self, number: int = 1) -> list[Run]:
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("kdpipe").experiment_id
        found = client.search_runs([experiment], "tags.kdpipe.identity != ''", order_by=["start_time DESC"])
        return list(found)[:number]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, store_template: Path) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "outputs").mkdir()
    shutil.copy(store_template, folder / "outputs" / "mlflow.db")
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(folder)
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        environment.setenv("HYDRA_FULL_ERROR", "0")
        environment.setattr(sys, "argv", ["kdpipe", *in_a_hurry([*TEACHER, *NETWORK])])
        assert exit_status(main.cli) == 0
    (run,) = Store(folder, None).newest()
    assert run.data.metrics["test/accuracy"] > 0.9
    yield Store(folder, run)


def exported(store: Store, folder: Path) -> Path:
    """The run's safetensors as `kdpipe.export` writes them, with the config beside them."""
    folder.mkdir()
    run = open_run(store.address, RunStore(store.uri))
    write_weights(run, folder / "model.safetensors", model_metadata(run))
    (folder / "config.yaml").write_text(portable_config(run))
    return folder / "model.safetensors"


def assert_is_taught_by_it(store: Store) -> Run:
    """The newest run has the store's run as its teacher, as it was trained."""
    (student,) = store.newest()
    assert student.data.metrics["teacher/accuracy"] == pytest.approx(store.run.data.metrics["test/accuracy"], abs=2e-3)
    for key in ("_target_", "depth", "image_size", "mean", "std"):
        assert student.data.params[f"teacher.{key}"] == store.run.data.params[f"model.{key}"], key
    return student


@pytest.mark.parametrize("option", [["model@teacher=resnet20"], []], ids=["resnet20", "densenet121 by default"])
def test_a_run_s_network_comes_with_its_weights(kdpipe: Callable, store: Store, option: list[str]) -> None:
    outcome = kdpipe(*EXAM, *option, store.here, f"teacher.weights={store.address}", "train.resume=never")
    assert outcome.status == 0, outcome.errors
    student = assert_is_taught_by_it(store)
    assert "the run's own network, resnet20, with " in outcome.output and "image_size=16" in outcome.output
    # The run stands in the folder of its identity, with the network that taught it in its config.
    config = yaml.safe_load(Path("outputs/runs", student.data.tags["kdpipe.identity"], "config.yaml").read_text())
    assert config["teacher"]["image_size"] == 16


def test_the_weights_of_an_epoch_and_a_command_that_says_it_all_are_the_same_runs(
    kdpipe: Callable, store: Store
) -> None:
    said = [word.replace("model", "teacher", 1) for word in NETWORK[1:]]
    for weights in (store.address, f"{store.address}/epoch_1"):
        command = [*EXAM, "model@teacher=resnet20", store.here, f"teacher.weights={weights}"]
        assert kdpipe(*command).status == 0
        assert "already finished" in kdpipe(*command, *said).output


def test_files_come_with_the_config_beside_them(kdpipe: Callable, store: Store, tmp_path: Path) -> None:
    file = exported(store, tmp_path / "export")
    for weights in (file, store.artifacts / "model.safetensors"):
        outcome = kdpipe(*EXAM, "model@teacher=resnet20", store.here, f"teacher.weights={weights}")
        assert outcome.status == 0, outcome.errors
        assert_is_taught_by_it(store)
    refused = kdpipe(*EXAM, store.here, f"teacher.weights={file}", "teacher.image_size=32")
    assert_refused(refused, f"teacher.image_size=32: teacher.weights={file} was trained with 16")
    file.with_name("config.yaml").unlink()
    alone = kdpipe(*DISTILL, "model@teacher=resnet20", "teacher.depth=8", store.here, f"teacher.weights={file}")
    assert "config.yaml is not beside it" in alone.output + alone.errors
    # It still says which run it is from, whose accuracy is known.
    assert_refused(alone, f"teacher.weights={file}: ", "% of the 449 test images are right here", "in its own run")


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (["model@teacher=vgg8"], "model@teacher=vgg8: the network of teacher.weights={} is resnet20;"),
        (["model@teacher=resnet56"], "model@teacher=resnet56: the network of teacher.weights={} is resnet20;"),
        (["model@teacher=resnet20", "teacher.image_size=32"], "teacher.image_size=32: teacher.weights={} was trained"),
        (["model@teacher=resnet20", "teacher.depth=20"], "teacher.depth=20: teacher.weights={} was trained with 8;"),
        (["teacher.mean=[0.5,0.5,0.5]"], "teacher.mean=[0.5,0.5,0.5]: teacher.weights={} was trained with [0,0,0];"),
        (["++teacher.widths=[8,8,16,32]"], "teacher.widths=[8,8,16,32]: teacher.weights={} was trained without it;"),
        (["experiment=mine"], "teacher.std=[2,2,2]: teacher.weights={} was trained with [1,1,1];"),
    ],
)
def test_what_a_command_says_otherwise_is_refused(
    kdpipe: Callable, store: Store, tmp_path: Path, stated: list[str], said: str
) -> None:
    file = tmp_path / "conf" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\ndefaults: [override /model@teacher: resnet20]\nteacher: {std: [2, 2, 2]}")
    refused = kdpipe("--config-dir=conf", *EXAM, *stated, store.here, f"teacher.weights={store.address}")
    assert_refused(refused, said.format(store.address))


def test_first_weights_come_with_their_network_too(kdpipe: Callable, store: Store) -> None:
    first = [*DIGITS, store.here, f"model.weights={store.address}", "train.epochs=0", "experiment=student"]
    outcome = kdpipe(*first)
    assert outcome.status == 0, outcome.errors
    (run,) = store.newest()
    assert run.data.metrics["test/accuracy"] == store.run.data.metrics["test/accuracy"]
    assert run.data.params["model.image_size"] == "16"
    assert_refused(
        kdpipe(*first, "model=vgg8"), f"model=vgg8: the network of model.weights={store.address} is resnet20"
    )
    assert_refused(kdpipe(*first, "model.image_size=128"), "model.image_size=128: ", "was trained with 16")


def test_each_cell_of_a_sweep_has_the_network_of_its_run(kdpipe: Callable, store: Store) -> None:
    other = ["model=resnet32", "model.depth=8", "model.image_size=8"]
    assert kdpipe(*TEACHER, *other, store.here).status == 0
    (second,) = store.newest()
    weights = f"teacher.weights={store.address},runs:/{second.info.run_id}"
    outcome = kdpipe("-m", *EXAM, weights, store.here, "seed=3")
    assert outcome.status == 0, outcome.errors
    students = {run.data.tags["kdpipe.teacher_run"]: run for run in store.newest(2)}
    for teacher in (store.run, second):
        found = students[teacher.info.run_id].data
        assert found.metrics["teacher/accuracy"] == pytest.approx(teacher.data.metrics["test/accuracy"], abs=2e-3)
        assert found.params["teacher.image_size"] == teacher.data.params["model.image_size"]


def test_a_chain_that_begins_with_a_run(kdpipe: Callable, store: Store) -> None:
    links = ["experiment=born_again", "chain=[{loss:cross_entropy},{}]", "train.epochs=0"]
    outcome = kdpipe(*DIGITS, *links, store.here, f"model.weights={store.address}")
    assert outcome.status == 0, outcome.errors
    (second,) = store.newest()
    first = MlflowClient(store.uri).get_run(second.data.tags["kdpipe.teacher_run"])
    assert first.data.params["model.image_size"] == second.data.params["teacher.image_size"] == "16"
    assert second.data.metrics["teacher/accuracy"] == pytest.approx(first.data.metrics["test/accuracy"], abs=2e-3)


def test_the_teacher_that_is_found_has_the_arguments_that_only_its_run_has(kdpipe: Callable) -> None:
    narrow = ["model=resnet20", "model.depth=8", "model.image_size=8", "++model.widths=[8,8,16,32]"]
    assert kdpipe(*TEACHER, *narrow).status == 0
    outcome = kdpipe(*EXAM, "model@teacher=resnet20", "teacher.depth=8", "teacher.image_size=8")
    assert outcome.status == 0, outcome.errors


def test_a_teacher_that_is_worse_than_in_its_own_run_stops_the_run(kdpipe: Callable, store: Store) -> None:
    weights, last = store.artifacts / "model.safetensors", store.run.data.metrics["test/accuracy"]
    before = weights.read_bytes()
    try:
        shutil.copy(store.artifacts / "epoch_1.safetensors", weights)
        outcome = kdpipe(*DISTILL, store.here, f"teacher.weights={store.address}", "seed=8")
        members = f"teacher.members=[{store.address}]"
        ensemble = kdpipe(*DISTILL, store.here, "model@teacher=ensemble", members, "seed=8")
    finally:
        weights.write_bytes(before)
    own = f"{100 * last:.1f} % were in its own run"
    assert_refused(outcome, f"teacher.weights={store.address}: ", " of the 449 test images are right here", own)
    assert_refused(ensemble, f"teacher.members={store.address}: ", own)
    assert "epoch 1/1" not in outcome.output + ensemble.output
    early, late = (store.artifacts / f"epoch_1.{kind}" for kind in ("safetensors", "kept"))
    shutil.move(early, late)
    try:
        early.write_bytes(before)
        better = kdpipe(*DISTILL, store.here, f"teacher.weights={store.address}/epoch_1", "seed=8")
    finally:
        shutil.move(late, early)
    assert better.status == 0, better.errors  # it is not worse


def test_a_teacher_of_another_split_is_named_before_training(kdpipe: Callable, store: Store) -> None:
    outcome = kdpipe(*DISTILL, store.here, f"teacher.weights={store.address}", "dataset.split_seed=1")
    assert outcome.status == 0, outcome.errors
    said = "was trained with dataset.split_seed=0 instead of 1: on some of the validation and test images"
    assert said in outcome.output.partition("epoch 1/1")[0]


def test_what_means_the_same_is_no_difference(composed: Callable[..., Settings]) -> None:
    library = ["model=torchvision", "model.weights=null"]
    null = composed(*library).model
    explicit = composed(
        *library, "model.image_size=224", "model.mean=[0.485,0.456,0.406]", "model.std=[0.229,0.224,0.225]"
    ).model
    assert network_differences(null, explicit) == network_differences(explicit, null) == {}
    assert network_differences(null, composed(*library, "model.image_size=64").model) == {"image_size": (224, 64)}
    stages = composed(*library, "model.stages=[layer1]", "model.freeze=backbone", "model.weights=imagenet").model
    assert network_differences(null, stages) == {}
    assert replaced(stages, explicit, set()).plain == explicit.plain | {
        "stages": ["layer1"],
        "freeze": "backbone",
        "weights": "imagenet",
    }


def test_weights_are_loaded_into_their_own_network_alone(composed: Callable[..., Settings], store: Store) -> None:
    """Also where settings do not come from a command."""
    settings = composed(*DIGITS, "model=resnet20", "model.depth=8", f"model.weights={store.address}")
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    data = ImageDataset("blank", images, torch.zeros(2).long(), tuple("0123456789"), {}, "")
    with pytest.raises(ConfigError, match=r"^model\.image_size=32: model\.weights=runs:/\w+ was trained with 16;"):
        build_model(settings, data, RunStore(store.uri))
