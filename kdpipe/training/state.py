"""The state of a training: all that a step changes, and so all that a checkpoint holds."""

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdpipe.losses import Loss
from kdpipe.models.weights import State
from kdpipe.system.hardware import Hardware
from kdpipe.system.randomness import random_state, set_random_state
from kdpipe.training.observed import Observed


class Training:
    """A network as it learns, and how far it is: all that a step changes, and so all that a checkpoint holds.

    Args:
        student: the model that is called with images; under `torchrun` the one that shares its gradients.
        learner: the part of the network whose weights change and are kept; None for the model itself.

    Attributes:
        epoch: the one in progress, counted from 1.
        steps: the number of its steps that are done.
        seen: the number of images that this process has seen in them.
        totals: the parts of the loss and the correct answers, summed over these images.
        seconds: the time that they took, earlier processes included.
        learning_rate: at the start of the epoch.
        selected: the epoch of the weights to be kept, and its metrics on the validation images.
        highest: the highest metric of the recipe on the validation images so far; −1 before there is one.
        best: the weights that have it.
    """

    def __init__(
        self,
        student: Observed,
        loss: Loss,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        hardware: Hardware,
        learner: nn.Module | None = None,
    ) -> None:
        self.student, self.model, self.loss = student, student.model, loss
        self.learner = learner or student.model
        self.optimizer, self.scheduler, self.hardware = optimizer, scheduler, hardware
        self.selected: dict[str, float] = {"selected/epoch": 0}
        self.highest = -1.0
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
        """Count a step on so many images; `parts` are sums over them."""
        for name, value in parts.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.steps += 1
        self.seen += images

    def state(self) -> dict[str, Any]:
        """All that is needed to continue from here, in tensors and plain values; every process has to call it.

        Raises:
            ValueError: the training has diverged: there is nothing to continue with.
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
            "highest": self.highest,
            "best": dict(self.best),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to where `state` was taken."""
        self.learner.load_state_dict(state["learner"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for name in ("epoch", "steps", "seen", "seconds", "learning_rate", "selected", "best"):
            setattr(self, name, state[name])
        # A checkpoint of 0.4.0 has the best weights only where they are selected; else they are not known any more.
        known = state["selected"].get("selected/accuracy", -1.0) if state["best"] or self.is_new else math.inf
        self.highest = state.get("highest", known)
        # By one process only: others would count them again.
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
        what = f"the loss is {loss}" if loss is not None else "some weights are NaN or infinite"
        raise ValueError(
            f"epoch {self.epoch}: {what}, the training has diverged; "
            f"try a lower optimizer.lr than {self.learning_rate:g}, or train.clip_norm=1"
        )
