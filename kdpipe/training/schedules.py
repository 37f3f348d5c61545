"""Learning-rate schedules, all PyTorch's own, advanced once per step so that they are smooth within an epoch."""

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, Positive, PositiveInt, checked


def constant(optimizer: Optimizer, epochs: int, steps_per_epoch: int) -> LRScheduler:
    """The optimizer's learning rate throughout."""
    return LambdaLR(optimizer, lambda step: 1.0)


@checked
def cosine(optimizer: Optimizer, epochs: int, steps_per_epoch: int, warmup_epochs: NonNegative) -> LRScheduler:
    """Linear warm-up over `warmup_epochs`, then half a cosine to 0 at the last step (Loshchilov & Hutter 2017).

    Raises:
        ConfigError: a negative warm-up, or one longer than the training.
    """
    if epochs == 0:
        return constant(optimizer, epochs, steps_per_epoch)
    if warmup_epochs > epochs:
        raise ConfigError("warmup_epochs", warmup_epochs, f"a number from 0 to {epochs}")
    steps = epochs * steps_per_epoch
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if warmup_steps == 0:
        return CosineAnnealingLR(optimizer, T_max=steps)
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    if warmup_steps >= steps:
        return warmup
    descent = CosineAnnealingLR(optimizer, T_max=steps - warmup_steps)
    return SequentialLR(optimizer, [warmup, descent], milestones=[warmup_steps])


@checked
def multistep(
    optimizer: Optimizer, epochs: int, steps_per_epoch: int, milestones: Sequence[PositiveInt], gamma: Positive
) -> LRScheduler:
    """The learning rate is multiplied by `gamma` after each epoch in `milestones`."""
    return MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in milestones], gamma=gamma)
