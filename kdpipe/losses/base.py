"""The base classes of all losses, and what the methods share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, Share, checked

Parts = dict[str, Tensor]  # scalars by name; `loss` is minimised
SMALLEST_TEMPERATURE = 1e-6  # below it a term of T² leaves nothing in float32


@dataclass(frozen=True)
class Plan:
    """What a loss will be used on: the number of classes, of images in a batch, and of epochs."""

    classes: int
    images: int
    epochs: int


def cross_entropy(
    student: Tensor, labels: Tensor, label_smoothing: float = 0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the student's logits, averaged over the labelled images; 0 where no image has a label.

    Args:
        student: logits, float [N, classes].
        labels: int64 [N], −1 for unlabelled images; or class shares of mixed images, float [N, classes].
        label_smoothing: share of each label that is spread evenly over all classes.
        class_weights: how much each class counts, float [classes], above 0; None for all alike. As in PyTorch the sum
            is divided by the weights of the labels, so that only their ratios matter. So it is for mixed images, by
            their shares, where PyTorch would divide by N.
    """
    student = wide(student)
    if class_weights is not None:
        return _weighted_cross_entropy(student, labels, label_smoothing, class_weights.to(student.dtype))
    if labels.is_floating_point():
        return F.cross_entropy(student, labels.to(student.dtype), label_smoothing=label_smoothing)
    labelled = labels >= 0
    total = F.cross_entropy(student, labels, ignore_index=-1, label_smoothing=label_smoothing, reduction="sum")
    mean = total / labelled.sum().clamp(min=1)  # `if labelled.all()` would make a GPU wait in each step
    if label_smoothing == 0:
        return mean
    # PyTorch's own mean of smoothed labels rounds differently; it holds where every image has a label.
    every = F.cross_entropy(student, labels.clamp(min=0), label_smoothing=label_smoothing)
    return torch.where(labelled.all(), every, mean)


