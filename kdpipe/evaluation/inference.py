"""Running a network over the images of a split."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.data import ImageDataset
from kdpipe.evaluation.metrics import class_means
from kdpipe.models.classifier import eval_mode
from kdpipe.system.hardware import Hardware
from kdpipe.system.progress import progress


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageDataset, split: str, hardware: Hardware) -> dict[str, float]:
    """`accuracy` (a fraction) and `loss` (cross-entropy with the labels), averaged over the images of a split, and the
    `class_means` of the predictions."""
    totals = torch.zeros(2, device=hardware.device)  # correct predictions, loss
    answers = []
    with eval_mode(model):
        for batch, logits in _batched_logits(model, data, split, hardware):
            labels = data.labels[batch].to(hardware.device)
            predicted = logits.argmax(dim=1)
            answers.append(torch.stack([labels, predicted]))
            totals[0] += (predicted == labels).sum()
            totals[1] += F.cross_entropy(logits, labels, reduction="sum")
    correct, loss = hardware.sum(totals).tolist()
    means = {"accuracy": correct / len(data.splits[split]), "loss": loss / len(data.splits[split])}
    return means | class_means(*torch.cat(hardware.gather(torch.cat(answers, dim=1).cpu()), dim=1))


def logits_of(model: nn.Module, data: ImageDataset, split: str, hardware: Hardware) -> Tensor:
    """Logits float32 [n, classes] of the n images of a split, in its order, on the CPU."""
    with eval_mode(model):
        mine = torch.cat([logits for _, logits in _batched_logits(model, data, split, hardware)]).cpu()
    parts = hardware.gather(mine)
    logits = torch.empty(len(data.splits[split]), mine.shape[1])
    for rank, part in enumerate(parts):
        logits[rank :: hardware.processes] = part
    return logits


def _batched_logits(
    model: nn.Module, data: ImageDataset, split: str, hardware: Hardware
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch of this process's shard of a split, its positions [n] and the logits, float32 [n, classes]."""
    mine = hardware.shard(data.splits[split])
    with progress(f"evaluating on {split}", len(mine)) as bar:
        for batch in mine.split(hardware.inference_batch_size):
            with torch.inference_mode(), hardware.autocast():
                logits = model(data.images[batch].to(hardware.device)).float()
            yield batch, logits
            bar.advance(len(batch))
