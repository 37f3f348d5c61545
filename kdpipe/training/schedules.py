"""Learning-rate schedules, all PyTorch's own, advanced once a step so that they are smooth within an epoch."""

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from kdpipe.settings.checks import check_number, check_numbers


def constant(optimizer: Optimizer, epochs: int, steps_per_epoch: int) -> LRScheduler:
    """The optimizer's own learning rate throughout."""
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer: Optimizer, epochs: int, steps_per_epoch: int, warmup_epochs: float) -> LRScheduler:
    """Linear warm-up over `warmup_epochs`, then half a cosine to 0 at the last step (Loshchilov & Hutter 2017)."""
    if epochs == 0:
        return constant(optimizer, epochs, steps_per_epoch)
    check_number("scheduler.warmup_epochs", warmup_epochs, low=0, high=epochs)
    steps = epochs * steps_per_epoch
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if warmup_steps == 0:
        return CosineAnnealingLR(optimizer, T_max=steps)
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    if warmup_steps >= steps:
        return warmup
    descent = CosineAnnealingLR(optimizer, T_max=steps - warmup_steps)
    return SequentialLR(optimizer, [warmup, descent], milestones=[warmup_steps])


def multistep(
    optimizer: Optimizer, epochs: int, steps_per_epoch: int, milestones: Sequence[int], gamma: float
) -> LRScheduler:
    """The learning rate times `gamma` after each of the epochs in `milestones`."""
    check_numbers("scheduler.milestones", milestones, low=1, integer=True)
    check_number("scheduler.gamma", gamma, above=0)
    return MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in milestones], gamma=gamma)
