"""Several teachers as one."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from kdpipe.models.classifier import Classifier
from kdpipe.settings.values import LARGE_TEMPERATURE


class Ensemble(nn.Module):
    """The mean of several networks' soft targets (Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531):
    logits z with softmax(z / T) = Σ share · softmax(member's logits / T).

    Its members take the same raw images, each with its own preprocessing; used in place of a `Classifier`.

    Args:
        shares: weight of each member in the mean, from 0; divided by their sum.
        temperature: T, above 0, that of the loss: at any other the soft targets are not exactly the mean.
    """

    def __init__(self, members: Sequence[Classifier], shares: Sequence[float], temperature: float) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperature = temperature
        weights = torch.tensor(shares, dtype=torch.float32)
        self.shares = nn.Buffer(weights / weights.sum(), persistent=False)

    @property
    def network(self) -> Self:
        """The module with the weights, as for a classifier."""
        return self

    def extra_repr(self) -> str:
        # Part of the key of cached answers, which are others in that form.
        form = ", in a form that does not cancel" if self.temperature > LARGE_TEMPERATURE else ""
        return f"shares={self.shares.tolist()}, temperature={self.temperature}{form}"

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes], float32, of uint8 images [N, C, H, W]."""
        logits = torch.stack([member(images).float() for member in self.members])
        if self.temperature > LARGE_TEMPERATURE and logits.abs().amax() < self.temperature:
            return self._mean_at_large_temperature(logits)
        soft_targets = (logits / self.temperature).log_softmax(dim=-1) + self.shares.log().view(-1, 1, 1)
        return self.temperature * soft_targets.logsumexp(dim=0)

    def _mean_at_large_temperature(self, logits: Tensor) -> Tensor:
        """The same for logits [members, N, classes], but for a number that is added to all logits of an image.

        In the usual form that number is −T·log(classes), which leaves few of float32's digits to the logits.
        """

        def softened_mean(values: Tensor, weights: Tensor | float, dim: int) -> Tensor:
            """T·log(mean of e^(values / T)), with the values' own mean first."""
            mean = (values * weights).sum(dim=dim, keepdim=True)
            shifts = (values - mean) / self.temperature
            return mean + self.temperature * (shifts.expm1() * weights).sum(dim=dim, keepdim=True).log1p()

        log_targets = logits - softened_mean(logits, 1 / logits.shape[2], dim=2)
        return softened_mean(log_targets, self.shares.view(-1, 1, 1), dim=0).squeeze(0)
