"""Every file in conf/ composes, becomes settings, and builds."""

from collections.abc import Callable

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from kdpipe.assembly.building import build
from kdpipe.data.answers import read_answers
from kdpipe.models import Ensemble
from kdpipe.settings.components import ALLOW, find_target
from kdpipe.settings.composition import CONF
from kdpipe.settings.schema import ANSWERS, AnswersSettings, Section, Settings

OPTIONS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
# What cannot be trained, with what it is made of.
TEACHERS_ALONE = {"ensemble": ["teacher.members=[runs:/a]"], "answers": ["teacher.file=answers.csv"]}
REQUIRED = {  # of a data set, which has the name `somewhere` then
    "image_folder": ["dataset.root=somewhere"],
    "csv": ["dataset.file=folder/somewhere"],
    "huggingface": ["dataset.path=somebody/somewhere"],
    "torch": ["dataset._target_=somewhere"],
}
DATASETS_ON_DISK = ("cifar10", "cifar100", "fashion_mnist", "dogs_vs_cats", *REQUIRED)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_composes_and_builds(
    option: str, composed: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW, "somewhere")
    group, name = option.split("/")
    place = "teacher" if name in TEACHERS_ALONE else group
    members = TEACHERS_ALONE.get(name, [])
    choice = f"{group}@{place}={name}" if place != group else f"{group}={name}"
    settings = composed(choice, "chain=null", *REQUIRED.get(name, []), *members)
    assert settings.identity
    part = getattr(settings, place) if group != "experiment" else settings.loss
    if name == "ensemble":
        assert find_target("teacher._target_", part.target) is Ensemble  # which is made of runs
        assert part.name == name and part.temperature == settings.loss.temperature
    elif name == "answers":
        assert find_target("teacher._target_", part.target) is read_answers  # from a file
        assert part == AnswersSettings(_target_=ANSWERS, name=name, file="answers.csv")
    elif group == "model":
        assert part.name == (name if name not in ("torchvision", "timm") else "resnet18")
        network = build("model", part, num_classes=3).eval()
        size = part.image_size or network.preprocessing["image_size"]
        image = torch.zeros(1, 3, size, size)
        assert network(image).shape == (1, 3)
    elif group == "dataset" and name in DATASETS_ON_DISK:
        assert part.name == (name if name not in REQUIRED else "somewhere")  # read in the tests of data
    elif group == "optimizer":
        build(group, part, [torch.nn.Parameter(torch.zeros(1))])
    elif group == "scheduler":
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        build(group, part, optimizer, epochs=10, steps_per_epoch=5)
    else:
        build(group, part)


@pytest.mark.parametrize("option", ["launcher/joblib", "launcher/submitit_slurm", "sweeper/grid"])
def test_every_yaml_of_hydra_s_own_groups_names_a_plugin_and_its_settings(option: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        group, name = option.split("/")
        config = compose("config", [f"hydra/{group}={name}", "seed=0"], return_hydra_config=True)
    module, name = config.hydra[group]._target_.rsplit(".", 1)
    plugin = getattr(pytest.importorskip(module), name)
    plugin(**{key: value for key, value in config.hydra[group].items() if key not in ("_target_", "submitit_folder")})


def test_the_defaults_are_the_tutorial_s(composed: Callable[..., Settings]) -> None:
    config = composed()
    assert (config.train.batch_size, config.train.epochs, config.optimizer.lr) == (100, 10, 1e-3)
    assert (config.loss.alpha, config.loss.temperature) == (0.5, 5)
    assert (config.model.name, config.teacher.name, config.teacher.weights) == ("student_cnn", "densenet121", "auto")


@pytest.mark.parametrize(
    ("experiment", "stage", "model", "loss", "tutorial"),
    [
        ("teacher", "teacher", "densenet121", "CrossEntropy", False),
        ("student", "student", "student_cnn", "CrossEntropy", False),
        ("distill", "distill", "student_cnn", "KD", False),
        ("sweep", "distill", "student_cnn", "KD", False),
        ("assistants", "distill", "student_cnn", "KD", False),
        ("born_again", "distill", "student_cnn", "KD", False),
        ("tutorial_teacher", "teacher", "densenet121", "CrossEntropy", True),
        ("tutorial_student", "student", "student_cnn", "CrossEntropy", True),
        ("tutorial_distill", "distill", "student_cnn", "KDTutorial", True),
    ],
)
def test_what_each_experiment_is(
    composed: Callable[..., Settings], experiment: str, stage: str, model: str, loss: str, tutorial: bool
) -> None:
    config = composed(f"experiment={experiment}", "chain=null")
    assert (config.run_stage, config.model.name) == (stage, model)
    assert config.loss.target == f"kdpipe.losses.{loss}"
    assert config.train.test_each_epoch == tutorial
    assert (config.dataset.val_fraction == 0) == tutorial


def test_the_command_line_wins_over_an_experiment(composed: Callable[..., Settings]) -> None:
    config = composed("experiment=teacher", "model=resnet56")
    assert (config.model.name, config.stage) == ("resnet56", "teacher")


def test_the_defaults_of_the_settings_are_those_of_the_config() -> None:
    root = yaml.safe_load((CONF / "config.yaml").read_text())
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, Section) and name in root:
            assert {**field.default.model_dump(), "job": None} == {**root[name], "job": None}, name
        elif not field.is_required() and name in root:
            assert field.default == root[name], name


def test_settings_are_frozen(composed: Callable[..., Settings]) -> None:
    settings = composed()
    with pytest.raises(ValueError, match="frozen"):
        settings.train.epochs = 5


def test_settings_are_plain_values_again(composed: Callable[..., Settings]) -> None:
    settings = composed("experiment=distill", "loss@also=dist", "model.image_size=96")
    again = Settings.model_validate(settings.plain)
    assert again == settings and again.identity == settings.identity
