"""Deep mutual learning: Zhang, Xiang, Hospedales & Lu 2018, https://arxiv.org/abs/1706.00384."""

from torch import Tensor, nn

from kdpipe.losses.base import Parts, WeightedLoss
from kdpipe.losses.kd import kd
from kdpipe.losses.outputs import Outputs
from kdpipe.settings.values import Positive, checked


class Mutual(WeightedLoss):
    """Two students and no teacher, each learning from the labels and from the other's predictions:
    CE(student) + CE(peer) + weight·(KL(peer ‖ student) + KL(student ‖ peer)).

    The second student takes the teacher's place (`model@teacher`) and learns in the same step; no gradient flows
    through the predictions that serve as targets. (In the paper the two take turns, which would cost a second pass of
    both in each step.) Its weights are part of this module, so that the optimizer and checkpoints include them.

    Raises:
        ConfigError: a weight not above 0.
    """

    name = "mutual"
    teacher_learns = True

    @checked
    def __init__(self, weight: Positive) -> None:
        super().__init__(weight, ce_weight=1)
        self.peer: nn.Module = nn.Identity()

    def adopt(self, peer: nn.Module) -> None:
        self.peer = peer

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor, indices: Tensor, epoch: int) -> Parts:
        assert teacher is not None, "mutual learning needs two networks"
        ce, peer_ce = (self.cross_entropy(network.logits, labels) for network in (student, teacher))
        term = kd(student.logits, teacher.logits.detach(), temperature=1)
        peer_term = kd(teacher.logits, student.logits.detach(), temperature=1)
        loss = ce + self.weight * term + peer_ce + self.weight * peer_term
        return {"loss": loss, "ce": ce, self.name: term, "peer_ce": peer_ce, f"peer_{self.name}": peer_term}
