"""The one training loop: teacher, student alone and distilled student differ in what is passed to it."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import Views
from kdpipe.data.mixing import Mixing
from kdpipe.evaluation.inference import evaluate
from kdpipe.system.hardware import Hardware
from kdpipe.system.interruption import postponed
from kdpipe.system.progress import progress
from kdpipe.system.randomness import generator, random_state, seed_all, set_random_state
from kdpipe.training.checkpoint import State, copy_state
from kdpipe.training.observed import Observed
from kdpipe.training.teacher import Peer, Teacher


class Training:
    """A network as it learns, and how far it is: all that a step changes, and so all that a checkpoint holds.

    Args:
        student: what is called with images; under `torchrun` its model is the one that shares its gradients.
        learner: the network in it, whose weights are kept; the model itself where it is None.

    Attributes:
        epoch: the one in progress, counted from 1.
        steps: those of it that are done.
        seen: images that this process has looked at in them.
        totals: the loss's parts and the correct answers, summed over these images.
        seconds: that earlier processes spent on them.
        learning_rate: at the epoch's start.
        selected: the epoch of the weights that are to be kept, and its accuracy on the validation images.
        best: those weights, where they are not the last ones.
    """

    def __init__(
        self,
        student: Observed,
        loss: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        hardware: Hardware,
        learner: nn.Module | None = None,
    ) -> None:
        self.student, self.model, self.loss = student, student.model, loss
        self.learner = learner or student.model
        self.optimizer, self.scheduler, self.hardware = optimizer, scheduler, hardware
        self.selected: dict[str, float] = {"selected/epoch": 0}
        self.best: State = {}
        self.begin_epoch(1)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.steps = self.seen = 0
        self.totals: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])

    @property
    def is_new(self) -> bool:
        return self.epoch == 1 and self.steps == 0

    def add(self, parts: dict[str, Tensor], images: int) -> None:
        """Count a step on so many images; `parts` are summed over them."""
        for name, value in parts.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.steps += 1
        self.seen += images

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here, in tensors and plain values; every process is to call it.

        Raises:
            ValueError: the training has diverged: there is nothing to go on with.
        """
        self.check_finite(self.totals.get("loss", 0.0))
        return {
            "learner": dict(self.learner.state_dict()),
            "loss": dict(self.loss.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self.hardware.gather(random_state(self.hardware.device)),
            "epoch": self.epoch,
            "steps": self.steps,
            "seen": self.seen,
            "totals": dict(self.totals),
            "seconds": self.seconds,
            "learning_rate": self.learning_rate,
            "selected": dict(self.selected),
            "best": dict(self.best),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be where `state` was taken."""
        self.learner.load_state_dict(state["learner"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for name in ("epoch", "steps", "seen", "seconds", "learning_rate", "selected", "best"):
            setattr(self, name, state[name])
        # Of one process, within an epoch: others would count them again.
        share = 1 if self.hardware.rank == 0 else 0
        self.totals = {name: share * total.to(self.hardware.device) for name, total in state["totals"].items()}
        if len(state["random"]) == self.hardware.processes:
            set_random_state(state["random"][self.hardware.rank], self.hardware.device)

    def check_finite(self, *losses: Tensor | float) -> None:
        """Raise ValueError where one of these losses, or a weight, is NaN or infinite."""
        loss = next((float(loss) for loss in losses if not math.isfinite(loss)), None)
        weights = [*self.learner.state_dict().values(), *self.loss.state_dict().values()]
        if loss is None and all(bool(weight.isfinite().all()) for weight in weights if weight.is_floating_point()):
            return
        what = f"the loss is {loss}" if loss is not None else "weights are no finite numbers"
        raise ValueError(
            f"epoch {self.epoch}: {what}, the training has diverged; "
            f"a lower optimizer.lr than {self.learning_rate:g} may help, or train.clip_norm=1"
        )


def fit(
    training: Training,
    data: ImageDataset,
    *,
    teacher: Teacher | Peer | None,
    views: Views | None,
    mixing: Mixing | None = None,
    epochs: int,
    batch_size: int,
    seed: int,
    select_best: bool,
    test_each_epoch: bool,
    on_epoch: Callable[[int, dict[str, float]], None],
    clip_norm: float | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_checkpoint: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train on the training images, from where `training` is, and call `on_epoch(epoch, metrics)` after each epoch.

    Args:
        teacher: gives the soft targets, on the views that the model sees; None where the loss needs none.
        views: what each epoch sees; None for the images as they are stored.
        mixing: mixes the images of each batch, and their labels.
        select_best: leave the model with the weights of the best validation accuracy (the first of equals) instead of
            the last ones.
        test_each_epoch: measure on the test images after each epoch but the last, which is tested by the caller.
        clip_norm: gradients are scaled down to this norm where theirs is larger; None for as they are.
        on_step: called after each step.
        on_checkpoint: called after each epoch, when all that it changes is changed: the time to keep
            `training.state()`.

    Returns:
        `selected/epoch`, the epoch that the weights are from, and `selected/accuracy`, theirs on the validation
        images, where there are any.

    Raises:
        ValueError: a loss or a weight became NaN or infinite.
        Interrupted: between two steps or in an evaluation, so that `training.state()` can be kept.
    """
    hardware, has_validation = training.hardware, "validation" in data.splits
    if training.is_new:
        seed_all(seed, f"dropout/{hardware.rank}" if hardware.rank else "dropout")
    if has_validation and epochs == 0:
        training.selected["selected/accuracy"] = evaluate(training.model, data, "validation", hardware)["accuracy"]
    while training.epoch <= epochs:
        metrics = train_epoch(
            training,
            data,
            teacher=teacher,
            views=views,
            mixing=mixing,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            clip_norm=clip_norm,
            on_step=on_step,
        )
        if has_validation:
            metrics |= named("val", evaluate(training.model, data, "validation", hardware))
        if test_each_epoch and training.epoch < epochs:
            metrics |= named("test", evaluate(training.model, data, "test", hardware))
        training.check_finite(*(value for name, value in metrics.items() if name.endswith("/loss")))
        with postponed():
            on_epoch(training.epoch, metrics)
            select(training, metrics, select_best)
            training.begin_epoch(training.epoch + 1)
            on_checkpoint()
    if training.best:
        training.learner.load_state_dict(training.best)
    return training.selected


def select(training: Training, metrics: dict[str, float], best: bool) -> None:
    """Take the epoch's weights for those that are to be kept: always, or if they are the `best` so far."""
    if best and metrics["val/accuracy"] <= training.selected.get("selected/accuracy", -1):
        return
    training.selected = {"selected/epoch": training.epoch}
    if "val/accuracy" in metrics:
        training.selected["selected/accuracy"] = metrics["val/accuracy"]
    if best:
        training.best = copy_state(training.learner)


def train_epoch(
    training: Training,
    data: ImageDataset,
    *,
    teacher: Teacher | Peer | None,
    views: Views | None,
    mixing: Mixing | None = None,
    epochs: int,
    batch_size: int,
    seed: int,
    clip_norm: float | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The rest of a pass over the training images; the loss's parts and the accuracy, averaged over them as they were
    seen."""
    model, loss, hardware, epoch = training.model, training.loss, training.hardware, training.epoch
    model.train()
    loss.train()
    started = time.perf_counter() - training.seconds
    positions = data.splits["train"]  # on the device where the images are, if they fit
    shuffled = torch.randperm(len(positions), generator=generator(seed, f"order/{epoch}"))
    order = positions[shuffled.to(positions.device)]
    draws = views.draws(epoch).to(positions.device) if views else None
    learned = [weight for part in (model, loss) for weight in part.parameters() if weight.requires_grad]
    with progress(f"epoch {epoch}/{epochs}", len(order)) as bar:
        bar.advance(training.seen * hardware.processes)
        for whole_batch in batches(order, batch_size, hardware.processes)[training.steps :]:
            with postponed():
                batch = hardware.shard(whole_batch)
                images = data.images[batch].to(hardware.device, non_blocking=True)
                labels = data.labels[batch].to(hardware.device, non_blocking=True)
                if views and draws is not None:
                    images = views.augment(images, draws[batch].to(hardware.device, non_blocking=True))
                if mixing:
                    images, labels = mixing(images, labels, epoch, training.steps)
                with hardware.autocast():
                    targets = teacher(images, batch, epoch) if teacher else None
                    outputs = training.student(images)
                parts = loss(outputs, targets, labels, batch, epoch)
                training.optimizer.zero_grad()
                # Gradients are averaged over processes, whose shares of a batch may differ by an image.
                (parts["loss"] * (len(batch) * hardware.processes / len(whole_batch))).backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(learned, clip_norm)
                training.optimizer.step()
                training.scheduler.step()
                sums = {name: value.detach() * len(batch) for name, value in parts.items()}
                training.add(sums | {"accuracy": correct_answers(outputs.logits, labels)}, len(batch))
                training.seconds = time.perf_counter() - started
                on_step()

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
    """How many images are taken for their label, int64 [N], or for the class with the largest share in them, float
    [N, classes]; one without a label, −1, is not counted."""
    expected = labels.argmax(dim=1) if labels.is_floating_point() else labels
    return (logits.argmax(dim=1) == expected).sum()


def named(prefix: str, measured: dict[str, float]) -> dict[str, float]:
    """{"accuracy": 0.5} as {"test/accuracy": 0.5}."""
    return {f"{prefix}/{name}": value for name, value in measured.items()}


def batches(order: Tensor, batch_size: int, processes: int = 1) -> list[Tensor]:
    """`order` in pieces of `batch_size`; a last piece that is too small for the processes, or of one image, joins the
    one before: BatchNorm needs two."""
    pieces = list(order.split(batch_size))
    if len(pieces) > 1 and len(pieces[-1]) < max(2, processes) <= batch_size:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces
