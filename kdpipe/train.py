"""The one training loop: teacher, student alone and distilled student differ in what is passed to it."""

import math
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdpipe.checkpoint import State, copy_state
from kdpipe.data import ImageDataset
from kdpipe.data.augmentation import Views
from kdpipe.evaluate import evaluate
from kdpipe.hardware import Hardware
from kdpipe.progress import progress
from kdpipe.randomness import derive_seed, generator
from kdpipe.teacher import Teacher


def fit(
    model: nn.Module,
    loss: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    data: ImageDataset,
    *,
    teacher: Teacher | None,
    views: Views | None,
    epochs: int,
    batch_size: int,
    seed: int,
    hardware: Hardware,
    select_best: bool,
    test_each_epoch: bool,
    on_epoch: Callable[[int, dict[str, float]], None],
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train `model` on the training images, and call `on_epoch(epoch, metrics)` after each epoch, counted from 1.

    Args:
        teacher: gives the soft targets, on the views that the model sees; None where the loss needs none.
        views: what each epoch sees; None for the images as they are stored.
        select_best: leave the model with the weights of the best validation accuracy (the first of equals) instead of
            the last ones.
        test_each_epoch: measure on the test images after each epoch but the last, which is tested by the caller.

    Returns:
        `selected/epoch`, the epoch that the weights are from, and `selected/accuracy`, theirs on the validation
        images, where there are any.
    """
    torch.manual_seed(derive_seed(seed, f"dropout/{hardware.rank}" if hardware.rank else "dropout"))
    has_validation = "validation" in data.splits
    selected: dict[str, float] = {"selected/epoch": 0}
    if has_validation and epochs == 0:
        selected["selected/accuracy"] = evaluate(model, data, "validation", hardware)["accuracy"]
    best_state: State = {}
    for epoch in range(1, epochs + 1):
        metrics = train_epoch(
            model,
            loss,
            optimizer,
            scheduler,
            data,
            teacher=teacher,
            views=views,
            epoch=epoch,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            hardware=hardware,
            on_step=on_step,
        )
        if not math.isfinite(metrics["train/loss"]):
            raise ValueError(
                f"epoch {epoch}: the loss is {metrics['train/loss']}, the training has diverged; "
                f"a lower optimizer.lr than {metrics['train/learning_rate']:g} may help"
            )
        if has_validation:
            metrics |= named("val", evaluate(model, data, "validation", hardware))
        if test_each_epoch and epoch < epochs:
            metrics |= named("test", evaluate(model, data, "test", hardware))
        on_epoch(epoch, metrics)
        if not select_best or metrics["val/accuracy"] > selected.get("selected/accuracy", -1):
            selected["selected/epoch"] = epoch
            if has_validation:
                selected["selected/accuracy"] = metrics["val/accuracy"]
            if select_best:
                best_state = copy_state(model)
    if best_state:
        model.load_state_dict(best_state)
    return selected


def train_epoch(
    model: nn.Module,
    loss: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    data: ImageDataset,
    *,
    teacher: Teacher | None,
    views: Views | None,
    epoch: int,
    epochs: int,
    batch_size: int,
    seed: int,
    hardware: Hardware,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """One pass over the training images; the loss's parts and the accuracy, averaged over them as they were seen."""
    model.train()
    started = time.perf_counter()
    positions = data.splits["train"]  # on the device where the images are, if they fit
    shuffled = torch.randperm(len(positions), generator=generator(seed, f"order/{epoch}"))
    order = positions[shuffled.to(positions.device)]
    draws = views.draws(epoch).to(positions.device) if views else None
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=hardware.device))
    learning_rate = optimizer.param_groups[0]["lr"]
    seen = 0
    with progress(f"epoch {epoch}/{epochs}", len(order)) as bar:
        for whole_batch in batches(order, batch_size, hardware.processes):
            batch = hardware.share(whole_batch)
            images = data.images[batch].to(hardware.device, non_blocking=True)
            labels = data.labels[batch].to(hardware.device, non_blocking=True)
            if views and draws is not None:
                images = views.augment(images, draws[batch].to(hardware.device, non_blocking=True))
            with hardware.autocast():
                targets = teacher(images, batch, epoch).float() if teacher else None
                logits = model(images).float()
            parts = loss(logits, targets, labels, batch, epoch)
            optimizer.zero_grad()
            # Gradients are averaged over processes, whose shares of a batch may differ by an image.
            (parts["loss"] * (len(batch) * hardware.processes / len(whole_batch))).backward()
            optimizer.step()
            scheduler.step()
            on_step()

            for name, value in parts.items():
                totals[name] += value.detach() * len(batch)
            totals["accuracy"] += (logits.argmax(dim=1) == labels).sum()
            seen += len(batch)
            bar.advance(len(whole_batch))
            if bar.wants_note():
                mean = {name: total.item() / seen for name, total in totals.items()}
                bar.note(f"loss {mean['loss']:.4f}  accuracy {mean['accuracy']:.1%}")
    metrics = {f"train/{name}": hardware.sum(total).item() / len(order) for name, total in totals.items()}
    return metrics | {
        "train/learning_rate": learning_rate,
        "train/images_per_second": len(order) / (time.perf_counter() - started),
    }


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
