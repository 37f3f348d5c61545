"""Accuracy and loss of a network on a split."""

import torch
import torch.nn.functional as F
from torch import nn

from kdpipe.data import ImageDataset
from kdpipe.progress import progress

BATCH_SIZE = 250


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: ImageDataset, split: str, device: torch.device, autocast: torch.autocast
) -> dict[str, float]:
    """`accuracy` (a fraction) and `loss` (cross-entropy with the labels), averaged over the images of a split."""
    was_training = model.training
    model.eval()
    correct = torch.zeros((), device=device)
    loss = torch.zeros((), device=device)
    positions = data.splits[split]
    with progress(f"evaluating on {split}", len(positions)) as bar:
        for batch in positions.split(BATCH_SIZE):
            labels = data.labels[batch].to(device)
            with autocast:
                logits = model(data.images[batch].to(device)).float()
            correct += (logits.argmax(dim=1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            bar.advance(len(batch))
    model.train(was_training)
    return {"accuracy": correct.item() / len(positions), "loss": loss.item() / len(positions)}
