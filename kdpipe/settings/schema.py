"""A run's settings: typed, frozen, and checked once, where a run begins."""

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kdpipe.settings import identity
from kdpipe.settings.addresses import epoch_file, file_and_part, names_weights
from kdpipe.settings.components import loss_class
from kdpipe.settings.errors import ConfigError, as_typed
from kdpipe.settings.metric_names import LAST_EPOCH, Metric, Select
from kdpipe.settings.values import (
    Interpolation,
    NonNegative,
    NonNegativeInt,
    Number,
    Positive,
    PositiveInt,
    PositiveShare,
    Resize,
    SplitSeed,
    StoredResize,
    TestShare,
    TrainShare,
    ValidationShare,
    check_shares,
    model_error,
)

log = logging.getLogger("kdpipe")
ENSEMBLE = "kdpipe.models.Ensemble"
ANSWERS = "kdpipe.data.answers.read_answers"
RUN_LIST = "a list of runs, [runs:/<run id>,runs:/<run id>]"
Freeze = Literal["none", "backbone"]
Model = TypeVar("Model", bound="Section")


class Section(BaseModel):
    """A part of the settings. Its defaults are those of conf/config.yaml."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @property
    def plain(self) -> dict[str, Any]:
        """What was set, as plain values."""
        return self.model_dump(exclude_unset=True, by_alias=True)


class Component(Section):
    """Something that a config names by `_target_`, with its arguments."""

    model_config = ConfigDict(extra="allow")

    target: Annotated[str, Field(alias="_target_", description="the name of a class or a function")]

    @property
    def arguments(self) -> dict[str, Any]:
        """Those that are not fields of the section itself; they go to the constructor."""
        return {name: value for name, value in (self.model_extra or {}).items() if name != "_partial_"}


class MethodSettings(Component):
    @property
    def uses_teacher(self) -> bool:
        """Whether it needs a teacher: it compares the student with one, and its weight is not 0."""
        return loss_class(self.target).uses_teacher and not self.is_off

    @property
    def is_off(self) -> bool:
        """Whether alpha leaves the labels alone."""
        return self.blends and self.arguments["alpha"] == 0

    @property
    def blends(self) -> bool:
        """Whether `alpha` weighs the teacher against the labels."""
        return identity.blends({"_target_": self.target, **self.arguments})

    @property
    def method(self) -> str:
        """The name of its function, kd or logit_mse; "" where it comes down to the labels alone."""
        name = identity.canonical_target(self.target).rpartition(".")[2]
        if self.is_off or name == "CrossEntropy":
            return ""
        own = vars(loss_class(self.target)).get("name")  # not what it inherits
        return own or re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


class LossSettings(MethodSettings):
    class_weights: Annotated[
        Literal["balanced"] | list[Positive] | None,
        Field(description="balanced, a list with a number above 0 for each class, or null"),
    ] = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0


class OptimizerSettings(Component):
    lr: Positive | None = None
    weight_decay: NonNegative | None = None
    momentum: NonNegative | None = None
    decay_norm_and_bias: bool = True
    layer_decay: PositiveShare | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        own = ("_target_", "_partial_", "decay_norm_and_bias", "layer_decay")
        return {key: value for key, value in self.plain.items() if key not in own}


class DatasetSettings(Component):
    name: Annotated[str, Field(description="a name")]
    train_fraction: TrainShare
    val_fraction: ValidationShare
    test_fraction: TestShare | None
    split_seed: SplitSeed
    unlabelled_root: str | None = None
    sampler: Literal["balanced"] | None = None

    @property
    def resize(self) -> StoredResize:
        """How photos are stored; for data sets of other images, too."""
        return self.arguments.get("resize", "squeeze")

    @model_validator(mode="after")
    def _leaves_training_images(self) -> Self:
        try:
            check_shares(self.val_fraction, self.test_fraction)
        except ConfigError as error:
            raise error.under("dataset") from error
        return self

    @property
    def root(self) -> str:
        """Where the images are; the data set's name where it has no folder."""
        return str(self.arguments.get("root", self.name))


class NetworkSettings(Component):
    """A network with the preprocessing that its weights were trained with."""

    name: Annotated[str, Field(description="a name")]
    image_size: PositiveInt | None  # None, as for the others: what its library's weights were trained with
    mean: list[Number] | None
    std: list[Positive] | None
    resize: Resize | None = "squeeze"
    interpolation: Interpolation | None = "bilinear"
    crop_pct: PositiveShare | None = 1
    weights: str | None = None
    freeze: Freeze = "none"


