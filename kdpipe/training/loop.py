"""The one training loop: a teacher, a student alone and a distilled student differ in what is passed to it."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import Views
from kdpipe.data.balancing import balanced_draw
from kdpipe.data.feeding import feed
from kdpipe.data.mixing import Mixing
from kdpipe.evaluation.inference import evaluate
from kdpipe.models.weights import State
from kdpipe.settings.metric_names import LAST_EPOCH, METRICS, OF_AVERAGE, Metric, Select, ending
from kdpipe.system.interruption import postponed
from kdpipe.system.progress import progress
from kdpipe.system.randomness import generator, seed_all
from kdpipe.training.checkpoint import copy_state
from kdpipe.training.state import Training
from kdpipe.training.teacher import Teacher

log = logging.getLogger("kdpipe")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        teacher: gives the soft targets, on the views that the student sees; None where the loss needs none.
        views: what each epoch sees; None for the images as they are stored.
        mixing: mixes the images of each batch, and their labels.
        balanced: each epoch draws its images with replacement, so that all classes are equally likely.
        select: the weights that the training ends with: the last ones, those with the best validation metric (the first
            of equals), or the average that the training keeps.
        metric: the one that counts.
        early_stop: end when the metric has not risen for so many epochs; None for never. It is that of the averaged
            weights where these are selected, else that of the trained ones.
        test_each_epoch: evaluate on the test images after each epoch but the last, which the caller does.
        clip_norm: gradients are scaled down to this norm where theirs is larger; None for never.
        accumulate: the gradients of so many batches make a step; of fewer at the end of an epoch.
    """

    epochs: int
    batch_size: int
    seed: int
    teacher: Teacher | None = None
    views: Views | None = None
    mixing: Mixing | None = None
    balanced: bool = False
    select: Select = "last"
    metric: Metric = "accuracy"
    early_stop: int | None = None
    test_each_epoch: bool = False
    clip_norm: float | None = None
    accumulate: int = 1


@dataclass(frozen=True)
class Hooks:
    """What is called on the way.

    Attributes:
        on_epoch: after each epoch, with its number and its metrics.
        on_step: after each step.
        on_checkpoint: after each epoch, when all that it changes has changed: the time to save `training.state()`.
    """

    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None
    on_step: Callable[[], None] = lambda: None
    on_checkpoint: Callable[[], None] = lambda: None


def fit(training: Training, data: ImageDataset, recipe: Recipe, hooks: Hooks) -> dict[str, float]:
    """Train on the training images, from where `training` is.

    Returns:
        `selected/epoch`, the epoch that the weights are from, and where there are validation images
        `selected/accuracy` and the other `METRICS`, theirs on them, and what the weights that are not selected give:
        `test/accuracy_last`, … with the last ones, `test/accuracy_best`, … with the best by validation,
        `test/accuracy_ema`, … with the averaged ones. With `early_stop` also the last epoch.

    Raises:
        ValueError: a loss or a weight became NaN or infinite.
        Interrupted: between two steps or in an evaluation, so that `training.state()` can be saved.
    """
    hardware, has_validation = training.hardware, "validation" in data.splits
    if training.is_new:
        seed_all(recipe.seed, f"dropout/{hardware.rank}" if hardware.rank else "dropout")
    if has_validation and recipe.epochs == 0:
        measured = evaluate(training.model, data, "validation", hardware)
        training.selected |= {f"selected/{name}": measured[name] for name in METRICS}
    while training.epoch <= recipe.epochs and not is_stalled(training.reached, recipe.early_stop):
        metrics = train_epoch(training, data, recipe, hooks)
        if has_validation:
            metrics |= measure(training, data, "validation", "val")
        if recipe.test_each_epoch and training.epoch < recipe.epochs:
            metrics |= measure(training, data, "test", "test")
        training.check_finite(*(value for name, value in metrics.items() if name.endswith("/loss")))
        with postponed():
            hooks.on_epoch(training.epoch, metrics)
            select(training, metrics, recipe)
            training.begin_epoch(training.epoch + 1)
            hooks.on_checkpoint()
    if training.epoch <= recipe.epochs:
        whose = " of the averaged weights" if recipe.select == "ema" else ""
        what = f"validation {METRICS[recipe.metric]}{whose}"
        reason = f"{what} has not risen for train.early_stop={recipe.early_stop} epochs"
        log.info("stopped after epoch %d of %d: %s", training.epoch - 1, recipe.epochs, reason)
    measure_other_weights(training, data, recipe.select)
    if recipe.select == "best" and training.best:
        training.learner.load_state_dict(training.best)
    elif recipe.select == "ema" and training.averaged_weights:
        training.learner.load_state_dict(training.averaged_weights)
    return training.selected | ({} if recipe.early_stop is None else {LAST_EPOCH: training.epoch - 1})


def is_stalled(reached: Sequence[float], patience: int | None) -> bool:
    """Whether none of the last `patience` values is above all before them; never for None."""
    return patience is not None and len(reached) > patience and max(reached[-patience:]) <= max(reached[:-patience])


def measure(training: Training, data: ImageDataset, split: str, prefix: str) -> dict[str, float]:
    """`evaluate` as `val/accuracy`, …, and as `val/accuracy_ema`, … with the averaged weights, if any."""
    measured = with_prefix(prefix, evaluate(training.model, data, split, training.hardware))
    if weights := training.averaged_weights:
        averaged = evaluate_with(weights, training, data, split)
        measured |= {f"{name}{OF_AVERAGE}": value for name, value in with_prefix(prefix, averaged).items()}
    return measured


def select(training: Training, metrics: dict[str, float], recipe: Recipe) -> None:
    """Select the weights of the epoch: always, or only if they are the best so far, which are kept in any case."""
    end = ending(recipe.select)
    if (decides := metrics.get(f"val/{recipe.metric}{end}")) is not None:
        training.reached.append(decides)
    reached = metrics.get(f"val/{recipe.metric}", -1.0)
    is_best = reached > training.highest
    if is_best:
        training.highest, training.best = reached, copy_state(training.learner)
    if recipe.select == "best" and not is_best:
        return
    known = {name: metrics[f"val/{name}{end}"] for name in METRICS if f"val/{name}{end}" in metrics}
    training.selected = {"selected/epoch": training.epoch, **with_prefix("selected", known)}


def measure_other_weights(training: Training, data: ImageDataset, selected: Select) -> None:
    """Test the weights that are not selected, except those that an earlier process has tested, which was interrupted
    later; the last ones are in place afterwards."""
    others: dict[Select, State] = {}
    if training.best:
        others["best"] = training.best
    if weights := training.averaged_weights:
        others["ema"] = weights
    if others:
        others["last"] = dict(training.learner.state_dict())
    for name, weights in others.items():
        if name != selected and f"test/accuracy_{name}" not in training.selected:
            measured = evaluate_with(weights, training, data, "test")
            training.selected |= {f"test/{metric}_{name}": measured[metric] for metric in METRICS}


def evaluate_with(weights: State, training: Training, data: ImageDataset, split: str) -> dict[str, float]:
    """`evaluate` with other weights than the trained ones, which are in place again afterwards."""
    trained = copy_state(training.learner)
    try:
        training.learner.load_state_dict(weights)
        return evaluate(training.model, data, split, training.hardware)
    finally:
        training.learner.load_state_dict(trained)


def epoch_order(data: ImageDataset, seed: int, epoch: int, balanced: bool) -> Tensor:
    """The positions of the training images in the order in which an epoch sees them, int64 [n], on the device where the
    images are, if they fit; `balanced` as in `Recipe`."""
    positions = data.splits["train"]
    if balanced:
        positions = balanced_draw(positions, data.labels[positions], generator(seed, f"sampler/{epoch}"))
    shuffled = torch.randperm(len(positions), generator=generator(seed, f"order/{epoch}"))
    return positions[shuffled.to(positions.device)]


