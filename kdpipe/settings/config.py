"""What Hydra needs to know of kdpipe: where `conf/` is, the resolvers, the checks of the root's own values."""

import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf

from kdpipe.runs.names import epoch_file, names_weights
from kdpipe.runs.store import without_password
from kdpipe.settings.checks import as_typed, check_choice, check_number, check_numbers
from kdpipe.settings.components import find_target
from kdpipe.settings.identity import effective, flatten, identity, temperature_of

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel it lies inside of the package, in a checkout beside it.
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())

# Keys of a model's settings that are for the `Classifier` around the network, or for loading its weights.
PREPROCESSING = ("image_size", "mean", "std")
NOT_ARCHITECTURE = (*PREPROCESSING, "name", "weights", "freeze")
# Keys of a data set's settings that say how it is named and split, whatever its source.
SPLITTING = ("name", "train_fraction", "val_fraction", "test_fraction", "split_seed")


UNLABELLED = "unlabelled_root"  # and a key of its own, for more images


def register_resolvers() -> None:
    """`${identity:}` names the run; `${basename:FOLDER}` is a folder's own name; `${softening:}` is the temperature at
    which the teacher's answers are listened to, 1 where a loss has none."""
    OmegaConf.register_new_resolver("softening", lambda *, _root_: softening(_root_) or 1, replace=True)
    OmegaConf.register_new_resolver("identity", lambda *, _root_: run_identity(_root_), replace=True)
    OmegaConf.register_new_resolver("basename", lambda path: Path(str(path)).expanduser().resolve().name, replace=True)


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The whole composed config as plain values, all interpolations resolved, without Hydra's own part."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    settings = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def settings_composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The settings that a run with these overrides would have."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return settings_of(compose("config", list(overrides)))


def effective_settings(config: DictConfig) -> dict[str, Any]:
    """The flat settings of a run, without those that have no effect on it."""
    return effective(settings_of(config), needs_teacher(config))


def logged_params(config: DictConfig) -> dict[str, Any]:
    """The flat settings of a run as MLflow's params: where it is logged, and which sweep it is from, are none."""
    flat = effective_settings(config)
    return {key: value for key, value in flat.items() if key != "chain" and not key.startswith(("tracking.", "sweep."))}


def run_identity(config: DictConfig) -> str:
    """The run's 12 hex digits, which name its folder."""
    return identity(effective_settings(config))


def needs_teacher(config: DictConfig) -> bool:
    """Whether a teacher is built: a loss asks for one, and its weight is not 0."""
    return any(
        getattr(find_target(f"{key}._target_", config[key]._target_), "uses_teacher", True)
        and config[key].get("alpha") != 0
        for key in ("loss", "also")
        if key in config
    )


def teacher_learns(config: DictConfig) -> bool:
    """Whether a second student stands in the teacher's place."""
    return bool(getattr(find_target("loss._target_", config.loss._target_), "teacher_learns", False))


def mixes(config: DictConfig) -> bool:
    """Whether images are mixed, so that no two epochs see the same."""
    return config.train.mixup is not None or config.train.cutmix is not None


def is_ensemble(model: DictConfig) -> bool:
    """Whether the settings of a network are those of several, which runs of their own describe."""
    return bool(model.get("_target_") == "kdpipe.models.Ensemble")


def stage(config: DictConfig) -> str:
    """teacher, student or distill: what the run is, as its tag says."""
    return "distill" if needs_teacher(config) else str(config.stage)


def method(part: DictConfig) -> str:
    """What a loss's function is called, kd or logit_mse; "" where it comes to the labels alone, or to nothing."""
    name = str(part._target_).rpartition(".")[2]
    if name == "CrossEntropy" or part.get("alpha") == 0:
        return ""
    own = vars(find_target("loss._target_", part._target_)).get("name")  # not what it inherits
    return own or re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def blends(part: DictConfig) -> bool:
    """Whether a loss's alpha weighs the teacher against the labels: where there is a weight, it is another alpha."""
    return "alpha" in part and "weight" not in part


