"""Accuracy and loss of a network on a split."""

import torch
import torch.nn.functional as F
from torch import nn

from kdpipe.data import ImageDataset
from kdpipe.hardware import Hardware
from kdpipe.progress import progress


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageDataset, split: str, hardware: Hardware) -> dict[str, float]:
    """`accuracy` (a fraction) and `loss` (cross-entropy with the labels), averaged over the images of a split."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, device=hardware.device)  # correct answers, loss
    positions = data.splits[split]
    mine = hardware.share(positions)
    with progress(f"evaluating on {split}", len(mine)) as bar:
        for batch in mine.split(hardware.batch_without_gradients):
            labels = data.labels[batch].to(hardware.device)
            with hardware.autocast():
                logits = model(data.images[batch].to(hardware.device)).float()
            totals[0] += (logits.argmax(dim=1) == labels).sum()
            totals[1] += F.cross_entropy(logits, labels, reduction="sum")
            bar.advance(len(batch))
    model.train(was_training)
    correct, loss = hardware.sum(totals).tolist()
    return {"accuracy": correct / len(positions), "loss": loss / len(positions)}