class EnsembleSettings(Component):
    """Several finished runs as one teacher."""

    name: Annotated[str, Field(description="a name")]
    members: Annotated[list[str], Field(description=RUN_LIST)] = []
    shares: list[NonNegative] | None = None
    temperature: Positive = 1
    weights: str | None = "auto"
    freeze: Literal["none"] = "none"

    def check(self) -> None:
        """Raise ConfigError for members that cannot teach together."""
        if not self.members:
            raise ConfigError("teacher.members", self.members, RUN_LIST)
        for number, member in enumerate(self.members):
            if not names_weights(member):
                raise ConfigError("teacher.members", member, RUN_LIST)
            if member in self.members[:number]:
                raise ConfigError("teacher.members", member, "each run once, with its share", "it is listed twice")
        if self.shares is not None and (len(self.shares) != len(self.members) or not sum(self.shares) > 0):
            expected = f"a number for each of the {len(self.members)} teacher.members, not all 0"
            raise ConfigError("teacher.shares", self.shares, expected)
        if self.weights != "auto":
            raise ConfigError("teacher.weights", self.weights, "auto", "an ensemble has the weights of its members")


class AnswersSettings(Component):
    """A file of answers in the place of a network that gives them."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(description="a name")]
    file: Annotated[str, Field(description="a .npz, .parquet or .csv file")]
    values: Literal["auto", "logits", "probabilities"] = "auto"
    floor: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    digest: str | None = None  # what the file is, wherever it lies; the command line fills it in
    weights: str | None = "auto"
    freeze: Literal["none"] = "none"

    def check(self) -> None:
        """Raise ConfigError for weights, which a file of answers does not have."""
        if self.weights != "auto":
            raise ConfigError("teacher.weights", self.weights, "auto", f"the answers are those of {self.file}")


# What may teach besides one network, by its target.
TEACHERS: dict[str, type[EnsembleSettings] | type[AnswersSettings]] = {
    ENSEMBLE: EnsembleSettings,
    ANSWERS: AnswersSettings,
}


def _teacher(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return validated(TEACHERS.get(str(value.get("_target_")), NetworkSettings), value, "teacher")


TeacherSettings = Annotated[NetworkSettings | EnsembleSettings | AnswersSettings, BeforeValidator(_teacher)]


class TrainSettings(Section):
    epochs: NonNegativeInt = 10
    batch_size: PositiveInt = 100
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:<number> or mps")
    ] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: Annotated[
        Literal["auto", "default", "reduce-overhead", "max-autotune"] | bool,
        Field(description="one of auto, true, false, default, reduce-overhead, max-autotune"),
    ] = "auto"
    threads: PositiveInt | None = None
    resume: Literal["auto", "never"] = "auto"
    checkpoint_minutes: Positive | None = 10
    mixup: Positive | None = None
    cutmix: Positive | None = None
    clip_norm: Positive | None = None
    accumulate: PositiveInt = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    early_stop: PositiveInt | None = None
    select: Select = "last"
    metric: Metric = "accuracy"
    keep_epochs: list[PositiveInt] | None = None
    test_each_epoch: bool = False
    show_views: bool = False

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that no two epochs see the same ones."""
        return self.mixup is not None or self.cutmix is not None

    def last_epoch(self, metrics: Mapping[str, float]) -> int:
        """The epoch that a finished run has ended with, from its metrics."""
        return int(metrics.get(LAST_EPOCH, self.epochs))

    def warn_of_missing_epochs(self, over: int, files: Collection[str], run: str = "this run") -> None:
        """Log the epochs of `keep_epochs` that are over and not among a run's files."""
        missing = [epoch for epoch in self.keep_epochs or () if epoch <= over and epoch_file(epoch) not in files]
        if missing:
            problem = f"{run} has not kept them; train.resume=never trains it anew"
            log.warning(ConfigError("train.keep_epochs", missing, problem=problem))


class EvaluationSettings(Section):
    pictures: bool = True
    timing_seconds: NonNegative = 2


class DistillationSettings(Section):
    outputs: Literal["auto", "cached", "online", "views"] = "auto"
    views: PositiveInt = 10
    cache_max_gb: NonNegative = 10


