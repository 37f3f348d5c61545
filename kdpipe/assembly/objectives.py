"""The loss, fitted to the networks that it compares, and the optimizer with its schedule."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdpipe.assembly.building import build
from kdpipe.assembly.parameter_groups import parameter_groups
from kdpipe.data import ImageDataset
from kdpipe.losses import AlphaLoss, CombinedLoss, LabelSmoothing, Loss, WeightedLoss
from kdpipe.losses.base import Plan
from kdpipe.losses.outputs import Outputs
from kdpipe.models import Classifier
from kdpipe.settings.errors import ConfigError, first_line, shortened
from kdpipe.settings.schema import Settings
from kdpipe.system.hardware import Hardware
from kdpipe.system.once import warn_once
from kdpipe.system.randomness import derive_seed
from kdpipe.training.loop import batches
from kdpipe.training.observed import Observed
from kdpipe.training.teacher import NetworkTeacher, Teacher


def build_loss(settings: Settings) -> Loss:
    """The loss, with the term of the second method, if any."""
    loss: Loss = build("loss", settings.loss)
    if settings.loss.label_smoothing > 0 and isinstance(loss, LabelSmoothing):
        expected = "0 with loss=label_smoothing, which has loss.smoothing"
        raise ConfigError("loss.label_smoothing", settings.loss.label_smoothing, expected)
    loss.label_smoothing = settings.loss.label_smoothing
    if settings.also is None:
        return loss
    target = settings.also.target
    if loss.teacher_learns:
        raise ConfigError("also", target, problem=f"{settings.loss.target} takes no second method")
    also: Loss = build("also", settings.also)
    if not also.name or also.teacher_learns:
        raise ConfigError("also", target, "a method of distillation")
    if also.name == loss.name:
        raise ConfigError("also", target, "another method", f"its term is called {also.name}, as that of the loss")
    return CombinedLoss(loss, also)


def class_weights(settings: Settings, data: ImageDataset) -> Tensor | None:
    """How much each class counts in the cross-entropy, float [classes]; None where all count alike.

    Raises:
        ConfigError: not one weight for each class, or "balanced" with a class that has no training image.
    """
    weights, classes = settings.loss.class_weights, data.num_classes
    if weights is None:
        return None
    if weights == "balanced":
        if settings.dataset.sampler == "balanced":
            problem = "the sampler already shows all classes alike, so that rare ones count more than common ones"
            warn_once("%s", ConfigError("loss.class_weights", weights, "null with dataset.sampler=balanced", problem))
        labels = data.labels[data.splits["train"]]
        counts = labels[labels >= 0].bincount(minlength=classes)
        if missing := [name for name, count in zip(data.class_names, counts, strict=True) if not count]:
            problem = f"no training image of {shortened(missing)}"
            raise ConfigError("loss.class_weights", weights, f"a list of {classes} numbers", problem)
        found = compute_class_weight("balanced", classes=np.arange(classes), y=labels[labels >= 0].numpy())
        return torch.from_numpy(found).float()
    if len(weights) != classes:
        expected = f"{classes} numbers, one for each class ({shortened(data.class_names)})"
        raise ConfigError("loss.class_weights", weights, expected, f"there are {len(weights)}")
    return torch.tensor(weights)


def check_fit(settings: Settings, model: Classifier, teacher: Teacher, data: ImageDataset) -> bool:
    """Whether maps of either network have another order of axes than [N, C, H, W].

    Raises:
        ConfigError: the loss cannot compare these two networks; before anything trains.
    """
    loss = build_loss(settings)
    student = Observed(model, model.network, loss.roles)
    teacher.observe(loss.roles)
    outputs, targets = fit_loss(settings, loss, student, teacher, data, torch.device("cpu"))
    positions = data.splits["train"].sort().values[:2]
    try:
        with torch.random.fork_rng(devices=[]):
            parts = loss(outputs, targets, data.labels[positions], positions, 1)
    except Exception as error:  # a class without a term, or with a mistake
        problem = f"it cannot compare two images ({first_line(error)})"
        raise ConfigError("loss._target_", settings.loss.target, problem=problem) from error
    if not isinstance(parts, dict) or not isinstance(parts.get("loss"), torch.Tensor):
        raise ConfigError("loss._target_", settings.loss.target, "a loss whose forward returns parts, {'loss': …}")
    student.remove()
    if settings.train.epochs > 0:
        for caveat in _caveats(settings, loss, outputs, targets, data):
            warn_once("%s", caveat)
    return student.is_rearranged or teacher.is_rearranged


def _caveats(
    settings: Settings, loss: Loss, student: Outputs, teacher: Outputs, data: ImageDataset
) -> Iterator[ConfigError]:
    """What of the methods is lost with these networks, images and settings.

    Raises:
        ConfigError: all of a method is lost.
    """
    train = settings.train
    images = max(map(len, batches(data.splits["train"], train.batch_size)))
    plan = Plan(data.num_classes, images, train.epochs)
    for key, part in loss.components.items():
        if part.weight > 0:
            try:
                yield from [caveat.under(key) for caveat in part.caveats(plan, student, teacher)]
            except ConfigError as error:
                raise error.under(key) from error
        elif not isinstance(part, AlphaLoss):
            yield ConfigError(f"{key}.weight", part.weight, problem="the teacher has no part in this training")
    first, *_ = loss.components.values()
    compares_logits = any(part.weight > 0 and not part.roles for part in loss.components.values())
    if isinstance(first, WeightedLoss) and first.ce_weight == 0 and not compares_logits:
        problem = "nothing trains the last layer, since the loss compares features alone"
        yield ConfigError("loss.ce_weight", 0, problem=problem)
    of_labels = {"class_weights": settings.loss.class_weights, "label_smoothing": settings.loss.label_smoothing}
    if isinstance(first, WeightedLoss) and first.ce_weight == 0:
        for key, value in of_labels.items():
            if value:
                yield ConfigError(f"loss.{key}", value, problem="the loss has no cross-entropy that it would change")
    if torch.equal(student.logits, teacher.logits):
        problem = "the student answers like its teacher before it has learned: the term starts at 0"
        yield ConfigError("model.weights", settings.model.weights, problem=problem)


def fit_loss(
    settings: Settings, loss: Loss, student: Observed, teacher: Teacher, data: ImageDataset, device: torch.device
) -> tuple[Outputs, Outputs]:
    """Let the loss make its projections for these networks, from random numbers of its own.

    Returns:
        The outputs of both for the two images that it was shown.

    Raises:
        ConfigError: the loss cannot compare the networks, or compares features that stay as they are.
    """
    positions = data.splits["train"].sort().values
    images = data.images[positions[:2]].to(device)
    student.model.eval()
    outputs, targets = student(images), teacher(images, positions[:2], 1)
    if loss.roles and not any(tensor.requires_grad for tensor in outputs.tensors[1:]):
        problem = f"the loss compares {', '.join(loss.roles)}, which stay as they are"
        raise ConfigError("model.freeze", settings.model.freeze, "none", problem)
    if isinstance(teacher, NetworkTeacher):
        loss.adopt(teacher.classifier)
    torch.manual_seed(derive_seed(settings.seed, "loss"))
    for key, part in loss.components.items():
        try:
            part.fit_to(outputs, targets, positions, data.labels[positions])
        except ConfigError as error:
            raise error.under(key) from error
    loss.to(device)
    return outputs, targets


def check_sharing(loss: Loss, has_unlabelled: bool, hardware: Hardware) -> None:
    """Raise ConfigError for a loss that changes when each process sees only its part of a batch."""
    if hardware.processes == 1:
        return
    problem = ""
    if any(part.compares_images for part in loss.components.values()):
        problem = "the loss compares the images of a batch, which processes share"
    elif any(parameter.requires_grad for parameter in loss.parameters()):
        problem = "the loss has weights of its own, which processes do not share yet"
    elif has_unlabelled:
        problem = "processes would weight labelled images differently"
    elif loss.components["loss"].class_weights is not None:
        problem = "processes would weigh classes differently (loss.class_weights; dataset.sampler=balanced works)"
    if problem:
        raise ConfigError("torchrun", expected="one process", problem=problem)


def build_optimizer(
    settings: Settings, model: nn.Module, loss: Loss, steps_per_epoch: int
) -> tuple[Optimizer, LRScheduler]:
    """Optimizer and schedule for the parameters of the model and of the loss that can be trained."""
    optimizer = build("optimizer", settings.optimizer, parameter_groups(settings.optimizer, model, loss))
    if not isinstance(optimizer, Optimizer):
        raise ConfigError("optimizer._target_", settings.optimizer.target, "an optimizer, such as torch.optim.Adam")
    for group in optimizer.param_groups:
        if "lr_scale" in group:
            group["lr"] *= group.pop("lr_scale")
    epochs = settings.train.epochs
    schedule = build("scheduler", settings.scheduler, optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)
    if not isinstance(schedule, LRScheduler):
        expected = "a schedule, such as kdpipe.training.schedules.cosine"
        raise ConfigError("scheduler._target_", settings.scheduler.target, expected)
    return optimizer, schedule


def check_step(settings: Settings, loss: Loss) -> None:
    """Raise ConfigError for an optimizer or a schedule that cannot be used, tried on two numbers."""
    layer = nn.Linear(1, 1)
    of_any_network = settings.optimizer.model_copy(update={"layer_decay": None})
    tried = settings.model_copy(update={"optimizer": of_any_network})
    optimizer, schedule = build_optimizer(tried, layer, loss, steps_per_epoch=1)
    layer(torch.ones(1, 1)).sum().backward()
    try:
        optimizer.step()
    except Exception as error:  # one that wants a closure, or sparse gradients
        problem = f"it cannot take a step of training ({first_line(error)})"
        raise ConfigError("optimizer._target_", settings.optimizer.target, problem=problem) from error
    schedule.step()
