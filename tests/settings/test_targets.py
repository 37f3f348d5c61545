"""A config of others runs nothing but what is accepted, or allowed by name."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_refused

from kdpipe.assembly.building import build
from kdpipe.settings.components import ALLOW, find_target
from kdpipe.settings.composition import CONF
from kdpipe.settings.schema import Settings
from kdpipe.settings.yaml_files import read_yaml

STUDENT = ("dataset=digits", "loss.alpha=0", "train.epochs=0")
OUTSIDE = [
    "os.system",
    "builtins.eval",
    "importlib.import_module",
    "torch.os.system",
    "torch.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load",
    "torch.utils.collect_env.run",
    "torchvision.os.system",
    "torchvision.datasets.ImageFolder",
    "kdpipe.main.os.system",
    "kdpipe.clean.clean_up",
    "kdpipe.settings.components.guard_hydra",
    "kdpipe.modelsandmore.run",
    "timm.utils.resume_checkpoint",
    "hydra_plugins.kdpipe_sweeper.GridSweeper",
    "hydra.utils.get_object",
]
# Their names are inside, what they name is not.
LEAKS = [
    "torch.nn.modules.module.os.system",
    "torch.nn.modules.module.functools.reduce",
    "torch.nn.functional.importlib.import_module",
    "torchvision.models._utils.OrderedDict",
    "torch.nn.modules.module.OrderedDict",
    "kdpipe.models.weights.load_file",
    "kdpipe.data.decode.ensure_entry",
    "kdpipe.data.decode._decode",
    "kdpipe.losses.KD.forward",
    "timm.models.load_checkpoint",
    "timm.models.load_state_dict",
    "torch.nn",
]
ACCEPTED = [
    "kdpipe.losses.KD",
    "kdpipe.losses.kd.KD",
    "kdpipe.models.student_cnn.StudentCNN",
    "kdpipe.data.image_folder.image_folder",
    "kdpipe.data.csv_table.csv_table",
    "kdpipe.training.schedules.cosine",
    "torch.nn.CrossEntropyLoss",
    "torch.nn.modules.linear.Linear",
    "torch.optim.SGD",
    "torch.optim.lr_scheduler.StepLR",
    "torchvision.models.resnet18",
    "torchvision.ops.MLP",
    "torchvision.transforms.Compose",
]


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `trap` that can be imported; the file is there once it was."""
    (tmp_path / "trap.py").write_text("open('sprung', 'w').close()\ndef run(**settings):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    return tmp_path / "sprung"


@pytest.fixture
def downloaded(tmp_path: Path) -> Callable[[str], list[str]]:
    """The overrides that take an experiment of others, given as YAML."""

    def write(text: str) -> list[str]:
        file = tmp_path / "downloaded" / "experiment" / "theirs.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(f"# @package _global_\n{text}")
        return [f"--config-dir={tmp_path / 'downloaded'}", "experiment=theirs", *STUDENT]

    return write


@pytest.mark.parametrize("target", [*OUTSIDE, *LEAKS])
def test_what_is_outside_of_the_rooms_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=rf"^loss\._target_={target}: ") as error:
        find_target("loss._target_", target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ACCEPTED)
def test_what_configs_need_is_accepted(target: str) -> None:
    assert find_target("model._target_", target).__name__ == target.rpartition(".")[2]


def test_timm_s_networks_are_accepted() -> None:
    timm = pytest.importorskip("timm")
    assert find_target("model._target_", "timm.create_model") is timm.create_model
    assert find_target("model._target_", "timm.models.ResNet") is timm.models.ResNet


@pytest.mark.parametrize("where", ["loss._target_", "+model.part._target_", "+train.unused.deep._target_"])
def test_a_target_of_others_is_refused_before_it_is_imported(kdpipe: Callable, trap: Path, where: str) -> None:
    outcome = kdpipe(*STUDENT, f"{where}=trap.run")
    assert_refused(
        outcome,
        f"{where.lstrip('+')}=trap.run: expected a target in kdpipe.data, ",
        "KDPIPE_ALLOW_TARGETS=trap.run allows this one, if you trust what it does",
    )
    assert not trap.exists()


