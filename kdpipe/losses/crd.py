"""Contrastive representation distillation: Tian, Krishnan & Isola 2020, https://arxiv.org/abs/1910.10699.

The student's embedding of an image is pulled towards the teacher's embedding of the same image and away from those of
other images, and the other way round. The others come from a memory of all training images.
"""

import math
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.losses.base import Plan, WeightedLoss, idle_caveats, only_a_sign, temperature_caveats
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.values import NonNegative, Positive, PositiveInt, checked

EPSILON = 1e-7  # the authors'
LARGEST_USEFUL_TEMPERATURE = 10


def crd(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    candidates: Tensor,
    log_normalizers: Tensor | None = None,
    temperature: float = 0.07,
) -> Tensor:
    """Noise-contrastive estimation of which candidate is the image itself, summed over both directions.

    As in the authors' code: with K negatives, n rows in the memory and the probability
    P = exp(embedding·row / temperature) / Z of each candidate, an image costs

        −log(P / (P + K/n + 1e-7)) for its own row, −log((K/n) / (P + K/n + 1e-7)) for each negative,

    summed over the candidates and averaged over the batch, once for the student's embeddings with the teacher's
    memory, once for the teacher's with the student's. (The paper's formulas have neither Z nor
    1e-7.) Computed in logarithms, which do not overflow at any temperature.

    Args:
        student, teacher: embeddings of length 1, float [N, D].
        student_memory, teacher_memory: their embeddings of all training images, float [n, D]; constants, which may be
            overwritten before the backward pass.
        candidates: rows of the memories, int64 [N, 1 + K]: each image's own, then its negatives.
        log_normalizers: log Z of the student's direction and of the teacher's, float [2], from `crd_log_normalizers` on
            the first batch of a training; None for those of this batch, as constants.
        temperature: divides the cosines, above 0.
    """
    if log_normalizers is None:
        arguments = (student, teacher, student_memory, teacher_memory, candidates)
        log_normalizers = crd_log_normalizers(*arguments, temperature)
    images, negatives = len(candidates), candidates.shape[1] - 1
    share = negatives / len(student_memory)
    total = student.new_zeros((), dtype=wide(student).dtype)
    for embeddings, memory, log_normalizer in (
        (student, teacher_memory, log_normalizers[0]),
        (teacher, student_memory, log_normalizers[1]),
    ):
        # log(P / (share + ε)): the odds that a candidate is the image itself.
        odds = _products(embeddings, memory, candidates) / temperature - log_normalizer - math.log(share + EPSILON)
        own, others = F.logsigmoid(odds[:, 0]).sum(), F.logsigmoid(-odds[:, 1:]).sum()
        total = total - (own + others) / images - negatives * math.log(share / (share + EPSILON))
    return total


@torch.no_grad()
def crd_log_normalizers(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    candidates: Tensor,
    temperature: float = 0.07,
) -> Tensor:
    """log Z of both directions, float [2]: Z is n times the mean of exp(embedding·row / temperature); see `crd`."""
    logarithms = [
        (_products(embeddings, memory, candidates) / temperature).flatten().logsumexp(dim=0)
        for embeddings, memory in ((student, teacher_memory), (teacher, student_memory))
    ]
    return torch.stack(logarithms) + math.log(len(student_memory) / candidates.numel())


