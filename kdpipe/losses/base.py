"""What the methods have in common."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.checks import check_number


def cross_entropy(student: Tensor, labels: Tensor, label_smoothing: float = 0) -> Tensor:
    """Cross-entropy of the student's logits with the labels, averaged over the images that have one.

    Args:
        student: logits, float [N, classes].
        labels: int64 [N], −1 for an image without a label; or the classes' shares, float [N, classes], of mixed images.
        label_smoothing: the share of each label that is spread evenly over all classes.
    """
    student = wide(student)
    if labels.is_floating_point():
        return F.cross_entropy(student, labels.to(student.dtype), label_smoothing=label_smoothing)
    labelled = labels >= 0
    if labelled.all():
        return F.cross_entropy(student, labels, label_smoothing=label_smoothing)
    total = F.cross_entropy(student, labels, ignore_index=-1, label_smoothing=label_smoothing, reduction="sum")
    return total / labelled.sum().clamp(min=1)


class Distillation(nn.Module):
    """ce_weight·CE + weight·(the method's term).

    A method defines `term`; where it learns projections, or needs to know the images that are taught, `fit_to`, too.

    Attributes:
        uses_teacher: whether a teacher is built for it.
        roles: what it asks of both networks beside logits, of `kdpipe.training.observed.ROLES`.
        name: of its term among the parts.
        teacher_learns: whether the network in the teacher's place is trained beside the student.
        compares_images: whether its term relates the images of a batch to each other.
        one_label: whether each image has to have one label: neither mixed nor without.

    Raises:
        ValueError: a weight below 0.
    """

    uses_teacher = True
    roles: tuple[str, ...] = ()
    name: str
    teacher_learns = False
    compares_images = False
    one_label = False

    def __init__(self, weight: float, ce_weight: float) -> None:
        super().__init__()
        check_number("loss.weight", weight, low=0)
        check_number("loss.ce_weight", ce_weight, low=0)
        self.weight = weight
        self.ce_weight = ce_weight

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        """Make what depends on the two networks and on the images; called once, before the optimizer is built.

        Args:
            student, teacher: what they make of two images.
            positions: of the training images in the data set, int64 [n], sorted.
            labels: theirs, int64 [n].

        Raises:
            ValueError: the method cannot be used with these networks.
        """

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """What the teacher's answers cost the student, a scalar; see the package for the arguments."""
        raise NotImplementedError

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        assert teacher is not None, f"{type(self).__name__} needs a teacher"
        ce = cross_entropy(student.logits, labels)
        term = self.term(student, teacher, labels, indices, epoch)
        return {"loss": self.ce_weight * ce + self.weight * term, "ce": ce, self.name: term}


class AlphaDistillation(Distillation):
    """(1 − alpha)·CE + alpha·(the method's term); at alpha 0 no teacher is built.

    Raises:
        ValueError: alpha outside of [0, 1].
    """

    def __init__(self, alpha: float) -> None:
        check_number("loss.alpha", alpha, low=0, high=1)
        super().__init__(weight=alpha, ce_weight=1 - alpha)
        self.alpha = alpha

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        if teacher is None:
            assert self.alpha == 0, "a teacher may be missing at alpha 0 only"
            ce = cross_entropy(student.logits, labels)
            return {"loss": ce, "ce": ce}
        return super().forward(student, teacher, labels, indices, epoch)


class Combined(nn.Module):
    """A loss, and the term of another method with that one's own weight; the cross-entropy is the first one's."""

    def __init__(self, loss: nn.Module, also: Distillation) -> None:
        super().__init__()
        self.first, self.second = loss, also
        self.uses_teacher = True
        self.roles = tuple(dict.fromkeys([*roles_of(loss), *also.roles]))
        self.one_label = getattr(loss, "one_label", False) or also.one_label

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        if isinstance(self.first, Distillation):
            self.first.fit_to(student, teacher, positions, labels)
        try:
            self.second.fit_to(student, teacher, positions, labels)
        except ValueError as error:  # losses speak of themselves as the loss
            raise ValueError(str(error).replace("loss.", "also.", 1)) from error

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = self.first(student, teacher, labels, indices, epoch)
        if teacher is None:
            assert self.second.weight == 0, f"{type(self.second).__name__} needs a teacher"
            return parts
        term = self.second.term(student, teacher, labels, indices, epoch)
        return {**parts, "loss": parts["loss"] + self.second.weight * term, self.second.name: term}


def roles_of(loss: nn.Module) -> tuple[str, ...]:
    """What a loss asks of both networks beside logits."""
    roles: tuple[str, ...] = getattr(loss, "roles", ())
    return roles


def last_pairs(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """The stages of two networks side by side, counted from the last where one has more."""
    number = min(len(student), len(teacher))
    return list(zip(student[-number:], teacher[-number:], strict=True))


def smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [N, C, H, W], both averaged down to the smaller one's height and width."""
    height, width = (min(student.shape[side], teacher.shape[side]) for side in (2, 3))

    def averaged(maps: Tensor) -> Tensor:
        # Pooling to the same size changes nothing, but takes as long as a layer of the network.
        return maps if maps.shape[2:] == (height, width) else F.adaptive_avg_pool2d(maps, (height, width))

    return averaged(student), averaged(teacher)