def run_name(config: DictConfig) -> str:
    """A name for people: student_cnn_alone_s0, resnet20_teacher_s0, student_cnn_distill_a0.5_T5_s0; with another
    method than kd student_cnn_dkd_T4_s0, with two of them student_cnn_kd_a0.5_T5_attention_s0; in a sweep what the run
    differs in, a0.5_T5_s0."""
    if config.sweep.job:
        return str(config.sweep.job.name)
    parts, methods = [], []
    for part in (config[key] for key in ("loss", "also") if key in config):
        if name := method(part):
            methods.append(name)
            parts.append(name)
            if blends(part):
                parts.append(f"a{part.alpha:g}")
            if "temperature" in part:
                parts.append(f"T{part.temperature:g}")
            if part.get("standardize"):
                parts.append("standardized")
    if methods == ["kd"]:
        parts[0] = "distill"
    if stage(config) == "teacher":
        parts.insert(0, "teacher")
    return "_".join([config.model.name, *(parts or ["alone"]), f"s{config.seed}"])


def softening(config: DictConfig) -> float | None:
    """The temperature at which the teacher's answers are listened to; None where a loss has none, or standardises them
    first."""
    parts = {key: OmegaConf.to_container(config[key], resolve=True) for key in ("loss", "also") if key in config}
    temperature: float | None = temperature_of(flatten(parts))
    return temperature


def compare_command(config: DictConfig) -> str:
    """The command that shows the runs of this config's experiment side by side."""
    experiment = ["--experiment", config.tracking.experiment]
    return shlex.join(["python", "-m", "kdpipe.compare", *experiment, *_store_flags(config)])


def export_command(config: DictConfig, run_id: str) -> str:
    """The command that makes files of a run's network."""
    return shlex.join(["python", "-m", "kdpipe.export", run_id, "--out", config.model.name, *_store_flags(config)])


def _store_flags(config: DictConfig) -> list[str]:
    """What tells a command on finished runs where they are."""
    flags = ["--uri", without_password(config.tracking.uri)] if config.tracking.uri else []
    return flags + (["--output-dir", config.output_dir] if config.output_dir != "outputs" else [])


def check(config: DictConfig) -> None:
    """Raise ValueError for a value outside of its range; losses and networks check their own."""
    for key in ("teacher", "train", "evaluation", "distillation", "sweep", "tracking"):
        if not isinstance(config[key], DictConfig):
            hint = "model@teacher=… chooses the teacher" if key == "teacher" else f"{key}.<key>=… sets what is in it"
            raise ValueError(f"{key}={config[key]}: no value is accepted; {hint}")
    if config.chain is not None:  # which the run of a link has not
        raise ValueError(f"chain={config.chain}: one for the whole command is accepted, python -m kdpipe -m 'chain=…'")
    check_choice("stage", config.stage, ["student", "teacher"])
    check_number("seed", config.seed, low=0, integer=True)
    train = config.train
    check_number("train.epochs", train.epochs, low=0, integer=True)
    check_number("train.batch_size", train.batch_size, low=1, integer=True)
    if train.threads is not None:
        check_number("train.threads", train.threads, low=1, integer=True)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(train.device)):
        raise ValueError(f"train.device={train.device}: auto, cpu, cuda, cuda:<number> or mps is accepted")
    check_choice("train.precision", train.precision, ["auto", "float32", "bfloat16"])
    check_choice("train.resume", train.resume, ["auto", "never"])
    for key in ("checkpoint_minutes", "clip_norm", "mixup", "cutmix"):
        if train[key] is not None:
            check_number(f"train.{key}", train[key], above=0)
    check_choice("train.select", train.select, ["last", "best"])
    if train.keep_epochs is not None:
        check_numbers("train.keep_epochs", train.keep_epochs, low=1, integer=True)
        if beyond := [epoch for epoch in train.keep_epochs if epoch > train.epochs]:
            raise ValueError(f"train.keep_epochs={beyond[0]}: epochs up to train.epochs={train.epochs} are accepted")
    check_choice("train.test_each_epoch", train.test_each_epoch, [True, False])
    check_choice("train.compile", train.compile, ["auto", True, False])
    check_choice("train.profile", train.profile, [True, False])
    check_choice("evaluation.pictures", config.evaluation.pictures, [True, False])
    check_number("evaluation.timing_seconds", config.evaluation.timing_seconds, low=0)
    distillation = config.distillation
    check_choice("distillation.outputs", distillation.outputs, ["auto", "cached", "online", "views"])
    check_number("distillation.views", distillation.views, low=1, integer=True)
    check_number("distillation.cache_max_gb", distillation.cache_max_gb, low=0)
    check_number("sweep.confirm_seeds", config.sweep.confirm_seeds, low=0, integer=True)
    check_choice("sweep.rerun", config.sweep.rerun, [True, False])
    if "lr" in config.optimizer:
        check_number("optimizer.lr", config.optimizer.lr, above=0)
    for key in ("weight_decay", "momentum"):
        if key in config.optimizer:
            check_number(f"optimizer.{key}", config.optimizer[key], low=0)
    if is_ensemble(config.model):
        raise ValueError(f"model={config.model.name}: one network is trained; model@teacher=ensemble is accepted")
    check_weights("model.weights", config.model.weights, [None, "imagenet"])
    if teacher_learns(config):
        check_second_student(config)
    if needs_teacher(config):
        # A second student, too, learns from random weights unless it is told otherwise.
        choices = ["auto", None, "imagenet"] if teacher_learns(config) else ["auto"]
        check_weights("teacher.weights", config.teacher.weights, choices)
    if not isinstance(config.tracking.experiment, str) or not config.tracking.experiment.strip():
        raise ValueError(f"tracking.experiment={config.tracking.experiment}: a name is accepted")
    for key in ("model.name", "dataset.name"):
        if not isinstance(OmegaConf.select(config, key), str):
            raise ValueError(f"{key}={OmegaConf.select(config, key)}: a name is accepted")