def _products(embeddings: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
    """Dot products of embeddings [N, D] with their candidates' rows of a memory [n, D]: [N, 1 + K]."""
    embeddings, memory = wide(embeddings), wide(memory)
    # Where much of the memory is needed, multiplying all of it and picking products is ten times faster than fetching
    # a row for each pair (half a gigabyte of rows at 16,384 negatives and 64 images). The copy is for the gradient:
    # the memory itself changes before the backward pass.
    if len(memory) <= 32 * candidates.shape[1]:
        return (embeddings @ memory.clone().t()).gather(1, candidates)
    return torch.bmm(F.embedding(candidates, memory), embeddings.unsqueeze(2)).squeeze(2)


class CRD(WeightedLoss):
    """ce_weight·CE + weight·CRD, with a memory of both networks' embeddings.

    Both networks' embeddings are projected to `dimensions` by learned layers and scaled to length 1. Z is measured on
    the first batch of the training and then fixed. Once a batch is scored, its rows of the memory become
    `momentum`·row + (1 − `momentum`)·embedding, scaled to length 1 (not in evaluation mode). The term may rise for some
    epochs, while the memory fills with embeddings that are still alike; then it falls.

    An image's negatives depend only on the run's seed, the epoch and the image, not on the rest of its batch or on
    other random draws, so that a resumed training sees the same ones. As in the authors' code, each image has its own,
    a uniformly random set of `negatives` images of other classes, drawn with replacement where there are fewer.

    Args:
        negatives: K, for each image.
        contrast_temperature: divides the cosines; named so that a sweep over `loss.temperature`, that of the logits,
            leaves it alone.
        momentum: of the memory's rows, from 0 to below 1.
        dimensions: of the embeddings that are compared.

    Raises:
        ConfigError: a value outside its range.
    """

    name = "crd"
    roles = ("embedding",)
    one_label = True

    @checked
    def __init__(
        self,
        weight: NonNegative = 0.8,
        ce_weight: NonNegative = 1,
        negatives: PositiveInt = 16384,
        contrast_temperature: Positive = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        dimensions: PositiveInt = 128,
    ) -> None:
        super().__init__(weight, ce_weight)
        self.negatives, self.dimensions = negatives, dimensions
        self.contrast_temperature, self.momentum = contrast_temperature, momentum

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        assert student.embedding is not None and teacher.embedding is not None
        by_class = labels.argsort(stable=True)
        sizes = labels.bincount()
        if int(sizes.max()) == len(labels):
            problem = "the training images are all of one class"
            raise ConfigError("negatives", self.negatives, "images of two or more classes", problem)
        self.student_projection = nn.Linear(student.embedding.shape[1], self.dimensions)
        self.teacher_projection = nn.Linear(teacher.embedding.shape[1], self.dimensions)
        bound = math.sqrt(3 / self.dimensions)  # rows of about length 1
        self.student_memory = nn.Buffer(torch.empty(len(positions), self.dimensions).uniform_(-bound, bound))
        self.teacher_memory = nn.Buffer(torch.empty(len(positions), self.dimensions).uniform_(-bound, bound))
        self.log_normalizers = nn.Buffer(torch.zeros(2))  # 0: not measured yet
        self.seed = nn.Buffer(torch.randint(2**62, ()))
        # Where each row's class is among all rows in the order of classes; known from the data, so not in checkpoints.
        self.positions = nn.Buffer(positions.clone(), persistent=False)
        self.by_class = nn.Buffer(by_class, persistent=False)
        self.class_start = nn.Buffer((sizes.cumsum(dim=0) - sizes)[labels], persistent=False)
        self.class_size = nn.Buffer(sizes[labels], persistent=False)

    def caveats(self, plan: Plan, student: Outputs, teacher: Outputs) -> list[ConfigError]:
        found = temperature_caveats(self.contrast_temperature, key="contrast_temperature")
        if self.contrast_temperature > LARGEST_USEFUL_TEMPERATURE:
            problem = "cosines, which differ by 2 at most, tell no image from another when they are divided by so much"
            found.append(ConfigError("contrast_temperature", self.contrast_temperature, problem=problem))
        return found + idle_caveats({"dimensions": self.dimensions}, {"dimensions": only_a_sign(self.dimensions)})

    def candidates(self, indices: Tensor, epoch: int) -> Tensor:
        """Rows of the memory for training images: each image's own, then its negatives, int64 [N, 1 + K]."""
        rows = torch.searchsorted(self.positions, indices)
        drawn = np.empty((len(rows), self.negatives), dtype=np.int64)
        others = (len(self.positions) - self.class_size[rows]).tolist()
        seed = int(self.seed)
        # NumPy draws some of many in a third of the time that PyTorch takes to shuffle them all.
        for i, (index, number) in enumerate(zip(indices.tolist(), others, strict=True)):
            generator = np.random.default_rng([seed, epoch, index])
            drawn[i] = generator.choice(number, self.negatives, replace=self.negatives > number, shuffle=False)
        places = torch.from_numpy(drawn).to(rows.device)
        # In the order of classes, the image's own class left out.
        places += self.class_size[rows, None] * (places >= self.class_start[rows, None])
        return torch.cat([rows[:, None], self.by_class[places]], dim=1)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        assert student.embedding is not None and teacher.embedding is not None
        candidates = self.candidates(indices.to(self.positions.device), epoch)
        of_student = F.normalize(self.student_projection(wide(student.embedding)), dim=1)
        of_teacher = F.normalize(self.teacher_projection(wide(teacher.embedding)), dim=1)
        arguments = (of_student, of_teacher, self.student_memory, self.teacher_memory, candidates)
        if not self.log_normalizers.any():
            self.log_normalizers.copy_(crd_log_normalizers(*arguments, self.contrast_temperature))
        term = crd(*arguments, self.log_normalizers, self.contrast_temperature)
        if self.training:
            rows = candidates[:, 0]
            for memory, new in ((self.student_memory, of_student.detach()), (self.teacher_memory, of_teacher.detach())):
                memory[rows] = F.normalize(self.momentum * memory[rows] + (1 - self.momentum) * new, dim=1)
        return term
