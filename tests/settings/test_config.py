"""Every file in conf/ composes and builds; a run's identity is what it is and nothing else."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import settings as settings_of_test
from hypothesis import strategies as st
from omegaconf import DictConfig

from kdpipe.models import Ensemble
from kdpipe.settings import config as settings
from kdpipe.settings.components import find_target
from kdpipe.settings.identity import identity, what_matters

OPTIONS = sorted(path.relative_to(settings.CONF).with_suffix("").as_posix() for path in settings.CONF.glob("*/*.yaml"))
DATASETS_ON_DISK = ("cifar10", "cifar100", "fashion_mnist", "dogs_vs_cats", "image_folder")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_composes_and_builds(option: str, composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    group, name = option.split("/")
    folder = ["dataset.root=somewhere"] if name == "image_folder" else []
    place = "teacher" if name == "ensemble" else group
    config = composed(f"{group}@{place}={name}" if place != group else f"{group}={name}", *folder)
    config.chain = None  # as in each of its runs
    settings.check(config)
    assert settings.run_identity(config)
    part = config[place] if group != "experiment" else config.loss
    if name == "ensemble":
        assert find_target("teacher._target_", part._target_) is Ensemble  # which is made of runs
        assert part.name == name and part.temperature == config.loss.temperature
    elif group == "model":
        assert part.name == (name if name not in ("torchvision", "timm") else "resnet18")
        arguments = {key: value for key, value in part.items() if key not in settings.NOT_ARCHITECTURE}
        network = instantiate(arguments, num_classes=3).eval()
        size = part.image_size or network.preprocessing["image_size"]
        image = torch.zeros(1, 3, size, size)
        assert network(image).shape == (1, 3)
    elif group == "dataset" and name in DATASETS_ON_DISK:
        assert part.name == (name if name != "image_folder" else "somewhere")  # read in the tests of data
    elif group == "optimizer":
        instantiate(part)([torch.nn.Parameter(torch.zeros(1))])
    elif group == "scheduler":
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        instantiate(part)(optimizer, epochs=10, steps_per_epoch=5)
    else:
        instantiate({key: value for key, value in part.items() if key not in settings.SPLITTING})


@pytest.mark.parametrize("option", ["launcher/joblib", "launcher/submitit_slurm", "sweeper/grid"])
def test_every_yaml_of_hydra_s_own_groups_names_a_plugin_with_its_settings(option: str) -> None:
    with initialize_config_dir(str(settings.CONF), version_base="1.3"):
        group, name = option.split("/")
        config = compose("config", [f"hydra/{group}={name}", "seed=0"], return_hydra_config=True)
    module, name = config.hydra[group]._target_.rsplit(".", 1)
    plugin = getattr(pytest.importorskip(module), name)
    plugin(**{key: value for key, value in config.hydra[group].items() if key not in ("_target_", "submitit_folder")})


def test_the_root_s_values_are_the_tutorial_s(composed: Callable[..., DictConfig]) -> None:
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
    composed: Callable[..., DictConfig], experiment: str, stage: str, model: str, loss: str, tutorial: bool
) -> None:
    config = composed(f"experiment={experiment}")
    assert (settings.stage(config), config.model.name) == (stage, model)
    assert config.loss._target_ == f"kdpipe.losses.{loss}"
    assert config.train.test_each_epoch == tutorial
    assert (config.dataset.val_fraction == 0) == tutorial


def test_the_command_line_wins_over_an_experiment(composed: Callable[..., DictConfig]) -> None:
    config = composed("experiment=teacher", "model=resnet56")
    assert (config.model.name, config.stage) == ("resnet56", "teacher")


SAME = [
    ["loss.alpha=0.50"],
    ["loss.temperature=5.0"],
    ["loss.standardize=false"],
    ["output_dir=elsewhere"],
    ["tracking.uri=http://host"],
    ["tracking.experiment=another"],
    ["dataset.root=elsewhere"],
    ["train.device=cpu", "train.threads=1", "train.resume=never"],
    ["distillation.outputs=online", "distillation.cache_max_gb=1", "distillation.views=5", "sweep.confirm_seeds=5"],
    ["train.compile=true", "train.profile=true", "train.keep_epochs=[1,5]", "optimizer.fused=false"],
    ["experiment=distill"],
    ["evaluation.pictures=false", "evaluation.timing_seconds=0"],
    ["chain=[{model:resnet56},{}]"],
]
OTHER = [
    ["seed=1"],
    ["loss.alpha=0.6"],
    ["loss.temperature=4"],
    ["train.epochs=11"],
    ["train.precision=bfloat16"],
    ["dataset.split_seed=1"],
    ["dataset.train_fraction=0.5"],
    ["teacher.weights=a.pth"],
    ["teacher.weights=runs:/a/epoch_5"],
    ["model@teacher=resnet56"],
    ["model@teacher=ensemble", "teacher.members=[runs:/a]"],
    ["augmentation=crop_flip"],
    ["loss=kd_tutorial"],
    ["loss=dkd"],
    ["loss=label_smoothing"],
    ["loss.standardize=true"],
    ["loss@also=dist"],
    ["loss.alpha=0"],
    ["distillation.outputs=views"],
    ["train.mixup=0.2"],
    ["train.cutmix=1"],
    ["dataset.unlabelled_root=more"],
    ["loss@also=kd_tutorial"],
]


@pytest.mark.parametrize("overrides", SAME, ids=" ".join)
def test_what_does_not_matter_is_no_part_of_the_identity(
    composed: Callable[..., DictConfig], overrides: list[str]
) -> None:
    assert settings.run_identity(composed(*overrides)) == settings.run_identity(composed())


@pytest.mark.parametrize("overrides", OTHER, ids=" ".join)
def test_what_matters_is_part_of_the_identity(composed: Callable[..., DictConfig], overrides: list[str]) -> None:
    assert settings.run_identity(composed(*overrides)) != settings.run_identity(composed())


def test_at_alpha_0_teacher_and_temperature_do_not_matter(composed: Callable[..., DictConfig]) -> None:
    control = settings.run_identity(composed("loss.alpha=0"))
    assert control == settings.run_identity(composed("loss.alpha=0.0", "loss.temperature=2", "model@teacher=resnet20"))
    assert control == settings.run_identity(composed("loss=kd_tutorial", "loss.alpha=0"))
    assert control == settings.run_identity(composed("experiment=student"))
    assert control == settings.run_identity(composed("loss.alpha=0", "distillation.outputs=views"))
    assert control == settings.run_identity(composed("loss.alpha=0", "dataset.unlabelled_root=more"))
    assert control == settings.run_identity(composed("loss.alpha=0", "loss.standardize=true"))
    assert control == settings.run_identity(composed("loss=logit_mse", "loss.alpha=0"))


def test_an_identity_is_the_one_that_it_was_before_logits_could_be_standardised() -> None:
    before = {"loss._target_": "kdpipe.losses.KD", "loss.alpha": 0.5, "loss.temperature": 5}
    assert identity(before | {"loss.standardize": False}) == identity(before)
    assert identity(before | {"loss.standardize": "False"}) == identity(before)  # as MLflow tells it
    assert identity(before | {"loss.standardize": True}) != identity(before)


def test_a_second_method_is_part_of_the_identity_where_it_has_an_effect(composed: Callable[..., DictConfig]) -> None:
    def known_as(*overrides: str) -> str:
        return settings.run_identity(composed(*overrides))

    both = known_as("loss=cross_entropy", "loss@also=dist")
    assert (
        both
        == known_as("loss.alpha=0", "loss@also=dist")
        == known_as("loss=logit_mse", "loss.alpha=0", "loss@also=dist")
    )
    assert both == known_as("loss=cross_entropy", "loss@also=dist", "also.ce_weight=5")  # that of the loss counts
    others = [["loss@also=dist"], ["loss=cross_entropy"], ["loss=cross_entropy", "loss@also=dist", "also.weight=2"]]
    assert len({both, *(known_as(*overrides) for overrides in others)}) == 4
    assert known_as("loss=dist", "loss@also=kd", "also.alpha=0") == known_as("loss=dist")
    assert known_as("loss.alpha=0", "loss@also=logit_mse", "also.alpha=0") == known_as("experiment=student")
    assert not settings.needs_teacher(composed("loss.alpha=0", "loss@also=logit_mse", "also.alpha=0"))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "student_cnn_distill_a0.5_T5_s0"),
        (["loss.alpha=0"], "student_cnn_alone_s0"),
        (["experiment=student", "seed=3"], "student_cnn_alone_s3"),
        (["experiment=teacher"], "densenet121_teacher_s0"),
        (["experiment=teacher", "loss=label_smoothing"], "densenet121_teacher_label_smoothing_s0"),
        (["loss=label_smoothing"], "student_cnn_label_smoothing_s0"),
        (["loss.standardize=true"], "student_cnn_distill_a0.5_T5_standardized_s0"),
        (["loss=kd_tutorial"], "student_cnn_kd_tutorial_a0.5_T5_s0"),
        (["loss=logit_mse", "loss.alpha=0.9"], "student_cnn_logit_mse_a0.9_s0"),
        (["loss=dkd"], "student_cnn_dkd_T4_s0"),
        (["loss=dist"], "student_cnn_dist_T4_s0"),
        (["loss@also=dist"], "student_cnn_kd_a0.5_T5_dist_T4_s0"),
        (["loss=label_smoothing", "loss@also=logit_mse"], "student_cnn_label_smoothing_logit_mse_a1_s0"),
        (["loss=cross_entropy", "loss@also=dkd"], "student_cnn_dkd_T4_s0"),
        (["loss.alpha=0", "loss@also=dkd"], "student_cnn_dkd_T4_s0"),
        (["loss@also=logit_mse", "also.alpha=0"], "student_cnn_distill_a0.5_T5_s0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_is_called_by_its_methods(composed: Callable[..., DictConfig], overrides: list[str], name: str) -> None:
    assert settings.run_name(composed(*overrides)) == name


@pytest.mark.parametrize(
    ("overrides", "temperature"),
    [
        ([], 5),
        (["loss=dkd"], 4),
        (["loss=logit_mse"], None),
        (["loss.standardize=true"], None),
        (["loss.standardize=true", "loss@also=dist"], 4),
        (["loss=cross_entropy", "loss@also=kd"], 5),
        (["loss.alpha=0", "loss@also=logit_mse"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_temperature_at_which_a_teacher_is_listened_to(
    composed: Callable[..., DictConfig], overrides: list[str], temperature: float | None
) -> None:
    assert settings.softening(composed(*overrides)) == temperature


def test_beta_of_dkd_is_the_pair_s(composed: Callable[..., DictConfig]) -> None:
    assert composed("loss=dkd").loss.beta == 8
    assert composed("loss=dkd", "+benchmark.dkd_beta=6").loss.beta == 6
    assert composed("loss=dkd", "+benchmark.dkd_beta=6", "loss.beta=1").loss.beta == 1


def test_the_number_of_views_matters_where_views_are_taken(composed: Callable[..., DictConfig]) -> None:
    five, ten = (composed("distillation.outputs=views", f"distillation.views={number}") for number in (5, 10))
    assert settings.run_identity(five) != settings.run_identity(ten)


@settings_of_test(deadline=None)
@given(st.dictionaries(st.text("abc.", min_size=1), st.integers() | st.floats(allow_nan=False) | st.text(), max_size=5))
def test_the_order_of_settings_does_not_matter(flat: dict[str, object]) -> None:
    assert identity(flat) == identity(dict(reversed(flat.items())))


def test_places_are_left_out_whole() -> None:
    flat = {"tracking.uri": "x", "tracking.experiment": "y", "output_dir": "z", "dataset.root_of_all": 1}
    assert what_matters(flat) == {"dataset.root_of_all": 1}


ROOMS = {
    "models": {"checks"},
    "losses": {"checks", "features"},
    "data": {"cache", "checks", "progress", "randomness"},
    "train": {
        *("data", "models", "losses", "evaluate", "features", "teacher", "checkpoint"),
        *("hardware", "interruption", "progress", "randomness"),
    },
    "evaluate": {"data", "models", "hardware", "progress"},
    "quality": set(),
    "exam": {"data", "evaluate", "files", "hardware", "outputs", "pictures", "quality", "store", "teacher"},
    "pictures": {"quality"},
    "cost": {"checks", "command", "finished", "hardware", "models", "report", "store", "timing", "tracking"},
    "timing": set(),
    "teacher": {"data", "features", "models"},
    "features": set(),
    "outputs": {"cache", "data", "hardware", "models", "progress"},
    "teacher_check": {"data", "hardware", "outputs", "teacher"},
    "hardware": set(),
    "profiling": set(),
    "cache": set(),
    "claim": {"files"},
    "checkpoint": {"files", "models"},
    "files": set(),
    "interruption": set(),
    "journal": {"files", "store"},
    "sync": {"claim", "journal", "store", "tracking"},
    "command": {"store"},
    "compare": {"command", "config", "identity", "report", "store", "tracking"},
    "deployed": {"build", "finished", "models", "store", "tracking"},
    "export": {
        *("command", "deployed", "finished", "report", "timing", "tracking"),
        *("build", "config", "data", "models", "progress", "store"),
        "cost",
        "hardware",
    },
    "predict": {"command", "data", "deployed", "report", "tracking"},
    "tracking": {"claim", "interruption", "journal", "store"},
    "store": set(),
    "report": {"store"},
    "identity": set(),
    "checks": set(),
    "progress": set(),
    "randomness": set(),
    "schedulers": {"checks"},
    "targets": set(),
}
HYDRA_ROOMS = {"main", "build", "shortcuts", "config", "errors", "grid", "chain", "sweep", "targets", "finished"}
ONLY_IN = {"mlflow": {"tracking"}, "hydra": HYDRA_ROOMS, "omegaconf": HYDRA_ROOMS}


@pytest.mark.parametrize("file", sorted(Path(settings.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_room_reaches_into_one_that_it_may_not(file: Path) -> None:
    room = file.relative_to(Path(settings.__file__).parent).with_suffix("").parts[0]
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package in ONLY_IN:
                assert room in ONLY_IN[package], f"{file.name} imports {name}"
            if package == "kdpipe" and room in ROOMS:
                assert parts[0] in ROOMS[room] | {room, "__version__"}, f"{file.name} imports {name}"
