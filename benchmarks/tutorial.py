"""The tutorial's loop, written from its description: images decoded and resized one by one in Python in each epoch, the
teacher asked about every batch anew."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

IMAGE_SIZE, BATCH_SIZE, ALPHA, TEMPERATURE = 128, 100, 0.5, 5.0


class Images(Dataset):
    """As torchvision's CIFAR-10 gives them: arrays in memory, a PIL image and its transforms for each."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).numpy()
        self.labels = labels.tolist()
        steps = [transforms.ToPILImage(), transforms.Resize((IMAGE_SIZE, IMAGE_SIZE)), transforms.ToTensor()]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    teacher: nn.Module | None = None,
) -> Iterator[int]:
    """One epoch over uint8 images [N, C, H, W]; gives the number of images after each step."""
    model.train()
    if teacher:
        teacher.eval()
    for pixels, targets in DataLoader(Images(images, labels), batch_size=BATCH_SIZE, shuffle=True):
        pixels, targets = pixels.to(device), targets.to(device)
        optimizer.zero_grad()
        logits = model(pixels)
        loss = F.cross_entropy(logits, targets)
        if teacher:
            with torch.no_grad():
                soft_targets = F.softmax(teacher(pixels) / TEMPERATURE, dim=1)
            distance = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), soft_targets)
            loss = (1 - ALPHA) * loss + ALPHA * TEMPERATURE**2 * distance
        loss.backward()
        optimizer.step()
        loss.item()
        yield len(targets)
