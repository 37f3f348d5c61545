"""Relational knowledge distillation: Park, Kim, Lu & Cho 2019, https://arxiv.org/abs/1904.05068."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import Plan, WeightedLoss, idle_caveats, too_few
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, checked

SMALLEST_DISTANCE = 1e-6  # the authors'


def rkd(student: Tensor, teacher: Tensor, distance_weight: float = 25, angle_weight: float = 50) -> Tensor:
    """distance_weight·`rkd_distance` + angle_weight·`rkd_angle`: how differently two networks lay out a batch.

    Args:
        student, teacher: embeddings, float [N, D] and [N, D'].
    """
    return distance_weight * rkd_distance(student, teacher) + angle_weight * rkd_angle(student, teacher)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of the distances between images, each network's relative to their mean; over all N² pairs.

    As in the authors' code, the mean over N² includes the zeros of each image paired with itself; 0 for a batch of 1.
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of the cosines of the angles between images, over all N³ triplets, as in the authors' code.

    Needs memory for N³ and N²·D numbers: a few megabytes at N 64 and D 64, gigabytes at N 1024.
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _differences(embeddings: Tensor) -> Tensor:
    """From image i to image j, float [N, N, D]."""
    embeddings = wide(embeddings)
    return embeddings[None, :] - embeddings[:, None]


def _relative_distances(embeddings: Tensor) -> Tensor:
    """float [N, N]"""
    # The gradient of a length of 0 is 0, not NaN.
    distances = torch.linalg.vector_norm(_differences(embeddings), dim=2).clamp(min=SMALLEST_DISTANCE)
    images = len(distances)
    distances = distances * (1 - torch.eye(images, dtype=distances.dtype, device=distances.device))
    pairs = max(images * (images - 1), 1)
    return distances / (distances.sum() / pairs).clamp(min=SMALLEST_DISTANCE)


def _cosines(embeddings: Tensor) -> Tensor:
    """Of the angle at image i between images j and k, float [N, N, N]; 0 where two of them coincide."""
    differences = _differences(embeddings)
    lengths = torch.linalg.vector_norm(differences, dim=2, keepdim=True)
    # Dividing a difference without direction by infinity makes it and its gradient 0.
    directions = differences / torch.where(lengths > 0, lengths, torch.inf)
    return directions @ directions.transpose(1, 2)


class RKD(WeightedLoss):
    """ce_weight·CE + weight·rkd of the embeddings.

    Raises:
        ConfigError: a negative weight.
    """

    roles = ("embedding",)
    name = "rkd"
    compares_images = True

    @checked
    def __init__(
        self, distance_weight: NonNegative, angle_weight: NonNegative, weight: NonNegative, ce_weight: NonNegative
    ) -> None:
        super().__init__(weight, ce_weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        weights = {"distance_weight": self.distance_weight, "angle_weight": self.angle_weight}
        idle = dict.fromkeys(weights, too_few(plan.images, least=3))
        if student.embedding is not None and student.embedding.shape[1] == 1:
            idle["angle_weight"] = "angles between numbers, embeddings of one dimension, are 0 or 180 degrees"
        return idle_caveats(weights, idle)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        assert student.embedding is not None and teacher.embedding is not None
        return rkd(student.embedding, teacher.embedding, self.distance_weight, self.angle_weight)
