"""Several teachers as one, and a teacher as it was before its training was over."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import KEPT, Started, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file
from scipy.special import softmax
from torch import Tensor, nn

from kdpipe.assembly.parts import check_components
from kdpipe.compare.__main__ import run_comparison
from kdpipe.data import ImageDataset, split
from kdpipe.data.digits import digits
from kdpipe.losses import KD
from kdpipe.main import _save_earlier_epochs
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.resnet import ResNet
from kdpipe.settings.saved import read_network_settings
from kdpipe.settings.schema import Settings
from kdpipe.system.hardware import Hardware
from kdpipe.training.precomputed import OutputRequest
from kdpipe.training.teacher import FrozenTeacher

SMALL = ["dataset=digits", "dataset.train_fraction=0.2", "train.threads=1"]
RESNET8 = ["model=resnet20", "model.depth=8"]
# Different networks, which take images of different sizes.
FIRST = [*SMALL, "experiment=teacher", *RESNET8, "model.image_size=16", "train.epochs=2"]
SECOND = [*SMALL, "experiment=teacher", "model=resnet32", "model.depth=14", "model.image_size=8", "train.epochs=1"]
DISTILL = [*SMALL, "experiment=distill", "train.epochs=1"]
ENSEMBLE = [*DISTILL, "model@teacher=ensemble"]
ONE_TEACHER = [*DISTILL, "model@teacher=resnet20", "teacher.depth=8", "teacher.image_size=16"]


def client() -> MlflowClient:
    return MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")


def runs() -> list[Run]:
    """The runs of the present folder's store, newest first."""
    experiment = client().get_experiment_by_name("kdpipe").experiment_id
    return list(client().search_runs([experiment], order_by=["attributes.start_time DESC"]))


def folder_of(run: Run) -> Path:
    return Path("outputs/runs") / run.data.tags["kdpipe.identity"]


def artifacts(run: Run) -> dict[str, Path]:
    """The files that MLflow has of a run, by name."""
    names = [file.path for file in client().list_artifacts(run.info.run_id)]
    return {name: Path(run.info.artifact_uri.removeprefix("file://")) / name for name in names}


def lines(run: Run) -> list[dict[str, float]]:
    """Those of metrics.jsonl, without what depends on the clock."""
    content = (folder_of(run) / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "train/images_per_second"} for line in content
    ]


@pytest.fixture
def trained(kdpipe: Callable) -> list[Run]:
    """Two finished teachers: a ResNet-8 at 16 pixels, which kept its first epoch, and a ResNet-14 at 8."""
    for overrides in ([*FIRST, "train.keep_epochs=[1]"], SECOND):
        outcome = kdpipe(*overrides)
        assert outcome.status == 0, outcome.errors
    return runs()[::-1]


def members(*found: Run | str) -> str:
    """`teacher.members=[runs:/…,runs:/…]`."""
    ids = [run if isinstance(run, str) else run.info.run_id for run in found]
    return f"teacher.members=[{','.join(f'runs:/{run_id}' for run_id in ids)}]"