@pytest.mark.parametrize(
    "text",
    [
        "augmentation:\n  _target_: trap.run",
        "model:\n  list: [1, {deep: {_target_: trap.run}}]",
        "stored: {_target_: trap.run}\nmodel:\n  part: ${stored}",
        "model:\n  part: '${oc.create:{_target_: trap.run}}'",
        "augmentation: '${oc.create:{_target_: trap.run}}'",
        "start: '{_target_'\naugmentation: '${oc.decode:\"${start}: trap.run}\"}'",
        "augmentation: '${oc.select:nothing,{_target_:trap.run}}'",
        "augmentation:\n  _target_: '${oc.select:nothing,trap.run}'",
        "loss:\n  _target_: '${oc.select:nothing,trap.run}'",
        "hydra:\n  callbacks:\n    theirs: {_target_: trap.run}",
        "hydra:\n  callbacks:\n    theirs: '${oc.create:{_target_: trap.run}}'",
        "hydra:\n  callbacks: '${oc.create:{theirs: {_target_: trap.run}}}'",
        "hydra:\n  callbacks:\n    theirs: {_target_: hydra.experimental.callbacks.logging.config.dictConfig}",
        "hydra:\n  mode: MULTIRUN\n  sweeper: {params: {seed: {_target_: trap.run}}}",
        "hydra:\n  mode: MULTIRUN\n  launcher: {_target_: trap.run}",
    ],
)
def test_a_downloaded_experiment_runs_no_target(kdpipe: Callable, downloaded: Callable, trap: Path, text: str) -> None:
    outcome = kdpipe(*downloaded(text))
    assert_refused(outcome)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hydra:\n  job:\n    env_set: {PATH: downloaded}", "hydra.job.env_set"),
        ("hydra:\n  job:\n    env_set: {KDPIPE_ALLOW_TARGETS: trap}", "hydra.job.env_set"),
        ("theirs: {PATH: downloaded}\nhydra:\n  job:\n    env_set: ${theirs}", "hydra.job.env_set"),
        (
            "defaults: [{override /hydra/launcher: submitit_slurm}]\nhydra:\n  launcher: {setup: [touch sprung]}",
            "hydra.launcher.setup",
        ),
        ("hydra:\n  job_logging: {handlers: {file: {filename: .profile}}}", "filename=.profile"),
        ("hydra:\n  job_logging: {handlers: {file: {class: trap.run}}}", "file.class=trap.run"),
        ("hydra:\n  job_logging: {handlers: {file: {.: {baseFilename: .profile}}}}", "handlers.file.."),
        ("hydra:\n  job_logging: {filters: {file: {.: {baseFilename: .profile}}}}", "filters.file..."),
        (
            "defaults: [{override /hydra/launcher: submitit_slurm}]\n"
            "hydra:\n  launcher: {additional_parameters: {export: x}}",
            "hydra.launcher.additional_parameters",
        ),
        ("hydra:\n  searchpath: [pkg://trap]", "pkg://trap"),
        ("theirs: trap\nhydra:\n  searchpath: ['pkg://${theirs}']", "pkg://${theirs}"),
        ("hydra:\n  job_logging: {filters: {theirs: {(): trap.run}}}", "theirs.()=trap.run"),
        ("hydra:\n  hydra_logging: {handlers: {console: {stream: 'ext://trap.run'}}}", "stream=ext://trap.run"),
    ],
)
def test_a_downloaded_experiment_chooses_no_commands(
    kdpipe: Callable, downloaded: Callable, trap: Path, text: str, named: str
) -> None:
    if "submitit" in text:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    outcome = kdpipe(*downloaded(text))
    assert_refused(outcome, named)
    assert not trap.exists()
    assert not Path(".profile").exists()


def test_a_sweep_with_one_such_cell_trains_none(kdpipe: Callable, trap: Path) -> None:
    outcome = kdpipe("-m", *STUDENT, "augmentation._target_=kdpipe.data.augmentation.no_augmentation,trap.run")
    assert outcome.status == 1
    assert "augmentation._target_=trap.run: expected a target in " in outcome.errors
    assert not trap.exists()
    assert not list(Path("outputs").glob("runs/*/model.safetensors"))