class JobSettings(Section):
    """What a sweep passes to each of its runs.

    Attributes:
        id: of the sweep.
        parent: id of the sweep's own run in MLflow.
        name: of this run.
        teacher: the run or file whose weights teach it; "" where none does.
        number: its place among the runs that were missing, counted from 1.
        reports: folder among the runs where it reports its progress.
    """

    id: str
    parent: str
    name: str
    teacher: str
    number: int
    reports: str


class SweepSettings(Section):
    confirm_seeds: NonNegativeInt = 0
    rerun: bool = False
    job: JobSettings | None = None


class SearchJob(Section):
    """What a search passes to each of its jobs, which asks for a trial when it starts.

    Attributes:
        study: name of its study.
        sweep: id of the sweep that its runs belong to.
        parent: id of the sweep's own run in MLflow.
        teacher: the run or file whose weights teach all trials; "" where none does, or several do.
        since: when the search was started, in seconds since 1970.
        number: the job's place among the others, counted from 1.
        reports: folder among the runs where it reports its progress.
    """

    study: str
    sweep: str
    parent: str
    teacher: str
    since: float
    number: int
    reports: str


class SearchSettings(Section):
    trials: PositiveInt | None = None
    sampler: Literal["tpe", "cmaes", "random", "grid"] = "tpe"
    pruner: Literal["hyperband", "halving", "none"] = "hyperband"
    seed: NonNegativeInt = 0
    storage: str | None = None
    study: Annotated[str, Field(pattern=r"\S", description="a name")] | None = None
    goals: list[Literal["accuracy", "latency"]] = ["accuracy"]
    max_latency_ms: Positive | None = None
    job: SearchJob | None = None

    @model_validator(mode="after")
    def _begin_with_accuracy(self) -> Self:
        if self.goals not in (["accuracy"], ["accuracy", "latency"]):
            raise ConfigError("search.goals", self.goals, "[accuracy] or [accuracy,latency]")
        return self


class TrackingSettings(Section):
    uri: str | None = None
    experiment: Annotated[str, Field(pattern=r"\S", description="a name")] = "kdpipe"


