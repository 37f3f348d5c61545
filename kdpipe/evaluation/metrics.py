"""Metrics of predictions, from logits [N, classes] and labels int64 [N] of the N images of a split.

Probabilities are softmax(logits). Everything is computed in float64 on the CPU.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import binned_statistic
from sklearn.metrics import brier_score_loss, confusion_matrix, f1_score, recall_score, top_k_accuracy_score
from torch import Tensor

BINS = 15  # of confidence, as in Guo et al. 2017
TOP = 5
TEMPERATURES = (0.05, 20)


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`accuracy` (a fraction); `loss`, the negative log-likelihood in nats; `brier`, the squared distance of the
    probabilities from the label, summed over classes (0 … 2; Brier 1950); `ece`, the expected calibration error (a
    fraction; Guo et al. 2017, https://arxiv.org/abs/1706.04599); those of `class_means`; and `top5_accuracy` for more
    than five classes."""
    probabilities = logits.double().softmax(dim=1).numpy()
    classes = np.arange(logits.shape[1])
    found = {
        "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
        "loss": negative_log_likelihood(logits, labels),
        "brier": float(brier_score_loss(labels.numpy(), probabilities, labels=classes, scale_by_half=False)),
        "ece": reliability(logits, labels).error,
    }
    found |= class_means(labels, logits.argmax(dim=1))
    if len(classes) > TOP:
        scores = logits.double().numpy()
        found["top5_accuracy"] = float(top_k_accuracy_score(labels.numpy(), scores, k=TOP, labels=classes))
    return found


def class_means(labels: Tensor, predicted: Tensor) -> dict[str, float]:
    """Fractions that count all classes alike: `balanced_accuracy`, the mean accuracy over the classes with images,
    and `macro_f1`, the mean F1 score over the classes that are a label or a prediction. They are scikit-learn's
    `balanced_accuracy_score` and `f1_score`. Both arguments are int64 [N]."""
    truth, answers = labels.numpy(), predicted.numpy()
    # balanced_accuracy_score is this recall, and warns of predicted classes that have no images.
    recall = recall_score(truth, answers, labels=np.unique(truth), average="macro")
    return {"balanced_accuracy": float(recall), "macro_f1": float(f1_score(truth, answers, average="macro"))}


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """The mean of −log softmax(logits / T) at the label, in nats."""
    return float(F.cross_entropy(logits.double() / temperature, labels))


@dataclass(frozen=True)
class Reliability:
    """Confidence (the predicted class's probability) and accuracy, in 15 bins of equal width."""

    confidence: NDArray[np.float64]  # the mean in each bin; NaN in an empty one
    accuracy: NDArray[np.float64]  # likewise
    share: NDArray[np.float64]  # of the images in each bin

    @property
    def error(self) -> float:
        """The expected calibration error: the mean gap between the two, bins weighted by their share."""
        return float(np.nansum(self.share * np.abs(self.confidence - self.accuracy)))


def reliability(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Reliability:
    """How well the probability of a prediction, softmax(logits / T), matches how often it is correct."""
    confidences, answers = (logits.double() / temperature).softmax(dim=1).max(dim=1)
    right = (answers == labels).double().numpy()
    (confidence, accuracy), _, _ = binned_statistic(
        confidences.numpy(), [confidences.numpy(), right], "mean", BINS, range=(0, 1)
    )
    count, _, _ = binned_statistic(confidences.numpy(), None, "count", BINS, range=(0, 1))
    return Reliability(confidence, accuracy, count / len(labels))


def teacher_agreement(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """How close a student's logits are to its teacher's: `agreement` (the share of images with the same prediction),
    `kl` (KL(teacher ‖ student) at temperature 1, nats, averaged over the images), and `agreement_where_wrong`, the
    agreement on the images that the teacher gets wrong, if any."""
    same = student.argmax(dim=1) == teacher.argmax(dim=1)
    wrong = teacher.argmax(dim=1) != labels
    log_student, log_teacher = (logits.double().log_softmax(dim=1) for logits in (student, teacher))
    found = {
        "agreement": float(same.double().mean()),
        "kl": float(F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)),
    }
    return found | ({"agreement_where_wrong": float(same[wrong].double().mean())} if wrong.any() else {})


def scaling_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The temperature T at which softmax(logits / T) fits the labels best (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599): the smallest negative log-likelihood. It changes no prediction. None if the
    optimum is not within 0.05 … 20: all predictions are correct, or worthless."""
    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda power: negative_log_likelihood(logits, labels, np.exp(power)), bounds=(low, high), method="bounded"
    )
    return float(np.exp(found.x)) if low + 0.05 < found.x < high - 0.05 else None


def confusion(logits: Tensor, labels: Tensor) -> NDArray[np.int64]:
    """A confusion matrix, numbers of images [classes, classes]: rows are labels, columns predictions."""
    classes = np.arange(logits.shape[1])
    counted: NDArray[np.int64] = confusion_matrix(labels.numpy(), logits.argmax(dim=1).numpy(), labels=classes)
    return counted


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of two networks' probabilities for each image, float64 [N], in nats (0 … log 2; Lin
    1991); symmetric."""
    one, other = (logits.double().softmax(dim=1) for logits in (student, teacher))
    middle = (one + other) / 2
    return (torch.special.entr(middle) - (torch.special.entr(one) + torch.special.entr(other)) / 2).sum(dim=1)