def train_epoch(training: Training, data: ImageDataset, recipe: Recipe, hooks: Hooks) -> dict[str, float]:
    """The rest of a pass over the training images; the parts of the loss and the accuracy, averaged over the images as
    they were seen."""
    hardware, epoch = training.hardware, training.epoch
    training.model.train()
    training.loss.train()
    started = time.perf_counter() - training.seconds
    order = epoch_order(data, recipe.seed, epoch, recipe.balanced)
    draws = recipe.views.draws(epoch).to(order.device) if recipe.views else None
    with progress(f"epoch {epoch}/{recipe.epochs}", len(order)) as bar:
        bar.advance(training.seen * hardware.processes)
        left = batches(order, recipe.batch_size, hardware.processes)[training.steps :]
        fed = feed(map(hardware.shard, left), data.images, data.labels, hardware.device)
        for first in range(0, len(left), recipe.accumulate):
            group = left[first : first + recipe.accumulate]
            images_of_step = sum(map(len, group))
            with postponed():
                training.optimizer.zero_grad()
                for batch, images, labels in islice(fed, len(group)):
                    if recipe.views and draws is not None:
                        images = recipe.views.augment(images, draws[batch].to(hardware.device, non_blocking=True))
                    # Gradients are averaged over processes, whose shares of a batch may differ by an image.
                    share = len(batch) * hardware.processes / images_of_step
                    add_gradients(training, recipe, batch, images, labels, share)
                training.take_step(recipe.clip_norm)
                training.seconds = time.perf_counter() - started
                hooks.on_step()

            bar.advance(images_of_step)
            if bar.wants_note():
                mean = {name: total.item() / training.seen for name, total in training.totals.items()}
                bar.note(f"loss {mean['loss']:.4f}  accuracy {mean['accuracy']:.1%}")
    metrics = {f"train/{name}": hardware.sum(total).item() / len(order) for name, total in training.totals.items()}
    metrics["train/accuracy"] *= len(order) / int((data.labels[order] >= 0).sum())
    return metrics | {
        "train/learning_rate": training.learning_rate,
        "train/images_per_second": len(order) / (time.perf_counter() - started),
    }


def add_gradients(
    training: Training, recipe: Recipe, batch: Tensor, images: Tensor, labels: Tensor, share: float
) -> None:
    """Add a batch's gradients to those of its step, and its parts of the loss to those of its epoch.

    Args:
        batch: positions of its images in the data set, int64 [N].
        images: uint8 [N, C, H, W], augmented.
        labels: int64 [N], −1 for unlabelled images.
        share: of the batch in the step.
    """
    epoch = training.epoch
    if recipe.mixing:
        images, labels = recipe.mixing(images, labels, epoch, training.steps)
    with training.hardware.autocast():
        targets = recipe.teacher(images, batch, epoch) if recipe.teacher else None
        outputs = training.student(images)
    parts = training.loss(outputs, targets, labels, batch, epoch)
    training.scaler.scale(parts["loss"] * share).backward()
    sums = {name: value.detach() * len(batch) for name, value in parts.items()}
    training.add(sums | {"accuracy": correct_answers(outputs.logits, labels)}, len(batch))


def correct_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of images whose answer is their label, int64 [N], or the class with the largest share in them, float
    [N, classes]; images without a label, −1, are not counted."""
    expected = labels.argmax(dim=1) if labels.is_floating_point() else labels
    return (logits.argmax(dim=1) == expected).sum()


def with_prefix(prefix: str, measured: dict[str, float]) -> dict[str, float]:
    """{"accuracy": 0.5} as {"test/accuracy": 0.5}."""
    return {f"{prefix}/{name}": value for name, value in measured.items()}


def batches(order: Tensor, batch_size: int, processes: int = 1) -> list[Tensor]:
    """`order` in pieces of `batch_size`; a last piece that is too small for the processes, or of one image, joins the
    one before: BatchNorm needs two."""
    pieces = list(order.split(batch_size))
    if len(pieces) > 1 and len(pieces[-1]) < max(2, processes) <= batch_size:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces
