"""The state of a training: all that a step changes, and so all that a checkpoint holds."""

import math
import warnings
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
        ema: decay of an exponential moving average of the learner's weights over the steps; None for no average. After
            n steps it is (1 + n) / (10 + n) at most, as in TensorFlow and timm, or the first, random weights would be
            most of the average of a short training.

    Attributes:
        averaged: that average. Running statistics of BatchNorm are averaged like weights, as in timm and torchvision:
            those of the last step belong to other weights.
        scaler: of the loss, so that gradients in float16 do not vanish; without effect in other precisions.
        epoch: the one in progress, counted from 1.
        steps: the number of its steps that are done.
        seen: the number of images that this process has seen in them.
        totals: the parts of the loss and the correct answers, summed over these images.
        seconds: the time that they took, earlier processes included.
        learning_rate: at the start of the epoch.
        selected: the epoch of the weights to be kept, and its metrics on the validation images.
        highest: the highest metric of the recipe on the validation images so far; −1 before there is one.
        best: the weights that have it.
        reached: the metric that decides when to stop, of each epoch so far.
    """

    def __init__(
        self,
        student: Observed,
        loss: Loss,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        hardware: Hardware,
        learner: nn.Module | None = None,
        ema: float | None = None,
    ) -> None:
        self.student, self.model, self.loss = student, student.model, loss
        self.learner = learner or student.model
        self.optimizer, self.scheduler, self.hardware = optimizer, scheduler, hardware
        self.ema = ema
        self.averaged = None if ema is None else AveragedModel(self.learner, use_buffers=True)
        self.scaler = GradScaler(hardware.device.type, enabled=hardware.precision == "float16")
        if self.scaler.is_enabled():  # it leaves out steps, the first ones too, and the schedule goes on
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
        self.selected: dict[str, float] = {"selected/epoch": 0}
        self.highest = -1.0
        self.best: State = {}
        self.reached: list[float] = []
        self.begin_epoch(1)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.steps = self.seen = 0
        self.totals: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.learning_rate = max(float(group["lr"]) for group in self.optimizer.param_groups)

    @property
    def is_new(self) -> bool:
        return self.epoch == 1 and self.steps == 0

    @property
    def averaged_weights(self) -> State | None:
        """The learner's average; None where there is none."""
        return None if self.averaged is None else self.averaged.module.state_dict()

    def take_step(self, clip_norm: float | None) -> None:
        """Change the weights by their gradients, after these were scaled down to `clip_norm` where theirs is larger."""
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            learned = [weight for part in (self.model, self.loss) for weight in part.parameters()]
            nn.utils.clip_grad_norm_(learned, clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.averaged is not None and self.ema is not None:
            steps = int(self.averaged.n_averaged)
            self.averaged.multi_avg_fn = get_ema_multi_avg_fn(min(self.ema, (1 + steps) / (10 + steps)))
            self.averaged.update_parameters(self.learner)

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
            "scaler": self.scaler.state_dict(),
            "averaged": None if self.averaged is None else dict(self.averaged.state_dict()),
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
            "reached": list(self.reached),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to where `state` was taken."""
        self.learner.load_state_dict(state["learner"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state.get("scaler", {}))  # without effect where it has none, as before 0.5
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.reached = list(state.get("reached", []))
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