class Settings(Section):
    """All settings of a run."""

    stage: Literal["student", "teacher"] = "student"
    seed: NonNegativeInt = 0
    output_dir: Annotated[str, AfterValidator(os.path.expanduser)] = "outputs"
    dataset: DatasetSettings
    model: NetworkSettings
    teacher: TeacherSettings
    loss: LossSettings
    also: MethodSettings | None = None
    optimizer: OptimizerSettings
    scheduler: Component
    augmentation: Component = Component.model_validate({"_target_": "kdpipe.data.augmentation.no_augmentation"})
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    distillation: DistillationSettings = DistillationSettings()
    sweep: SweepSettings = SweepSettings()
    search: SearchSettings = SearchSettings()
    chain: list[dict[str, Any]] | None = None
    tracking: TrackingSettings = TrackingSettings()
    benchmark: dict[str, Any] | None = None  # what a pair of the benchmark sets for losses that are chosen with it

    @model_validator(mode="before")
    @classmethod
    def _names_one_network(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, Mapping) else None
        if isinstance(model, Mapping) and model.get("_target_") == ENSEMBLE:
            raise ConfigError("model", model.get("name"), "one network; several can teach it, model@teacher=ensemble")
        if isinstance(model, Mapping) and model.get("_target_") == ANSWERS:
            raise ConfigError("model", model.get("name"), "a network; answers can teach it, model@teacher=answers")
        return values

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.also:
            loss_class(self.also.target, "also")
        if self.chain is not None:  # the runs of its links have none
            raise ConfigError("chain", self.chain, problem="a chain is one command: python -m kdpipe -m 'chain=…'")
        beyond = [epoch for epoch in self.train.keep_epochs or () if epoch > self.train.epochs]
        if beyond:
            raise ConfigError("train.keep_epochs", beyond[0], f"epochs up to train.epochs={self.train.epochs}")
        if self.train.ema is not None and self.train.epochs == 0:
            raise ConfigError("train.ema", self.train.ema, "null with train.epochs=0", "there are no steps to average")
        if self.optimizer.layer_decay is not None and self.model.freeze == "backbone":
            problem = "the head alone is trained (model.freeze=backbone)"
            raise ConfigError("optimizer.layer_decay", self.optimizer.layer_decay, "null", problem)
        if self.train.select == "ema" and self.train.ema is None:
            raise ConfigError("train.select", "ema", "train.ema with it, such as train.ema=0.999")
        if self.teacher_learns:
            self._check_second_student()
        if self.needs_teacher and not isinstance(self.teacher, NetworkSettings):
            self.teacher.check()
        return self

    def _check_second_student(self) -> None:
        if not isinstance(self.teacher, NetworkSettings):
            raise ConfigError("model@teacher", self.teacher.name, "one network, as the second student")
        if self.teacher.freeze != "none":
            raise ConfigError("teacher.freeze", self.teacher.freeze, "none", "a second student learns")
        if self.train.select == "best":
            raise ConfigError("train.select", "best", "last", "two students are best at different epochs")
        if self.train.ema is not None:
            raise ConfigError("train.ema", self.train.ema, "null", "the weights of a second student are not averaged")

    def check_weights(self) -> None:
        """Raise ConfigError for weights that are no run and no existing file. Of a finished run they may be gone."""
        _check_weights("model.weights", self.model.weights, [None, "imagenet"])
        if self.needs_teacher and isinstance(self.teacher, NetworkSettings):
            # A second student learns, too: from random weights, unless others are named.
            choices = ["auto", None, "imagenet"] if self.teacher_learns else ["auto"]
            _check_weights("teacher.weights", self.teacher.weights, choices)

    @property
    def losses(self) -> list[MethodSettings]:
        """The loss, and the second one that is added to it."""
        return [self.loss, *([self.also] if self.also else [])]

    @property
    def needs_teacher(self) -> bool:
        return any(loss.uses_teacher for loss in self.losses)

    @property
    def teacher_learns(self) -> bool:
        """Whether a second student stands in the teacher's place."""
        return loss_class(self.loss.target).teacher_learns

    @property
    def run_stage(self) -> str:
        """teacher, student or distill: what the run is, as its tag has it."""
        return "distill" if self.needs_teacher else self.stage

    @property
    def softening(self) -> float | None:
        """The temperature that softens the teacher's answers; None where there is none, or logits are standardised."""
        temperature: float | None = identity.temperature_of(identity.flatten(self.plain))
        return temperature

    @cached_property
    def effective(self) -> dict[str, Any]:
        """The flat settings, without those that have no effect on the run."""
        return identity.effective(self.plain, self.needs_teacher)

    @property
    def params(self) -> dict[str, Any]:
        """The flat settings as MLflow's params, without where the run is logged and which sweep it belongs to."""
        own = ("tracking.", "sweep.", "search.", "chain")
        return {key: value for key, value in self.effective.items() if not key.startswith(own)}

    @cached_property
    def identity(self) -> str:
        """12 hex digits that stand for all that the result depends on; they name the run's folder."""
        return identity.identity(self.effective)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / "runs" / self.identity

    @property
    def run_name(self) -> str:
        """A name for people: student_cnn_alone_s0, resnet20_teacher_s0, student_cnn_distill_a0.5_T5_s0; with another
        method than kd student_cnn_dkd_T4_s0, with two of them student_cnn_kd_a0.5_T5_attention_s0; in a sweep what the
        run differs in, a0.5_T5_s0."""
        if self.sweep.job:
            return self.sweep.job.name
        methods = [loss for loss in self.losses if loss.method]
        parts = []
        for loss in methods:
            arguments = loss.arguments
            parts.append("distill" if loss.method == "kd" and len(methods) == 1 else loss.method)
            if loss.blends:
                parts.append(f"a{arguments['alpha']:g}")
            if "temperature" in arguments:
                parts.append(f"T{arguments['temperature']:g}")
            if arguments.get("standardize"):
                parts.append("standardized")
        if self.run_stage == "teacher":
            parts.insert(0, "teacher")
        return "_".join([self.model.name, *(parts or ["alone"]), f"s{self.seed}"])


def validated(model: type[Model], values: Mapping[str, Any], prefix: str = "") -> Model:
    """Settings from plain values.

    Raises:
        ConfigError: a value that cannot be used.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise model_error(error, model, prefix) from None


def _check_weights(key: str, weights: str | None, choices: Sequence[str | None]) -> None:
    """Raise ConfigError for weights that are none of the choices, no run and no existing file."""
    if weights in choices or names_weights(weights):
        return
    if str(weights).startswith("runs:/"):
        raise ConfigError(key, weights, "runs:/<run id> or runs:/<run id>/epoch_<number>")
    if weights is None or not file_and_part(weights)[0].is_file():
        problem = "" if weights in (None, "imagenet", "auto") else "file not found"
        raise ConfigError(key, weights, f"{', '.join(map(as_typed, choices))}, a file or runs:/<run id>", problem)
