"""Learning-rate schedules, all PyTorch's own, advanced once per step so that they are smooth within an epoch."""

from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, Positive, PositiveInt, checked


@checked
def constant(optimizer: Optimizer, epochs: int, steps_per_epoch: int, warmup_epochs: NonNegative = 0) -> LRScheduler:
    """Linear warm-up over `warmup_epochs`, then the optimizer's learning rate throughout.

    Raises:
        ConfigError: a negative warm-up, or one longer than the training.
    """
    return _warmed_up(optimizer, epochs, steps_per_epoch, warmup_epochs, lambda start: _unchanged(optimizer))


@checked
def cosine(optimizer: Optimizer, epochs: int, steps_per_epoch: int, warmup_epochs: NonNegative) -> LRScheduler:
    """Linear warm-up over `warmup_epochs`, then half a cosine to 0 at the last step (Loshchilov & Hutter 2017).

    Raises:
        ConfigError: a negative warm-up, or one longer than the training.
    """
    if epochs == 0:
        return _unchanged(optimizer)
    steps = epochs * steps_per_epoch

    def descent(start: int) -> LRScheduler:
        return CosineAnnealingLR(optimizer, T_max=steps - start)

    return _warmed_up(optimizer, epochs, steps_per_epoch, warmup_epochs, descent)


@checked
def multistep(
    optimizer: Optimizer,
    epochs: int,
    steps_per_epoch: int,
    milestones: Sequence[PositiveInt],
    gamma: Positive,
    warmup_epochs: NonNegative = 0,
) -> LRScheduler:
    """Linear warm-up over `warmup_epochs`; the learning rate is multiplied by `gamma` after each epoch in `milestones`.

    Raises:
        ConfigError: a milestone before the end of the warm-up, a negative warm-up, or one longer than the training.
    """
    if early := [epoch for epoch in milestones if epoch < warmup_epochs]:
        raise ConfigError("milestones", early[0], f"epochs after warmup_epochs={warmup_epochs:g}")

    def stairs(start: int) -> LRScheduler:
        return MultiStepLR(optimizer, [epoch * steps_per_epoch - start for epoch in milestones], gamma=gamma)

    return _warmed_up(optimizer, epochs, steps_per_epoch, warmup_epochs, stairs)


@checked
def onecycle(
    optimizer: Optimizer,
    epochs: int,
    steps_per_epoch: int,
    pct_start: Annotated[float, Field(gt=0, lt=1)],
    div_factor: Positive,
    final_div_factor: Positive,
    cycle_momentum: bool,
) -> LRScheduler:
    """PyTorch's `OneCycleLR`, under its names: up to the optimizer's learning rate and down again by half cosines, the
    momentum the other way round (Smith & Topin 2018, https://arxiv.org/abs/1708.07120)."""
    if epochs == 0:
        return _unchanged(optimizer)
    steps = epochs * steps_per_epoch
    if pct_start * steps == 1:  # PyTorch would divide by zero: the rise would begin and end at the first step
        pct_start += 1e-9
    return OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=pct_start,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        cycle_momentum=cycle_momentum,
    )


def _unchanged(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1.0)


def _warmed_up(
    optimizer: Optimizer,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float,
    schedule: Callable[[int], LRScheduler],
) -> LRScheduler:
    """A linear rise over `warmup_epochs`, then `schedule(steps of the rise)`.

    Raises:
        ConfigError: a warm-up longer than the training.
    """
    if warmup_epochs > epochs > 0:
        raise ConfigError("warmup_epochs", warmup_epochs, f"a number from 0 to {epochs}")
    steps, warmup_steps = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    if warmup_steps == 0 or epochs == 0:
        return schedule(0)
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    if warmup_steps >= steps:
        return warmup
    return SequentialLR(optimizer, [warmup, schedule(warmup_steps)], milestones=[warmup_steps])