@pytest.mark.parametrize("flag", ["--config-dir=", "--config-d=", "-cd=", "-cd", "--config-dir ", "-cd "])
def test_a_config_folder_is_checked_however_its_flag_is_written(
    kdpipe: Callable, downloaded: Callable, trap: Path, flag: str
) -> None:
    folder, *rest = downloaded("hydra:\n  callbacks:\n    theirs: {_target_: trap.run}")
    outcome = kdpipe(*(flag + folder.removeprefix("--config-dir=")).split(" "), *rest)
    assert outcome.status == 1 and "trap.run" in outcome.errors
    assert not trap.exists()


def test_a_pickled_config_is_not_opened(kdpipe: Callable) -> None:
    for argument in ("--experimental-rerun=theirs.pickle", "--exp=theirs.pickle"):
        outcome = kdpipe(argument)
        assert outcome.status == 1
        assert f"{argument}: expected the command that made it: a pickled config can run code" in outcome.errors


@pytest.mark.parametrize("allowed", ["trap", "other, trap.run"])
def test_the_user_allows_a_target_by_name(
    kdpipe: Callable, trap: Path, monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    monkeypatch.setenv(ALLOW, allowed)
    outcome = kdpipe(*STUDENT, "augmentation._target_=trap.run")
    assert outcome.status == 0, outcome.errors
    assert trap.exists()


@pytest.mark.parametrize("allowed", ["tra", "trap.ru", "trap.run.more", "run", "*", "", "kdpipe"])
def test_a_name_allows_nothing_else(
    kdpipe: Callable, trap: Path, monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    monkeypatch.setenv(ALLOW, allowed)
    assert "augmentation._target_=trap.run: " in kdpipe(*STUDENT, "augmentation._target_=trap.run").errors
    assert not trap.exists()


def test_an_allowed_module_does_not_bring_what_it_imports(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trap.parent)
    (trap.parent / "trap.py").write_text("import os\nfrom os import system\n")
    monkeypatch.setenv(ALLOW, "trap")
    for target in ("trap.system", "trap.os.system"):
        with pytest.raises(ValueError, match=target):
            find_target("loss._target_", target)


def test_targets_inside_of_targets_are_built(composed: Callable[..., Settings]) -> None:
    choice = "model._target_=torch.nn.ModuleList"
    settings = composed(choice, "+model.modules=[{_target_:torch.nn.Linear,in_features:2,out_features:3}]")
    (part,) = build("model", settings.model)
    assert part.weight.shape == (3, 2)


BOMB = "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: [1, 2", "theirs.yaml, line 1: not readable as YAML"),
        (b"seed: 1\n  stage: x", "theirs.yaml, line 2: not readable as YAML"),
        (b"seed: ${", "theirs.yaml: expected keys and values that OmegaConf knows"),
        (b"seed: !!python/object/apply:os.system [touch sprung]", "theirs.yaml"),
        (b"\xff\xfe\x00", "theirs.yaml: expected text in UTF-8"),
        (b"seed: " + b"[" * 50_000, "theirs.yaml: nested too deeply"),
        (BOMB.encode(), "theirs.yaml: expected up to 10,000 values"),
        (b"a: &a [*a]", "theirs.yaml: expected up to 10,000 values"),
        (b"a: &a {<<: *a}", "theirs.yaml: expected up to 10,000 values"),
        (b"a: '" + b"x" * 1_000_001 + b"'", "theirs.yaml: expected a config of up to 1 MB"),
        (b"- 1\n- 2", "theirs.yaml: expected keys with values"),
        (b"just text", "theirs.yaml: expected keys with values"),
    ],
    ids=[
        "cut",
        "wrong",
        "interpolation",
        "object",
        "binary",
        "deep",
        "bomb",
        "in itself",
        "merged",
        "large",
        "list",
        "text",
    ],
)
def test_a_config_file_that_is_none_is_named(
    kdpipe: Callable, downloaded: Callable, tmp_path: Path, content: bytes, said: str
) -> None:
    overrides = downloaded("")
    (tmp_path / "downloaded" / "experiment" / "theirs.yaml").write_bytes(content)
    outcome = kdpipe(*overrides)
    assert_refused(outcome, said)
    assert "HYDRA_FULL_ERROR" not in outcome.errors
    assert not Path("sprung").exists()


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.stem)
def test_our_own_configs_are_far_from_the_limits(file: Path) -> None:
    read_yaml(file)
    assert file.stat().st_size < 10_000
