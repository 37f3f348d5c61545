"""kdpipe in Python: distil any `nn.Module`s, with the loop, the exam and the statistics of the command."""

import argparse
import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdpipe.compare.statistics import Interval, interval, verdict
from kdpipe.data import ImageDataset
from kdpipe.data.examples import Examples, Given, examples
from kdpipe.evaluation.exam import examine
from kdpipe.losses import KD, CrossEntropy, Loss
from kdpipe.models import Classifier
from kdpipe.models.classifier import eval_mode
from kdpipe.runs.command_line import existing_store
from kdpipe.settings.errors import ConfigError
from kdpipe.system.hardware import Hardware, devices, prepare_device
from kdpipe.system.randomness import derive_seed
from kdpipe.training.loop import Hooks, Recipe, batches
from kdpipe.training.loop import fit as train
from kdpipe.training.observed import Observed
from kdpipe.training.schedules import constant
from kdpipe.training.state import Training
from kdpipe.training.teacher import FrozenTeacher

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("kdpipe")

Student = nn.Module | Callable[[], nn.Module]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer, int, int], LRScheduler]
ALONE, TAUGHT = "alone", "distilled"
ADAMW: MakeOptimizer = partial(AdamW, lr=1e-3)


@dataclass(frozen=True)
class Result:
    """What a distillation came to.

    Attributes:
        rows: the metrics of each arm and seed, by the names that they have in MLflow; accuracies are fractions.
        networks: the trained students by arm and seed, in evaluation mode.
        teacher: the teacher's metrics on the test images.
    """

    rows: list[dict[str, Any]]
    networks: dict[tuple[str, int], nn.Module]
    teacher: dict[str, float]

    @property
    def gain(self) -> Interval | None:
        """In test accuracy over the student alone, paired by seed, with its 95 % interval; None without one alone."""
        by_arm = {
            arm: {row["seed"]: row["test/accuracy"] for row in self.rows if row["arm"] == arm}
            for arm in (ALONE, TAUGHT)
        }
        pairs = [by_arm[TAUGHT][seed] - alone for seed, alone in by_arm[ALONE].items() if seed in by_arm[TAUGHT]]
        return interval(pairs)

    @property
    def verdict(self) -> str:
        """Whether distillation helped: one of four sentences, as `python -m kdpipe.compare` ends with."""
        return verdict(self.gain)

    @property
    def frame(self) -> "pd.DataFrame":
        """A row for each seed and arm."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def __str__(self) -> str:
        lines = []
        for arm in dict.fromkeys(row["arm"] for row in self.rows):
            shares = [row["test/accuracy"] for row in self.rows if row["arm"] == arm]
            accuracies = " ".join(f"{100 * share:.2f}" for share in shares)
            lines.append(
                f"student {arm:9}  test accuracy {100 * sum(shares) / len(shares):.2f} %  (seeds: {accuracies})"
            )
        if self.teacher:
            lines.append(f"teacher            test accuracy {100 * self.teacher['accuracy']:.2f} %")
        return "\n".join([*lines, self.verdict])


def distill(
    student: Student,
    teacher: nn.Module,
    train_data: Given,
    validation_data: Given | None,
    test_data: Given,
    *,
    loss: Loss | None = None,
    seeds: int | Sequence[int] = 3,
    alone: bool = True,
    **recipe: Any,
) -> Result:
    """Teach a student on several seeds, and beside it train the same student alone on each.

    Args:
        student: a function that makes it, called for each seed; or a module, which is copied and initialised anew.
        teacher: a trained module; it is frozen.
        train_data, validation_data, test_data: a map-style `Dataset` of (image, label), a `DataLoader` of one, or
            batches (images, labels), which are read into memory once. Images are what both modules take.
        loss: one of `kdpipe.losses` (default: KD with alpha 0.9 and temperature 4).
        seeds: how many, counted from 0, or which.
        alone: whether to train the student alone.
        recipe: more arguments of `fit`, the same for both arms.

    Raises:
        ConfigError: a value that cannot be used, before anything is trained.
    """
    numbers = range(seeds) if isinstance(seeds, int) else seeds
    if not numbers:
        raise ConfigError("seeds", seeds, "at least one")
    loss = loss or KD(alpha=0.9, temperature=4)
    rows: list[dict[str, Any]] = []
    networks: dict[tuple[str, int], nn.Module] = {}
    of_teacher = evaluate(teacher, test_data, **{key: recipe[key] for key in ("device", "precision") if key in recipe})
    for seed in numbers:
        given = (train_data, validation_data, test_data)
        arms: list[tuple[str, nn.Module | None, Loss]] = [(TAUGHT, teacher, loss)]
        if alone:
            arms.insert(0, (ALONE, None, _of_labels(loss)))
        for arm, by, its_loss in arms:
            network, metrics = fit(student, *given, teacher=by, loss=its_loss, seed=seed, **recipe)
            networks[arm, seed] = network
            rows.append({"arm": arm, "seed": seed, **metrics})
            log.info("%s, seed %d: test accuracy %.2f %%", arm, seed, 100 * metrics["test/accuracy"])
    return Result(rows, networks, of_teacher)


def fit(
    student: Student,
    train_data: Given,
    validation_data: Given | None,
    test_data: Given,
    *,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    optimizer: MakeOptimizer = ADAMW,
    scheduler: MakeScheduler = constant,
    stages: Sequence[str] = (),
    embedding: str | None = None,
    teacher_stages: Sequence[str] = (),
    teacher_embedding: str | None = None,
    select: str = "last",
    ema: float | None = None,
    clip_norm: float | None = None,
    device: str = "auto",
    precision: str = "float32",
) -> tuple[nn.Module, dict[str, float]]:
    """Train a student on one seed.

    Args:
        teacher: None for a student alone; else as in `distill`.
        loss: by default KD with a teacher, cross-entropy without one.
        optimizer: a function of parameters, such as `functools.partial(torch.optim.SGD, lr=0.1)`.
        scheduler: a function of an optimizer, the epochs and the steps of each, as in `kdpipe.training.schedules`.
        stages, embedding: names of the student's submodules that losses on features compare: whose outputs are its
            maps, and the layer whose input represents an image; of the teacher's likewise.
        select: "last", "best" (by validation accuracy) or "ema": the weights that are tested and returned.
        ema: decay of an average of the weights.
        device: "auto", "cpu", "cuda:1", …
        precision: "float32", "bfloat16" or "float16".

    Returns:
        The trained module, in evaluation mode, and the metrics: `val/…` of the last epoch, `test/…`.

    Raises:
        ConfigError: a value that cannot be used, before anything is trained.
    """
    _check(epochs, batch_size, select, ema, has_validation=validation_data is not None)
    hardware = _hardware(device, precision)
    splits = {"train": train_data, "validation": validation_data, "test": test_data}
    data = examples({name: given for name, given in splits.items() if given is not None}, seed)
    learner = _Named(_made(student, seed), stages, embedding)
    frozen = None
    if teacher is not None:
        frozen = FrozenTeacher(_Named(copy.deepcopy(teacher), teacher_stages, teacher_embedding))  # type: ignore[arg-type]
    loss = copy.deepcopy(loss or (KD(alpha=0.9, temperature=4) if teacher else CrossEntropy()))
    student_of_loss = _fitted(loss, learner, frozen, data, hardware, seed)
    made = optimizer([weight for part in (learner, loss) for weight in part.parameters() if weight.requires_grad])
    schedule = scheduler(made, epochs, len(batches(data.splits["train"], batch_size)))
    training = Training(student_of_loss, loss, made, schedule, hardware, learner, ema)
    recipe = Recipe(epochs, batch_size, seed, teacher=frozen if loss.uses_teacher else None, clip_norm=clip_norm)
    metrics = _train(training, data, replace(recipe, select=select))  # type: ignore[arg-type]
    return learner.module, metrics | examine(learner, data, hardware).metrics()


def _check(epochs: int, batch_size: int, select: str, ema: float | None, has_validation: bool) -> None:
    """Raise ConfigError for values that cannot be used, or not together."""
    for key, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(key, value, "at least 1")
    if ema is not None and not 0 < ema < 1:
        raise ConfigError("ema", ema, "None or a number above 0 below 1")
    if select not in ("last", "best", "ema"):
        raise ConfigError("select", select, "last, best or ema")
    if select == "best" and not has_validation:
        raise ConfigError("select", select, "last", "the best weights are chosen on validation_data")
    if select == "ema" and ema is None:
        raise ConfigError("select", select, "last, or ema=0.999 as well")


def _train(training: Training, data: ImageDataset, recipe: Recipe) -> dict[str, float]:
    """Train; the metrics of the last epoch, and of the selected weights."""
    last: dict[str, float] = {}

    def on_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        last.clear()
        last.update(metrics)
        if isinstance(data.images, Examples):
            data.images.epoch = epoch + 1

    selected = train(training, data, recipe, Hooks(on_epoch))
    training.learner.eval()
    return last | selected


def evaluate(network: nn.Module, data: Given, *, device: str = "auto", precision: str = "float32") -> dict[str, float]:
    """The exam of a network that takes these images: accuracy, loss, calibration and more, as in MLflow without
    `test/`."""
    hardware = _hardware(device, precision)
    found = examples({"test": data}, seed=0)
    was_training = network.training
    exam = examine(network.to(hardware.device), found, hardware)
    network.train(was_training)
    return {name.removeprefix("test/"): value for name, value in exam.metrics().items() if name.startswith("test/")}


def load(run: str, *, uri: str | None = None, output_dir: str | Path = "outputs") -> Classifier:
    """The trained network of a finished run with its preprocessing: from raw uint8 images [N, C, H, W] to logits, in
    evaluation mode on the CPU.

    Args:
        run: its id in MLflow, or runs:/ID/epoch_10 for the weights that it kept then.
        uri: the MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in `output_dir`).
        output_dir: where the runs were written.

    Raises:
        ValueError: no such store or run, or the run is not finished.
    """
    from kdpipe.assembly.finished_runs import open_run  # imports mlflow
    from kdpipe.tracking import RunStore

    store = existing_store(argparse.Namespace(uri=uri, output_dir=Path(output_dir).expanduser()))
    return open_run(run, RunStore(store)).classifier


class _Named(nn.Module):
    """A module with the names of the submodules that losses compare."""

    def __init__(self, network: nn.Module, stages: Sequence[str], embedding: str | None) -> None:
        super().__init__()
        self.module = network
        known = dict(network.named_modules())
        for key, names in (("stages", stages), ("embedding", [embedding] if embedding else [])):
            if missing := [name for name in names if name not in known]:
                raise ConfigError(key, missing[0], "the name of a submodule of named_modules()")
        own: dict[str, Any] = dict(getattr(network, "roles", {}))
        self.roles = {
            key: [f"module.{name}" for name in value] if isinstance(value, list | tuple) else f"module.{value}"
            for key, value in own.items()
            if key != "layout"
        }
        if stages:
            self.roles |= {"stages": [f"module.{name}" for name in stages]}
            self.roles.pop("preactivations", None)
        if embedding:
            self.roles["embedding"] = f"module.{embedding}"
        elif "embedding" not in self.roles and hasattr(network, "head_name"):
            self.roles["embedding"] = f"module.{network.head_name}"

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits

    @property
    def network(self) -> nn.Module:
        """Itself: where the submodules of its roles are."""
        return self


def _made(student: Student, seed: int) -> nn.Module:
    """A student with the first weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "student"))
        if not isinstance(student, nn.Module):
            return student()
        made = copy.deepcopy(student)
        for name, module in made.named_modules():
            own = list(module.parameters(recurse=False))
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            elif own:
                problem = f"{name or type(module).__name__} has weights and no reset_parameters()"
                raise ConfigError("student", type(student).__name__, "a function that makes the student", problem)
        return made


