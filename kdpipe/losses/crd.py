"""Contrastive representation distillation: Tian, Krishnan & Isola 2020, https://arxiv.org/abs/1910.10699.

A student's embedding of an image is to be told from the teacher's embeddings of other images by being close to the
teacher's embedding of the same image, and the other way round. The others come from a memory of all training images.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.losses.base import Distillation
from kdpipe.losses.outputs import Outputs, wide
from kdpipe.settings.checks import check_number

EPSILON = 1e-7  # the authors'


def crd(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    candidates: Tensor,
    log_normalizers: Tensor | None = None,
    temperature: float = 0.07,
) -> Tensor:
    """Noise-contrastive estimation of which candidate is the image itself, in both directions, added.

    As in the authors' code: with K negatives, n rows in the memory and the probability
    P = exp(embedding·row / temperature) / Z of each candidate, an image costs

        −log(P / (P + K/n + 1e-7)) for its own row, −log((K/n) / (P + K/n + 1e-7)) for each negative,

    summed over the candidates and averaged over the batch, once for the student's embeddings with the teacher's
    memory, once for the teacher's with the student's. (The paper's formulas have neither Z nor
    1e-7.) Worked out in logarithms, which overflow at no temperature.

    Args:
        student: embeddings of length 1, float [N, D].
        teacher: embeddings of length 1, float [N, D].
        student_memory: the student's embeddings of all training images, float [n, D]; as a constant, and it may be
            written to before the gradient is worked out.
        teacher_memory: the teacher's, likewise.
        candidates: rows of the memories, int64 [N, 1 + K]: each image's own, then its negatives.
        log_normalizers: log Z of the student's direction and of the teacher's, float [2], as `crd_log_normalizers`
            gives them for the first batch of a training; None for those of this batch, as constants.
        temperature: what the cosines are divided by, above 0.
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
        odds = products(embeddings, memory, candidates) / temperature - log_normalizer - math.log(share + EPSILON)
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
    """log Z of both directions, float [2]: Z is n times the mean of exp(embedding·row / temperature).

    Args:
        student, teacher, student_memory, teacher_memory, candidates, temperature: as of `crd`.
    """
    logarithms = [
        (products(embeddings, memory, candidates) / temperature).flatten().logsumexp(dim=0)
        for embeddings, memory in ((student, teacher_memory), (teacher, student_memory))
    ]
    return torch.stack(logarithms) + math.log(len(student_memory) / candidates.numel())


def products(embeddings: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
    """The products of embeddings [N, D] with their candidates' rows of a memory [n, D]: [N, 1 + K]."""
    embeddings, memory = wide(embeddings), wide(memory)
    # Where a good part of the memory is asked for, all of it is multiplied in one go, and products are picked: fetching
    # a row for each pair takes ten times as long (at 16,384 negatives and 64 images, half a gigabyte of rows). The
    # copy is for the gradient: the memory itself changes before that is worked out.
    if len(memory) <= 32 * candidates.shape[1]:
        return (embeddings @ memory.clone().t()).gather(1, candidates)
    return torch.bmm(F.embedding(candidates, memory), embeddings.unsqueeze(2)).squeeze(2)


class CRD(Distillation):
    """ce_weight·CE + weight·CRD, with the memory of embeddings and the two projections that make them.

    Both networks' embeddings are projected to `dimensions` and scaled to length 1; both projections learn. Z is
    measured on the first batch of the training, and stays. Once a batch is scored, its rows of the memory become
    `momentum`·row + (1 − `momentum`)·embedding, scaled to length 1 (in evaluation mode they stay as they are). The
    term may rise for some epochs, while the memory fills with embeddings that are still alike; then it falls.

    Which negatives an image gets depends on the run's seed, the epoch and the image alone: neither on what else is in
    its batch nor on whatever draws random numbers beside it, so that a training that goes on from a checkpoint sees
    the same ones. As in the authors' code each image gets its own, any set of `negatives` images of other classes being
    as likely as any other; where there are fewer of them than `negatives`, they are drawn with replacement.

    Args:
        negatives: K, for each image.
        contrast_temperature: what the cosines are divided by; a sweep over `loss.temperature`, the logits', is not
            meant for it.
        momentum: of a row of the memory, from 0 to below 1.
        dimensions: of the embeddings that are compared.

    Raises:
        ValueError: a value outside of its range.
    """

    name = "crd"
    roles = ("embedding",)
    one_label = True
    student_memory: Tensor
    teacher_memory: Tensor
    log_normalizers: Tensor
    seed: Tensor
    positions: Tensor
    by_class: Tensor
    class_start: Tensor
    class_size: Tensor

    def __init__(
        self,
        weight: float = 0.8,
        ce_weight: float = 1,
        negatives: int = 16384,
        contrast_temperature: float = 0.07,
        momentum: float = 0.5,
        dimensions: int = 128,
    ) -> None:
        super().__init__(weight, ce_weight)
        check_number("loss.negatives", negatives, low=1, integer=True)
        check_number("loss.contrast_temperature", contrast_temperature, above=0)
        check_number("loss.momentum", momentum, low=0, below=1)
        check_number("loss.dimensions", dimensions, low=1, integer=True)
        self.negatives = negatives
        self.contrast_temperature = contrast_temperature
        self.momentum = momentum
        self.dimensions = dimensions

    def fit_to(self, student: Outputs, teacher: Outputs, positions: Tensor, labels: Tensor) -> None:
        """Make the projections and the memory.

        Raises:
            ValueError: all images are of one class, so that there are no negatives.
        """
        assert student.embedding is not None and teacher.embedding is not None
        by_class = labels.argsort(stable=True)
        sizes = labels.bincount()
        if int(sizes.max()) == len(labels):
            raise ValueError("loss=CRD: the training images are of one class; images of two or more are accepted")
        self.student_projection = nn.Linear(student.embedding.shape[1], self.dimensions)
        self.teacher_projection = nn.Linear(teacher.embedding.shape[1], self.dimensions)
        for memory in ("student_memory", "teacher_memory"):  # rows of about length 1
            bound = math.sqrt(3 / self.dimensions)
            self.register_buffer(memory, torch.empty(len(positions), self.dimensions).uniform_(-bound, bound))
        self.register_buffer("log_normalizers", torch.zeros(2))  # 0: not measured yet
        self.register_buffer("seed", torch.randint(2**62, ()))
        # Where the images of each row's class are among all rows in the order of classes. The data says it.
        for name, known in (
            ("positions", positions),
            ("by_class", by_class),
            ("class_start", (sizes.cumsum(dim=0) - sizes)[labels]),
            ("class_size", sizes[labels]),
        ):
            self.register_buffer(name, known.clone(), persistent=False)

    def candidates(self, indices: Tensor, epoch: int) -> Tensor:
        """Rows of the memory for images of the training split: each one's own, then negatives, int64 [N, 1 + K]."""
        rows = torch.searchsorted(self.positions, indices)
        drawn = np.empty((len(rows), self.negatives), dtype=np.int64)
        others = (len(self.positions) - self.class_size[rows]).tolist()
        # NumPy draws some of many in a third of the time that it takes PyTorch to shuffle them all.
        seed = int(self.seed)
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
            self.remember(candidates[:, 0], of_student.detach(), of_teacher.detach())
        return term

    def remember(self, rows: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Move rows of the memory, int64 [N], towards new embeddings [N, dimensions]."""
        for memory, embeddings in ((self.student_memory, student), (self.teacher_memory, teacher)):
            memory[rows] = F.normalize(self.momentum * memory[rows] + (1 - self.momentum) * embeddings, dim=1)
