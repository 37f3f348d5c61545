"""What Hydra needs to know of kdpipe: where `conf/` is, the resolvers, the checks of the root's own values."""

import re
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kdpipe.checks import as_typed, check_choice, check_number
from kdpipe.identity import effective, identity
from kdpipe.targets import find_target

_PACKAGE = Path(__file__).resolve().parent
# In a wheel it lies inside of the package, in a checkout beside it.
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())

# Keys of a model's settings that are for the `Classifier` around the network, or for loading its weights.
PREPROCESSING = ("image_size", "mean", "std")
NOT_ARCHITECTURE = (*PREPROCESSING, "name", "weights", "freeze")
# Keys of a data set's settings that say how it is named and split, whatever its source.
SPLITTING = ("name", "train_fraction", "val_fraction", "test_fraction", "split_seed")


def register_resolvers() -> None:
    """`${identity:}` names the run; `${basename:FOLDER}` is a folder's own name."""
    OmegaConf.register_new_resolver("identity", lambda *, _root_: run_identity(_root_), replace=True)
    OmegaConf.register_new_resolver("basename", lambda path: Path(str(path)).expanduser().resolve().name, replace=True)


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The whole composed config as plain values, all interpolations resolved, without Hydra's own part."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    settings = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


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


def stage(config: DictConfig) -> str:
    """teacher, student or distill: what the run is, as its tag says."""
    return "distill" if needs_teacher(config) else str(config.stage)


def run_name(config: DictConfig) -> str:
    """A name for people: student_cnn_distill_a0.5_T5_s0, student_cnn_alone_s0, resnet20_teacher_s0; in a sweep what
    the run differs in, a0.5_T5_s0."""
    if config.sweep.job:
        return str(config.sweep.job.name)
    parts = [config.model.name, stage(config).replace("student", "alone")]
    if needs_teacher(config) and "alpha" in config.loss:
        parts.append(f"a{config.loss.alpha:g}")
    if needs_teacher(config) and "temperature" in config.loss:
        parts.append(f"T{config.loss.temperature:g}")
    return "_".join([*parts, f"s{config.seed}"])


def compare_command(config: DictConfig) -> str:
    """The command that shows the runs of this config's experiment side by side."""
    flags = ["--experiment", config.tracking.experiment]
    flags += ["--uri", config.tracking.uri] if config.tracking.uri else []
    flags += ["--output-dir", config.output_dir] if config.output_dir != "outputs" else []
    return shlex.join(["python", "-m", "kdpipe.compare", *flags])


def check(config: DictConfig) -> None:
    """Raise ValueError for a value outside of its range; losses and networks check their own."""
    for key in ("teacher", "train", "distillation", "sweep", "tracking"):
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
    for key in ("checkpoint_minutes", "clip_norm"):
        if train[key] is not None:
            check_number(f"train.{key}", train[key], above=0)
    check_choice("train.select", train.select, ["last", "best"])
    check_choice("train.test_each_epoch", train.test_each_epoch, [True, False])
    check_choice("train.compile", train.compile, ["auto", True, False])
    check_choice("train.profile", train.profile, [True, False])
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
    for key, needs_weights in (("model", False), ("teacher", needs_teacher(config))):
        check_weights(f"{key}.weights", config[key].weights, needs_weights)
    if not isinstance(config.tracking.experiment, str) or not config.tracking.experiment.strip():
        raise ValueError(f"tracking.experiment={config.tracking.experiment}: a name is accepted")
    for key in ("model.name", "dataset.name"):
        if not isinstance(OmegaConf.select(config, key), str):
            raise ValueError(f"{key}={OmegaConf.select(config, key)}: a name is accepted")


def check_weights(key: str, weights: object, is_teacher: bool) -> None:
    """Raise ValueError for weights that a network cannot have: a missing file, or none for a teacher."""
    if key.startswith("teacher") and not is_teacher:
        return  # there is none
    accepted = "auto" if is_teacher else "null, imagenet"
    if weights in (["auto"] if is_teacher else [None, "imagenet"]) or str(weights).startswith("runs:/"):
        return
    if weights is None or not Path(str(weights)).expanduser().is_file():
        problem = "" if weights in (None, "imagenet", "auto") else "there is no such file; "
        raise ValueError(f"{key}={as_typed(weights)}: {problem}{accepted}, a file or runs:/<run id> is accepted")