def check_weights(key: str, weights: object, choices: Sequence[str | None]) -> None:
    """Raise ValueError for weights that are none of the choices, no run and no file that is there."""
    if weights in choices or names_weights(weights):
        return
    if str(weights).startswith("runs:/"):
        raise ValueError(f"{key}={weights}: runs:/<run id> or runs:/<run id>/epoch_<number> is accepted")
    if weights is None or not Path(str(weights)).expanduser().is_file():
        problem = "" if weights in (None, "imagenet", "auto") else "there is no such file; "
        accepted = ", ".join(map(as_typed, choices))
        raise ValueError(f"{key}={as_typed(weights)}: {problem}{accepted}, a file or runs:/<run id> is accepted")


def check_second_student(config: DictConfig) -> None:
    """Raise ValueError for what two students that teach each other cannot have."""
    if is_ensemble(config.teacher):
        raise ValueError(f"model@teacher={config.teacher.name}: a second student is one network")
    if config.teacher.get("freeze", "none") != "none":
        raise ValueError(f"teacher.freeze={config.teacher.freeze}: a second student learns; none is accepted")
    if config.train.select == "best":
        raise ValueError("train.select=best: two students are best at different epochs; last is accepted")


def check_ensemble(config: DictConfig) -> None:
    """Raise ValueError for several teachers that cannot be one; one alone is checked elsewhere."""
    teacher = config.teacher
    if not is_ensemble(teacher) or not needs_teacher(config):
        return
    members = teacher.members
    runs = "runs, [runs:/<run id>,runs:/<run id>]"
    if not isinstance(members, ListConfig) or not members:
        raise ValueError(f"teacher.members={as_typed(members)}: a list of {runs}, is accepted")
    if odd := [member for member in members if not names_weights(member)]:
        raise ValueError(f"teacher.members={as_typed(odd[0])}: a list of {runs}, is accepted")
    if twice := [member for number, member in enumerate(members) if member in members[:number]]:
        raise ValueError(f"teacher.members={twice[0]}: it is there twice; each once, with its share, is accepted")
    if teacher.shares is not None:
        check_numbers("teacher.shares", teacher.shares, low=0)
        if len(teacher.shares) != len(members) or not sum(teacher.shares) > 0:
            accepted = f"a number for each of the {len(members)} teacher.members, not all 0, is accepted"
            raise ValueError(f"teacher.shares={as_typed(teacher.shares)}: {accepted}")
    check_number("teacher.temperature", teacher.temperature, above=0)
    if teacher.weights != "auto":
        raise ValueError(f"teacher.weights={teacher.weights}: an ensemble has its members' weights; auto is accepted")


def epochs_not_kept(config: DictConfig, over: int, files: Collection[str]) -> str:
    """A line on the epochs to be kept that are over and not among a run's files; "" where none is missing."""
    wanted = config.train.keep_epochs or []
    missing = [str(epoch) for epoch in wanted if epoch <= over and epoch_file(epoch) not in files]
    line = f"train.keep_epochs=[{','.join(missing)}]: this run has not kept them; train.resume=never trains it anew"
    return line if missing else ""