class Says(nn.Module):
    """A member that has the same logits [N, classes] for all images."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = torch.from_numpy(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def soft_targets(logits: list[np.ndarray], shares: list[float], temperature: float) -> np.ndarray:
    """The weighted mean of softmax(logits / T), in float64."""
    return np.average([softmax(one / temperature, axis=1) for one in logits], axis=0, weights=shares)


def answer(logits: list[np.ndarray], shares: list[float], temperature: float) -> np.ndarray:
    """What an ensemble of these says, in float64."""
    return Ensemble([Says(one) for one in logits], shares, temperature)(torch.empty(0)).double().numpy()


@pytest.mark.parametrize("temperature", [1, 4, 20])
@pytest.mark.parametrize("shares", [[1, 1], [0.7, 0.3], [2, 6]])
def test_the_soft_targets_are_the_weighted_mean_of_the_members(temperature: float, shares: list[float]) -> None:
    logits = list(np.random.default_rng(0).normal(scale=5, size=(2, 6, 10)).astype(np.float32))
    said = softmax(answer(logits, shares, temperature) / temperature, axis=1)
    np.testing.assert_allclose(said, soft_targets(logits, shares, temperature), rtol=1e-5, atol=1e-8)


def test_two_members_and_two_classes_by_hand() -> None:
    # At T 1 they say 0.8 and 0.5: the mean is 0.65.
    logits = [np.log([[0.8, 0.2]]).astype(np.float32), np.zeros((1, 2), np.float32)]
    np.testing.assert_allclose(answer(logits, [1, 1], 1), np.log([[0.65, 0.35]]), rtol=1e-6)
    # With shares 3 and 1: 0.725. At T 2 they are said to say 2/3 and 1/2: the mean is 7/12, logits are twice its log.
    np.testing.assert_allclose(answer(logits, [3, 1], 1), np.log([[0.725, 0.275]]), rtol=1e-6)
    np.testing.assert_allclose(answer(logits, [1, 1], 2), 2 * np.log([[7 / 12, 5 / 12]]), rtol=1e-6)


@settings(deadline=None)
@given(st.data())
def test_what_does_not_change_a_member_s_answer_does_not_change_the_mean(data: st.DataObject) -> None:
    seed, temperature = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.floats(0.5, 20))
    draw = np.random.default_rng(seed)
    logits = list(draw.normal(scale=5, size=(3, 4, 7)).astype(np.float32))
    shares = draw.uniform(0.1, 1, 3).tolist()
    said = answer(logits, shares, temperature)
    shifted = [one + np.float32(shift) for one, shift in zip(logits, draw.uniform(-20, 20, 3), strict=True)]
    np.testing.assert_allclose(answer(shifted, shares, temperature), said, atol=1e-3)
    np.testing.assert_allclose(answer(logits[::-1], shares[::-1], temperature), said, atol=1e-3)
    np.testing.assert_allclose(answer(logits, [10 * share for share in shares], temperature), said, atol=1e-3)


def test_a_member_without_a_share_says_nothing_and_one_alone_says_what_it_said() -> None:
    first, second = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    for said in (answer([first, second], [1, 0], 4), answer([first], [3], 4)):
        np.testing.assert_allclose(softmax(said, axis=1), softmax(first, axis=1), rtol=1e-5)


def test_extreme_logits_and_half_precision_stay_finite() -> None:
    logits = [np.array([[6e4, -6e4, 0]], np.float16), np.array([[-6e4, 6e4, 0]], np.float16)]
    for temperature in (1, 20):
        said = answer(logits, [1, 1], temperature)
        assert np.isfinite(said).all()
        np.testing.assert_allclose(softmax(said / temperature, axis=1), [[0.5, 0.5, 0]], atol=1e-6)


def network(seed: int = 0, image_size: int = 8, mean: float = 0.5) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(ResNet(8, 10), image_size, [mean] * 3, [0.5] * 3)


@pytest.fixture(scope="module")
def some_digits() -> ImageDataset:
    return split(digits(), "digits", train_fraction=0.2, val_fraction=0.1, test_fraction=0.25, split_seed=0)


def test_whatever_its_answer_depends_on_gives_another_entry_of_the_cache(some_digits: ImageDataset) -> None:
    def key(*networks: Classifier, shares: tuple[float, ...] = (1, 1), temperature: float = 4) -> str:
        teacher = FrozenTeacher(Ensemble(networks, shares, temperature))
        positions = some_digits.splits["train"]
        question = OutputRequest("logits", "ensemble", teacher.classifier, teacher.classifier, some_digits, positions)
        return question.key(Hardware(torch.device("cpu")))

    keys = [
        key(network(0), network(1)),
        key(network(0), network(2)),
        key(network(1), network(0)),
        key(network(0), network(1, image_size=16)),
        key(network(0), network(1, mean=0.4)),
        key(network(0), network(1), shares=(1, 2)),
        key(network(0), network(1), temperature=5),
        key(network(0), network(1), network(1), shares=(1, 1, 1)),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key(network(0), network(1), shares=(2, 2))


def test_it_is_frozen_and_each_member_sees_raw_images(some_digits: ImageDataset) -> None:
    networks = [network(0, image_size=8), network(1, image_size=16, mean=0.2)]
    images = some_digits.images[:5]
    expected = soft_targets([one.eval()(images).detach().numpy() for one in networks], [0.7, 0.3], 4)
    teacher = FrozenTeacher(Ensemble(networks, [0.7, 0.3], 4)).train()
    said = teacher.answer(images).logits
    assert not said.requires_grad and not any(module.training for module in teacher.classifier.modules())
    np.testing.assert_allclose(softmax(said.numpy() / 4, axis=1), expected, rtol=1e-4)


def test_a_student_of_two_runs(kdpipe: Callable, trained: list[Run]) -> None:
    outcome = kdpipe(*ENSEMBLE, members(*trained), "teacher.shares=[0.7,0.3]", "loss.temperature=4")
    assert outcome.status == 0, outcome.errors
    student = runs()[0]
    first, second = (run.info.run_id for run in trained)
    assert student.data.tags["kdpipe.stage"] == "distill"
    assert student.data.tags["kdpipe.teacher_run"] == f"{first},{second}"
    assert student.data.params["teacher.members"] == f"['runs:/{first}', 'runs:/{second}']"
    sizes = [run.data.metrics["model/size_mb"] for run in trained]
    assert student.data.metrics["teacher/size_mb"] == pytest.approx(sum(sizes))
    for told in (f"resnet20 with the weights of runs:/{first}", f"resnet32 with the weights of runs:/{second}"):
        assert f"teacher: {told}" in outcome.output
    assert "the mean of their soft targets at T 4, shares 0.7, 0.3" in outcome.output
    assert "teacher ensemble: " in outcome.output

    # What was kept of its answers is the mean of what the two networks say by themselves.
    networks = [
        Classifier(ResNet(depth, 10), size, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
        for depth, size in ((8, 16), (14, 8))
    ]
    for one, run in zip(networks, trained, strict=True):
        one.network.load_state_dict(load_file(folder_of(run) / "model.safetensors"))
    data = split(digits(), "digits", train_fraction=0.2, val_fraction=0.15, test_fraction=0.25, split_seed=0)
    images = data.images[data.splits["train"].sort().values]
    with torch.no_grad():
        expected = soft_targets([one(images).numpy() for one in networks], [0.7, 0.3], 4)
    kept = [np.load(file)[0] for file in Path("outputs/cache/teacher").glob("*/outputs.npy")]
    (answers,) = [rows for rows in kept if len(rows) == len(images)]
    np.testing.assert_allclose(softmax(answers / 4, axis=1), expected, rtol=1e-4)


def test_its_answers_from_the_cache_and_online_teach_the_same(kdpipe: Callable, trained: list[Run]) -> None:
    told = []
    for outputs in ("cached", "online"):
        arguments = [*ENSEMBLE, members(*trained), f"distillation.outputs={outputs}", "train.resume=never"]
        assert kdpipe(*arguments).status == 0
        told.append(lines(runs()[0]))
    assert told[0] == [pytest.approx(line, rel=1e-4) for line in told[1]]


def test_sweeps_over_shares_and_teachers_are_compared(kdpipe: Callable, trained: list[Run]) -> None:
    both = members(*trained)
    outcome = kdpipe("-m", *ENSEMBLE, both, "teacher.shares=[0.7,0.3],[1,1]", "loss.temperature=2,4")
    assert outcome.status == 0, outcome.errors
    names = {run.info.run_name for run in runs()}
    assert {f"shares{shares}_a0.5_T{t}_s0" for shares in ("0.7+0.3", "1+1") for t in (2, 4)} <= names
    # Both teachers have a row, and nothing is said against what they saw; how good they are together was measured.
    assert outcome.output.count(" teacher   CrossEntropy") == 2
    assert "may have" not in outcome.output and "the teacher was trained" not in outcome.output
    (row,) = [line.split() for line in outcome.output.splitlines() if line.strip().startswith("teacher ensemble")]
    measured = {f"{100 * run.data.metrics.get('teacher/accuracy', 0):.2f}" for run in runs()}
    assert row[2] in measured - {"0.00"}
    # At another temperature it is the same teacher.
    assert "verdict: " in run_comparison(["--where", "teacher.shares=[1, 1]"])

    one_and_both = f"{members(trained[0])},{both.removeprefix('teacher.members=')}"
    outcome = kdpipe("-m", *ENSEMBLE, one_and_both)
    assert outcome.status == 0, outcome.errors
    first, second = (run.info.run_id[:8] for run in trained)
    expected = {f"members{first}_a0.5_T5_s0", f"members{first}+{second}_a0.5_T5_s0"}
    assert expected <= {run.info.run_name for run in runs()}


def test_a_teacher_that_saw_other_images_is_found_among_several(kdpipe: Callable, trained: list[Run]) -> None:
    assert kdpipe(*SECOND, "dataset.val_fraction=0.1").status == 0
    other = runs()[0]
    assert kdpipe(*ENSEMBLE, members(trained[0], other)).status == 0
    joined = runs()[0].data.tags["kdpipe.teacher_run"]
    said = run_comparison(["--where", f"kdpipe.teacher_run={joined}", "--mixed"])
    assert "the teacher was trained with dataset.val_fraction=0.1 instead of 0.15" in said


def test_the_loss_s_temperature_is_the_teacher_s_and_no_setting_of_its_own(composed: Callable[..., Settings]) -> None:
    ensemble = ["model@teacher=ensemble", "teacher.members=[runs:/a]"]
    config = composed(*ensemble, "loss.temperature=3")
    assert config.teacher.temperature == 3
    assert "teacher.temperature" not in config.params
    other = composed(*ensemble, "loss.temperature=3", "teacher.temperature=100")
    assert other.params["teacher.temperature"] == 100
    assert other.identity != config.identity
    assert composed(*ensemble, "loss=cross_entropy", "loss@also=kd", "also.temperature=7").teacher.temperature == 7
    assert composed(*ensemble, "loss=cross_entropy").teacher.temperature == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.members=[]"], "teacher.members=[]: expected a list of runs, [runs:/<run id>,runs:/<run id>]"),
        (["teacher.members=runs:/a"], "teacher.members=runs:/a: expected a list of runs"),
        (["teacher.members=[a.pth]"], "teacher.members=a.pth: expected a list of runs"),
        (["teacher.members=[runs:/a,runs:/a]"], "teacher.members=runs:/a: it is listed twice"),
        (["teacher.members=[runs:/a,runs:/b]"], "teacher.members=runs:/a: run not found in sqlite"),
        (
            ["teacher.members=[runs:/a]", "teacher.shares=[1,2]"],
            "teacher.shares=[1,2]: expected a number for each",
        ),
        (
            ["teacher.members=[runs:/a]", "teacher.shares=[0]"],
            "teacher.shares=[0]: expected a number for each",
        ),
        (["teacher.members=[runs:/a]", "teacher.shares=[-1]"], "teacher.shares=-1: expected a number from 0"),
        (
            ["teacher.members=[runs:/a]", "teacher.shares=1"],
            "teacher.shares=1: expected a list of numbers from 0",
        ),
        (["teacher.members=[runs:/a]", "teacher.temperature=0"], "teacher.temperature=0: expected a number above 0"),
        (["teacher.members=[runs:/a]", "loss.temperature=0"], "loss.temperature=0: expected a number above 0"),
        (["teacher.members=[runs:/a]", "teacher.weights=runs:/a"], "teacher.weights=runs:/a: an ensemble has the"),
        (["model=ensemble"], "model=ensemble: expected one network; several can teach it, model@teacher=ensemble"),
        (
            ["model@teacher=resnet20", "teacher.weights=runs:/a/../b"],
            "teacher.weights=runs:/a/../b: expected runs:/<run id> or",
        ),
        (["train.keep_epochs=1"], "train.keep_epochs=1: expected a list of whole numbers from 1 or null"),
        (["train.keep_epochs=[0]"], "train.keep_epochs=0: expected a whole number from 1"),
        (["train.keep_epochs=[1,2]"], "train.keep_epochs=2: expected epochs up to train.epochs=1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_ends_in_one_line(kdpipe: Callable, overrides: list[str], said: str) -> None:
    outcome = kdpipe(*ENSEMBLE, *overrides)
    assert outcome.status == 1
    assert outcome.errors.startswith(f"kdpipe: {said}") and outcome.errors.count("\n") == 1, outcome.errors


def test_a_loss_that_asks_for_more_than_logits_is_refused(
    composed: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*ENSEMBLE, "teacher.members=[runs:/a]")
    check_components(config)
    monkeypatch.setattr(KD, "roles", ("stages", "embedding"))
    with pytest.raises(
        ValueError, match=r"^model@teacher=ensemble: an ensemble answers with logits alone.*stages, embedding;"
    ):
        check_components(config)


def test_runs_that_cannot_teach_are_refused_in_one_line(kdpipe: Callable, trained: list[Run]) -> None:
    first, second = trained

    def refusal(*found: Run | str) -> str:
        outcome = kdpipe(*ENSEMBLE, members(*found))
        assert_refused(outcome)
        return str(outcome.errors)

    unfinished = client().create_run(first.info.experiment_id)
    assert f"teacher.members=runs:/{unfinished.info.run_id}: this run has no config.yaml" in refusal(first, unfinished)
    client().log_artifact(unfinished.info.run_id, str(folder_of(first) / "config.yaml"))
    assert "this run has no model.safetensors; expected runs:/<id of a finished run>" in refusal(first, unfinished)
    no_such_epoch = refusal(f"{first.info.run_id}/epoch_2")
    assert "this run has no epoch_2.safetensors, but model.safetensors, epoch_1.safetensors;" in no_such_epoch

    file = artifacts(second)["config.yaml"]
    config = yaml.safe_load(file.read_text())
    for changed, said in (
        ({"_target_": "os.system"}, "model._target_=os.system: expected a target in kdpipe.data"),
        ({"depth": 13}, "model.depth=13: "),
        ({"depth": 20}, "30 missing, such as layer1.2.conv1.weight; expected weights of resnet32 with 10 classes"),
        ({"image_size": 0}, "/config.yaml: model.image_size=0: expected a whole number from 1"),
    ):
        file.write_text(yaml.safe_dump({**config, "model": config["model"] | changed}))
        refused = refusal(first, second)
        assert f"teacher.members=runs:/{second.info.run_id}: " in refused and said in refused


def test_a_run_of_other_classes_is_refused(kdpipe: Callable, class_folders: Path) -> None:
    photos = [f"dataset.root={class_folders}", "dataset.test_fraction=0.2", "train.threads=1", "train.batch_size=8"]
    trained = kdpipe("experiment=teacher", "dataset=image_folder", *photos, *RESNET8, "train.epochs=1")
    assert trained.status == 0, trained.errors
    outcome = kdpipe(*ENSEMBLE, members(runs()[0]))
    run_id = runs()[0].info.run_id
    said = f"teacher.members=runs:/{run_id}: trained on 2 classes (flower, temple): class 1 is flower there and 0 here;"
    assert said in outcome.errors


@pytest.mark.parametrize(
    "content",
    ["", "model: resnet20", "model: {name: a, _target_: kdpipe.models.resnet.ResNet}", "- a list", "a: [", "\0"],
)
def test_what_is_no_composed_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_network_settings(tmp_path / "config.yaml")


def test_a_config_with_interpolations_is_refused(tmp_path: Path, composed: Callable[..., Settings]) -> None:
    model = composed("model=resnet20").model.plain
    for name, is_accepted in (("resnet20", True), ("${oc.env:HOME}", False)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {**model, "name": name}}))
        if is_accepted:
            assert read_network_settings(tmp_path / "config.yaml").name == name
        else:
            with pytest.raises(ValueError, match="expected the config of a run"):
                read_network_settings(tmp_path / "config.yaml")


def same(first: Path, second: Path) -> bool:
    """Whether two files hold the same weights."""
    states = load_file(first), load_file(second)
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_the_weights_after_an_epoch_are_those_of_a_training_that_ends_there(kdpipe: Callable) -> None:
    assert kdpipe(*FIRST, "train.epochs=3", "train.keep_epochs=[1,2]", "augmentation=crop_flip").status == 0
    run = runs()[0]
    kept = artifacts(run)
    assert kept.keys() == {*KEPT, "epoch_1.safetensors", "epoch_2.safetensors"}
    assert all(same(file, folder_of(run) / name) for name, file in kept.items() if file.suffix == ".safetensors")
    for epoch in (1, 2):
        assert kdpipe(*FIRST, f"train.epochs={epoch}", "augmentation=crop_flip").status == 0
        assert same(folder_of(runs()[0]) / "model.safetensors", kept[f"epoch_{epoch}.safetensors"])
    assert not same(kept["epoch_2.safetensors"], kept["model.safetensors"])


def test_an_early_stopped_teacher(kdpipe: Callable, trained: list[Run]) -> None:
    run_id = trained[0].info.run_id
    sweep = [*ONE_TEACHER, f"teacher.weights=runs:/{run_id}/epoch_1,runs:/{run_id}", "seed=0,1"]
    outcome = kdpipe("-m", *sweep)
    assert outcome.status == 0, outcome.errors
    found = {run.info.run_name: run for run in runs()}
    early, late = (found[f"weights{run_id[:8]}{epoch}_a0.5_T5_s0"] for epoch in ("/epoch_1", ""))
    assert early.data.tags["kdpipe.teacher_run"] == late.data.tags["kdpipe.teacher_run"] == run_id
    assert early.data.tags["kdpipe.inputs"] != late.data.tags["kdpipe.inputs"]
    assert lines(early)[0]["train/kd"] != lines(late)[0]["train/kd"]
    table = run_comparison(["--mixed"])
    assert table.count("KD alpha 0.5") >= 2  # a cell each

    # The same file, written in other ways, and as first weights.
    kdpipe(*ONE_TEACHER, f"teacher.weights=runs:/{run_id}/epoch_1.safetensors")
    assert lines(runs()[0]) == lines(early)
    kdpipe(*FIRST, f"model.weights=runs:/{run_id}/epoch_1", "train.epochs=0")
    assert same(folder_of(runs()[0]) / "model.safetensors", artifacts(trained[0])["epoch_1.safetensors"])


def test_the_accuracy_is_that_of_the_weights_that_taught(kdpipe: Callable, trained: list[Run]) -> None:
    run_id = trained[0].info.run_id
    accuracies = []
    for weights in (f"runs:/{run_id}", f"runs:/{run_id}/epoch_1"):
        assert kdpipe(*ONE_TEACHER, f"teacher.weights={weights}").status == 0
        said = run_comparison(["--where", f"teacher.weights={weights}"])
        (row,) = [line.split() for line in said.splitlines() if line.strip().startswith("teacher resnet20")]
        accuracies.append(row[2])
    last, earlier = accuracies
    assert last == f"{100 * trained[0].data.metrics['test/accuracy']:.2f}"
    assert earlier == f"{100 * runs()[0].data.metrics['teacher/accuracy']:.2f}"


def test_a_finished_run_without_the_wanted_epochs_says_so(kdpipe: Callable) -> None:
    kdpipe(*FIRST, "train.keep_epochs=[2]")
    asked = [*FIRST, "train.keep_epochs=[1,2]"]
    outcome = kdpipe(*asked)
    assert "this run is already finished" in outcome.output
    assert "train.keep_epochs=[1]: this run has not kept them; train.resume=never trains it anew" in outcome.output
    sweep = kdpipe("-m", *asked, "seed=0,1")
    assert "train.keep_epochs=[1]: " in sweep.output and "s0 has not kept them" in sweep.output
    assert "s1: train.keep_epochs" not in sweep.output
    outcome = kdpipe(*asked, "train.resume=never")
    assert outcome.status == 0 and "has not kept" not in outcome.output
    assert {"epoch_1.safetensors", "epoch_2.safetensors"} <= artifacts(runs()[0]).keys()
    assert "has not kept" not in kdpipe(*asked).output


def test_the_epochs_of_an_earlier_run_are_not_taken_for_those_of_this_one(kdpipe: Callable) -> None:
    kdpipe(*FIRST, "train.keep_epochs=[1]")
    kdpipe(*FIRST, "train.resume=never")
    assert artifacts(runs()[0]).keys() == KEPT
    assert not list(folder_of(runs()[0]).glob("epoch_*"))


def test_a_run_that_is_killed_has_its_epochs_when_it_goes_on(start: Callable[..., Started], kdpipe: Callable) -> None:
    asked = [*FIRST, "train.epochs=12", "train.keep_epochs=[1,2,11]"]
    run = start(*asked)
    run.wait_for("epoch 2/12")
    run.kill()
    Path("outputs/mlflow.db").rename("outputs/lost.db")  # another store is to get all of it
    (file,) = Path("outputs/runs").glob("*/epoch_1.safetensors")
    before = file.read_bytes()
    again = kdpipe(*asked)
    assert again.status == 0, again.errors
    assert "continues at epoch" in again.output and "has not kept" not in again.output
    assert file.read_bytes() == before
    kept = artifacts(runs()[0])
    assert kdpipe(*asked, "output_dir=whole").status == 0
    (folder,) = (path.parent for path in Path("whole/runs").glob("*/model.safetensors"))
    for name in ("epoch_1.safetensors", "epoch_2.safetensors", "epoch_11.safetensors", "model.safetensors"):
        assert (folder / name).read_bytes() == kept[name].read_bytes(), name


def test_epochs_that_are_asked_for_too_late_are_named(
    tmp_path: Path, composed: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 3):
        (tmp_path / f"epoch_{epoch}.safetensors").write_bytes(b"weights")
    saved: list[str] = []
    current: Any = SimpleNamespace(folder=tmp_path, save=lambda file: saved.append(file.name))
    _save_earlier_epochs(composed("train.keep_epochs=[1,2,3,4]"), current, epoch=3)
    # Epoch 3 is in progress: what is there of it was written by a process whose checkpoint is lost.
    assert saved == [file.name for file in tmp_path.iterdir()] == ["epoch_1.safetensors"]
    assert [record.getMessage() for record in caplog.records] == [
        "train.keep_epochs=[2]: this run has not kept them; train.resume=never trains it anew"
    ]


def test_the_nearest_teacher_is_named_with_what_would_take_it(kdpipe: Callable, class_folders: Path) -> None:
    small = ["dataset=digits", "dataset.train_fraction=0.1", "train.epochs=1"]
    teacher = kdpipe(*small, "experiment=teacher", "model=resnet20", "model.image_size=24", "dataset.split_seed=3")
    assert teacher.status == 0, teacher.errors
    (run,) = client().search_runs([client().get_experiment_by_name("kdpipe").experiment_id])
    outcome = kdpipe(*small, "model@teacher=resnet20")
    near = f"the nearest is resnet20_teacher_s0 (run {run.info.run_id}, test accuracy "
    taken = "dataset.split_seed=3 teacher.image_size=24"
    assert_refused(outcome, "no finished teacher run of resnet20", near, f"{taken} takes it")
    assert kdpipe(*small, "model@teacher=resnet20", *taken.split()).status == 0
    assert_refused(kdpipe(*small, "model@teacher=resnet32"), near, "of resnet20: model@teacher=… chooses the network")
    photos = ["dataset=image_folder", f"dataset.root={class_folders}"]
    outcome = kdpipe(*photos, "model@teacher=resnet20")
    assert_refused(outcome, "no finished teacher run of resnet20")
    assert "the nearest is" not in outcome.errors
