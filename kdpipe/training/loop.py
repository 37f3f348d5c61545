"""The one training loop: a teacher, a student alone and a distilled student differ in what is passed to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import Views
from kdpipe.data.balancing import balanced_draw
from kdpipe.data.feeding import feed
from kdpipe.data.mixing import Mixing
from kdpipe.evaluation.inference import evaluate
from kdpipe.settings.metric_names import METRICS, Metric
from kdpipe.system.interruption import postponed
from kdpipe.system.progress import progress
from kdpipe.system.randomness import generator, seed_all
from kdpipe.training.checkpoint import copy_state
from kdpipe.training.state import Training
from kdpipe.training.teacher import Teacher


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        teacher: gives the soft targets, on the views that the student sees; None where the loss needs none.
        views: what each epoch sees; None for the images as they are stored.
        mixing: mixes the images of each batch, and their labels.
        balanced: each epoch draws its images with replacement, so that all classes are equally likely.
        select_best: keep the weights with the best validation metric (the first of equals) instead of the last ones.
        metric: the one that counts.
        test_each_epoch: evaluate on the test images after each epoch but the last, which the caller does.
        clip_norm: gradients are scaled down to this norm where theirs is larger; None for never.
    """

    epochs: int
    batch_size: int
    seed: int
    teacher: Teacher | None = None
    views: Views | None = None
    mixing: Mixing | None = None
    balanced: bool = False
    select_best: bool = False
    metric: Metric = "accuracy"
    test_each_epoch: bool = False
    clip_norm: float | None = None


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
        `selected/accuracy` and the other `METRICS`, theirs on them, and what the other choice would have given:
        `test/accuracy_best`, … with the best weights by validation where the last are selected, else
        `test/accuracy_last`, ….

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
    while training.epoch <= recipe.epochs:
        metrics = train_epoch(training, data, recipe, hooks)
        if has_validation:
            metrics |= with_prefix("val", evaluate(training.model, data, "validation", hardware))
        if recipe.test_each_epoch and training.epoch < recipe.epochs:
            metrics |= with_prefix("test", evaluate(training.model, data, "test", hardware))
        training.check_finite(*(value for name, value in metrics.items() if name.endswith("/loss")))
        with postponed():
            hooks.on_epoch(training.epoch, metrics)
            select(training, metrics, recipe)
            training.begin_epoch(training.epoch + 1)
            hooks.on_checkpoint()
    if training.best:
        other = "last" if recipe.select_best else "best"
        if f"test/accuracy_{other}" not in training.selected:  # by an earlier process, which was interrupted later
            measured = evaluate_other_weights(training, data, recipe.select_best)
            training.selected |= {f"test/{name}_{other}": measured[name] for name in METRICS}
        if recipe.select_best:
            training.learner.load_state_dict(training.best)
    return training.selected


def select(training: Training, metrics: dict[str, float], recipe: Recipe) -> None:
    """Select the weights of the epoch: always, or only if they are the best so far, which are kept in any case."""
    reached = metrics.get(f"val/{recipe.metric}", -1.0)
    is_best = reached > training.highest
    if is_best:
        training.highest, training.best = reached, copy_state(training.learner)
    if recipe.select_best and not is_best:
        return
    known = {f"selected/{name}": metrics[f"val/{name}"] for name in METRICS if f"val/{name}" in metrics}
    training.selected = {"selected/epoch": training.epoch, **known}


def evaluate_other_weights(training: Training, data: ImageDataset, best_are_selected: bool) -> dict[str, float]:
    """`evaluate` on the test images with the weights that are not selected; the last ones are in place afterwards."""
    last = copy_state(training.learner)
    try:
        if not best_are_selected:
            training.learner.load_state_dict(training.best)
        return evaluate(training.model, data, "test", training.hardware)
    finally:
        training.learner.load_state_dict(last)


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
    model, loss, hardware, epoch = training.model, training.loss, training.hardware, training.epoch
    model.train()
    loss.train()
    started = time.perf_counter() - training.seconds
    order = epoch_order(data, recipe.seed, epoch, recipe.balanced)
    draws = recipe.views.draws(epoch).to(order.device) if recipe.views else None
    learned = [weight for part in (model, loss) for weight in part.parameters() if weight.requires_grad]
    with progress(f"epoch {epoch}/{recipe.epochs}", len(order)) as bar:
        bar.advance(training.seen * hardware.processes)
        whole_batches = batches(order, recipe.batch_size, hardware.processes)[training.steps :]
        fed = feed(map(hardware.shard, whole_batches), data.images, data.labels, hardware.device)
        for whole_batch, (batch, images, labels) in zip(whole_batches, fed, strict=True):
            with postponed():
                if recipe.views and draws is not None:
                    images = recipe.views.augment(images, draws[batch].to(hardware.device, non_blocking=True))
                if recipe.mixing:
                    images, labels = recipe.mixing(images, labels, epoch, training.steps)
                with hardware.autocast():
                    targets = recipe.teacher(images, batch, epoch) if recipe.teacher else None
                    outputs = training.student(images)
                parts = loss(outputs, targets, labels, batch, epoch)
                training.optimizer.zero_grad()
                # Gradients are averaged over processes, whose shares of a batch may differ by an image.
                (parts["loss"] * (len(batch) * hardware.processes / len(whole_batch))).backward()
                if recipe.clip_norm is not None:
                    nn.utils.clip_grad_norm_(learned, recipe.clip_norm)
                training.optimizer.step()
                training.scheduler.step()
                sums = {name: value.detach() * len(batch) for name, value in parts.items()}
                training.add(sums | {"accuracy": correct_answers(outputs.logits, labels)}, len(batch))
                training.seconds = time.perf_counter() - started
                hooks.on_step()

            bar.advance(len(whole_batch))
            if bar.wants_note():
                mean = {name: total.item() / training.seen for name, total in training.totals.items()}
                bar.note(f"loss {mean['loss']:.4f}  accuracy {mean['accuracy']:.1%}")
    metrics = {f"train/{name}": hardware.sum(total).item() / len(order) for name, total in training.totals.items()}
    metrics["train/accuracy"] *= len(order) / int((data.labels[order] >= 0).sum())
    return metrics | {
        "train/learning_rate": training.learning_rate,
        "train/images_per_second": len(order) / (time.perf_counter() - started),
    }


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
