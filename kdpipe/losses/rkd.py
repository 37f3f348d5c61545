"""Relational knowledge distillation: Park, Kim, Lu & Cho 2019, https://arxiv.org/abs/1904.05068."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.losses.base import Distillation
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.checks import check_number

SMALLEST_DISTANCE = 1e-6  # the authors'


def rkd(student: Tensor, teacher: Tensor, distance_weight: float = 25, angle_weight: float = 50) -> Tensor:
    """distance_weight·`rkd_distance` + angle_weight·`rkd_angle`: how differently two networks lay out a batch.

    Args:
        student: embeddings, float [N, D].
        teacher: embeddings, float [N, D'].
    """
    return distance_weight * rkd_distance(student, teacher) + angle_weight * rkd_angle(student, teacher)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of the distances between images, each network's relative to their mean; over all N² pairs.

    The pairs of an image with itself count 0 in the mean over N², as in the authors' code; 0 for a batch of 1.

    Args:
        student: embeddings, float [N, D].
        teacher: embeddings, float [N, D'].
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of the cosines of the angles that images make, over all N³ triplets, as in the authors' code.

    Takes memory for N³ and N²·D numbers: at N 64 and D 64 a few megabytes, at N 1024 gigabytes.

    Args:
        student: embeddings, float [N, D].
        teacher: embeddings, float [N, D'].
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
    # Divided by infinity what has no direction is 0, and its gradient too.
    directions = differences / torch.where(lengths > 0, lengths, torch.inf)
    return directions @ directions.transpose(1, 2)


class RKD(Distillation):
    """ce_weight·CE + weight·rkd of the embeddings.

    Raises:
        ValueError: a weight below 0.
    """

    roles = ("embedding",)
    name = "rkd"
    compares_images = True

    def __init__(self, distance_weight: float, angle_weight: float, weight: float, ce_weight: float) -> None:
        super().__init__(weight, ce_weight)
        check_number("loss.distance_weight", distance_weight, low=0)
        check_number("loss.angle_weight", angle_weight, low=0)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        assert student.embedding is not None and teacher.embedding is not None
        return rkd(student.embedding, teacher.embedding, self.distance_weight, self.angle_weight)