def _of_labels(loss: Loss) -> Loss:
    """The loss of the student alone, with the same weights of classes and smoothing of labels."""
    first, *_ = loss.components.values()
    alone = CrossEntropy()
    alone.label_smoothing, alone.class_weights = first.label_smoothing, first.class_weights
    return alone


def _fitted(
    loss: Loss, learner: nn.Module, teacher: FrozenTeacher | None, data: ImageDataset, hardware: Hardware, seed: int
) -> Observed:
    """The student as the loss sees it, on the device; the loss has made its projections for both networks, from random
    numbers of its own."""
    learner.to(hardware.device)
    loss.to(hardware.device)
    if not loss.uses_teacher:
        return Observed(learner, learner, (), "student")
    if teacher is None:
        raise ConfigError("teacher", None, f"a network: {type(loss).__name__} learns from one")
    for network, prefix in ((learner, ""), (teacher.classifier, "teacher_")):
        for role in loss.roles:
            key = "embedding" if role == "embedding" else "stages"
            if key not in network.roles:  # type: ignore[operator]
                problem = f"{type(loss).__name__} compares the {role} of both networks"
                expected = "the name of a submodule" if key == "embedding" else "names of submodules, such as [layer1]"
                raise ConfigError(f"{prefix}{key}", None, expected, problem)
    teacher.to(hardware.device)
    student = Observed(learner, learner, loss.roles, "student")
    teacher.observe(loss.roles)
    positions = data.splits["train"]
    images = data.images[positions[:2]].to(hardware.device)
    with eval_mode(learner):
        outputs, targets = student(images), teacher(images, positions[:2], 1)
    if outputs.logits.shape != targets.logits.shape:
        given = f"{[*outputs.logits.shape[1:]]} logits of the student, {[*targets.logits.shape[1:]]} of the teacher"
        raise ConfigError("teacher", problem=given, expected="the same classes")
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "loss"))
        loss.fit_to(outputs, targets, positions, data.labels[positions])
    loss.to(hardware.device)
    return student


def _hardware(device: str, precision: str) -> Hardware:
    if device != "auto" and device not in (known := [*devices(), "cuda"]):
        raise ConfigError("device", device, f"auto or one of {', '.join(known)}")
    if precision not in ("float32", "bfloat16", "float16"):
        raise ConfigError("precision", precision, "float32, bfloat16 or float16")
    chosen = torch.device({"auto": devices()[0], "cuda": "cuda:0"}.get(device, device))
    prepare_device(chosen)
    return Hardware(chosen, precision)
