"""Correlation congruence: Peng et al. 2019, https://arxiv.org/abs/1904.01802."""

from torch import Tensor, nn

from kdpipe.losses.base import Plan, WeightedLoss, idle_caveats, too_few
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, PositiveInt, checked


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """How large the two networks' differences are jointly on images that are neighbours in the batch.

    The mean over i of |s_i − t_i| · |s_{i+1} − t_{i+1}|; 0 for a batch of 1. As in the authors' code and in the
    benchmark (Tian et al. 2020, https://arxiv.org/abs/1910.10699); the paper compares the networks' kernel matrices
    over the batch instead.

    Args:
        student, teacher: vectors, float [N, D].
    """
    differences = (wide(student) - wide(teacher)).abs()
    products = (differences[:-1] * differences[1:]).sum(dim=1)
    return products.sum() / max(len(products), 1)


class Correlation(WeightedLoss):
    """ce_weight·CE + weight·correlation of both networks' embeddings, each after a linear layer to `dimensions`.

    Raises:
        ConfigError: a negative weight, or dimensions that are not a whole number from 1.
    """

    roles = ("embedding",)
    name = "correlation"
    compares_images = True
    student_projection: nn.Module
    teacher_projection: nn.Module

    @checked
    def __init__(self, dimensions: PositiveInt, weight: NonNegative, ce_weight: NonNegative) -> None:
        super().__init__(weight, ce_weight)
        self.dimensions = dimensions

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        assert student.embedding is not None and teacher.embedding is not None
        self.student_projection = nn.Linear(student.embedding.shape[1], self.dimensions)
        self.teacher_projection = nn.Linear(teacher.embedding.shape[1], self.dimensions)

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        idle = too_few(plan.images, least=2)
        return idle_caveats({"weight": self.weight}, {"weight": idle})

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        return correlation(self.student_projection(student.embedding), self.teacher_projection(teacher.embedding))
