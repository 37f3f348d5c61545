"""Deep mutual learning: Zhang, Xiang, Hospedales & Lu 2018, https://arxiv.org/abs/1706.00384."""

from torch import Tensor, nn

from kdpipe.losses.base import Distillation, cross_entropy
from kdpipe.losses.kd import kd
from kdpipe.losses.outputs import Outputs
from kdpipe.settings.checks import check_number


class Mutual(Distillation):
    """Two students, no teacher: each learns from the labels and from what the other says,
    CE(student) + KL(peer ‖ student) + CE(peer) + KL(student ‖ peer).

    The second student stands where a teacher would (`model@teacher`) and learns in the same step; each takes what the
    other says as it is, without a gradient. (The paper lets them take turns; a second pass of both in each step would
    be the price.) Its weights are part of this module: the optimizer and checkpoints have them with those of the loss.

    Args:
        weight: of the divergences.
    """

    name = "mutual"
    teacher_learns = True

    def __init__(self, weight: float) -> None:
        check_number("loss.weight", weight, above=0)
        super().__init__(weight, ce_weight=1)
        self.peer: nn.Module = nn.Identity()  # set when it is built

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        assert teacher is not None, "mutual learning takes two"
        ce, peer_ce = cross_entropy(student.logits, labels), cross_entropy(teacher.logits, labels)
        term = kd(student.logits, teacher.logits.detach(), temperature=1)
        peer_term = kd(teacher.logits, student.logits.detach(), temperature=1)
        loss = ce + self.weight * term + peer_ce + self.weight * peer_term
        return {"loss": loss, "ce": ce, self.name: term, "peer_ce": peer_ce, f"peer_{self.name}": peer_term}
