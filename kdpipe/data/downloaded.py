"""The data sets that torchvision downloads into a folder and checks."""

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from kdpipe.data.dataset import Source


def cifar10(root: str) -> Source:
    """uint8 [60000, 3, 32, 32], 10 classes, of which 10,000 are for testing (Krizhevsky 2009)."""
    return _both_parts(CIFAR10, root)


def cifar100(root: str) -> Source:
    """uint8 [60000, 3, 32, 32], 100 classes, of which 10,000 are for testing (Krizhevsky 2009)."""
    return _both_parts(CIFAR100, root)


def fashion_mnist(root: str) -> Source:
    """uint8 [70000, 1, 28, 28], 10 classes, of which 10,000 are for testing (Xiao et al. 2017)."""
    return _both_parts(FashionMNIST, root)


def _both_parts(dataset: type[CIFAR10 | FashionMNIST], root: str) -> Source:
    try:
        parts = [dataset(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # a torn file raises whatever its reader stumbles over
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"dataset.root={root}: {dataset.__name__} is not in {Path(root).resolve()}, or torn, and "
            f"cannot be downloaded ({reason}); put torchvision's files there, or use dataset=image_folder for "
            f"images of your own"
        ) from error
    images = np.concatenate([np.asarray(part.data) for part in parts])
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return Source(
        images=torch.from_numpy(np.ascontiguousarray(images)),
        labels=torch.cat([torch.as_tensor(part.targets) for part in parts]).long(),
        class_names=tuple(parts[0].classes),
        given={"test": torch.arange(len(parts[0]), len(images))},
    )