def _weighted_cross_entropy(student: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor) -> Tensor:
    if labels.is_floating_point():
        labels = labels.to(student.dtype)
        of_labels = labels @ weights
    else:
        of_labels = weights[labels.clamp(min=0)] * (labels >= 0)
    total = F.cross_entropy(student, labels, weights, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
    return total / of_labels.sum().clamp(min=torch.finfo(weights.dtype).tiny)


class Loss(nn.Module):
    """Base class of all losses.

    A distillation method derives from `WeightedLoss` or `AlphaLoss` and defines `term` only; one that learns
    projections, or needs to know the training images, also defines `fit_to`. One that defines `forward` takes the
    method `cross_entropy`, which smooths the labels and weighs the classes.
    """

    name: str = ""  # of its term among the parts; without one it cannot be added to another loss
    weight: float = 1  # of its term
    uses_teacher = True  # whether a teacher is built for it
    teacher_learns = False  # whether the network in the teacher's place is trained along with the student
    roles: tuple[str, ...] = ()  # features it needs in addition to logits, of `kdpipe.losses.outputs.ROLES`
    one_label = False  # whether each image needs exactly one label, neither mixed nor missing
    compares_images = False  # whether its term relates the images of a batch to each other
    label_smoothing: float = 0  # share of each label that is spread evenly over all classes, for `cross_entropy`
    class_weights: Tensor | None  # float [classes], for `cross_entropy`; not part of checkpoints

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("class_weights", None, persistent=False)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The function of this name, with the loss's `label_smoothing` and `class_weights`."""
        return cross_entropy(logits, labels, self.label_smoothing, self.class_weights)

    @property
    def components(self) -> dict[str, "Loss"]:
        """The losses it consists of, by config key: itself as `loss`, unless it combines several."""
        return {"loss": self}

    def adopt(self, peer: nn.Module) -> None:
        """Take in the network in the teacher's place; if it learns, the optimizer and checkpoints find it here."""

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        """Build what depends on the two networks and on the data; called once, before the optimizer is built.

        Args:
            student, teacher: the two networks' outputs for two images.
            positions: of the training images in the data set, int64 [n], sorted.
            labels: of the training images, int64 [n].

        Raises:
            ConfigError: the method does not work with these networks or images; the key is relative, such as `stage`.
        """

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        """What of the method is lost in such a training; the keys are relative, such as `warmup`.

        Args:
            student, teacher: as for `fit_to`.

        Raises:
            ConfigError: all of it is lost, since its term is the same whatever the student answers.
        """
        return []

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """The method's own term, a scalar without its weight; arguments as for `forward`."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        """The named parts of the loss on N images.

        Args:
            student, teacher: both networks' outputs; no teacher where none was built.
            labels: int64 [N], −1 for unlabelled images; or class shares of mixed images, float [N, classes].
            indices: the images' positions in the data set, int64 [N].
            epoch: counted from 1.
        """
        raise NotImplementedError


class WeightedLoss(Loss):
    """ce_weight·CE + weight·(the method's term).

    Raises:
        ConfigError: a negative weight.
    """

    @checked
    def __init__(self, weight: NonNegative, ce_weight: NonNegative) -> None:
        super().__init__()
        self.weight, self.ce_weight = weight, ce_weight

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        assert teacher is not None, f"{type(self).__name__} needs a teacher"
        ce = self.cross_entropy(student.logits, labels)
        term = self.term(student, teacher, labels, indices, epoch)
        return {"loss": self.ce_weight * ce + self.weight * term, "ce": ce, self.name: term}


class AlphaLoss(WeightedLoss):
    """(1 − alpha)·CE + alpha·(the method's term); no teacher is built at alpha 0.

    Raises:
        ConfigError: alpha outside [0, 1].
    """

    @checked
    def __init__(self, alpha: Share) -> None:
        super().__init__(weight=alpha, ce_weight=1 - alpha)
        self.alpha = alpha

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        if teacher is None:
            assert self.alpha == 0, "only alpha 0 needs no teacher"
            ce = self.cross_entropy(student.logits, labels)
            return {"loss": ce, "ce": ce}
        return super().forward(student, teacher, labels, indices, epoch)


class CombinedLoss(Loss):
    """A loss plus the weighted term of another method; the cross-entropy is that of the first.

    Its `components` are fitted one by one, so that an error is reported under the key of the one that raised it.
    """

    def __init__(self, loss: Loss, also: Loss) -> None:
        super().__init__()
        self.first, self.second = loss, also
        self.roles = tuple(dict.fromkeys([*loss.roles, *also.roles]))
        self.one_label = loss.one_label or also.one_label
        self.compares_images = loss.compares_images or also.compares_images

    @property
    def components(self) -> dict[str, Loss]:
        return {"loss": self.first, "also": self.second}

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        parts: Parts = self.first(student, teacher, labels, indices, epoch)
        if teacher is None:
            assert self.second.weight == 0, f"{type(self.second).__name__} needs a teacher"
            return parts
        term = self.second.term(student, teacher, labels, indices, epoch)
        return {**parts, "loss": parts["loss"] + self.second.weight * term, self.second.name: term}


def last_pairs(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """The stages of two networks in pairs, aligned at the last stage where one network has more."""
    number = min(len(student), len(teacher))
    return list(zip(student[-number:], teacher[-number:], strict=True))


def warmup_factor(epoch: int, warmup: float) -> float:
    """Grows linearly to 1 over `warmup` epochs, counted from 1; 1 throughout for none."""
    return min(epoch / warmup, 1) if warmup else 1


def warmup_caveats(warmup: float, epochs: int) -> list[ConfigError]:
    """A warm-up that takes more than half of the training."""
    if warmup <= epochs / 2:
        return []
    if warmup > epochs:
        problem = f"train.epochs={epochs}, so that the term ends at {warmup_factor(epochs, warmup):.0%} of its weight"
    else:
        problem = f"train.epochs={epochs}, so that the term has its weight from epoch {math.ceil(warmup)} on only"
    return [ConfigError("warmup", warmup, f"a number up to {epochs / 2:g}, 0 for none", problem)]


def temperature_caveats(temperature: float, largest: float = math.inf, key: str = "temperature") -> list[ConfigError]:
    """A temperature that is too small for a term of T², or nearly so.

    Raises:
        ConfigError: one that leaves nothing of the term, or is above the largest.
    """
    if temperature < SMALLEST_TEMPERATURE or temperature > largest:
        limits = f"a number from {SMALLEST_TEMPERATURE:g}" + (f" to {largest:g}" if largest < math.inf else "")
        raise ConfigError(key, temperature, limits, "the term would be lost in rounding")
    return []


def too_few(images: int, least: int) -> str:
    """Why comparing the images of a batch teaches nothing; "" where there are enough."""
    if images >= least:
        return ""
    return f"it compares the images of a batch, {least} or more, and batches have {images} (train.batch_size)"


def only_a_sign(dimensions: int) -> str:
    """Why the direction of an embedding teaches nothing; "" where it does."""
    return "the direction of an embedding of one dimension is a sign" if dimensions == 1 else ""


def idle_caveats(weights: Mapping[str, float], idle: Mapping[str, str]) -> list[ConfigError]:
    """The parts of a term that teach nothing.

    Args:
        weights: of the term's parts, by key.
        idle: why a part teaches nothing; "" where it teaches.

    Raises:
        ConfigError: no part is left.
    """
    lost = [ConfigError(key, weight, problem=idle[key]) for key, weight in weights.items() if weight > 0 and idle[key]]
    if lost and len(lost) == sum(weight > 0 for weight in weights.values()):
        first = lost[0]
        raise ConfigError(first.key, first.value, problem=f"{first.problem}; nothing is left of the method")
    return lost


def smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [N, C, H, W], both average-pooled to the smaller height and width."""
    height, width = (min(student.shape[side], teacher.shape[side]) for side in (2, 3))

    def averaged(maps: Tensor) -> Tensor:
        # Pooling to the same size changes nothing, but takes as long as a layer of the network.
        return maps if maps.shape[2:] == (height, width) else F.adaptive_avg_pool2d(maps, (height, width))

    return averaged(student), averaged(teacher)
