"""Data sets that torchvision downloads into a folder and verifies."""

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from kdpipe.data.dataset import Source
from kdpipe.settings.errors import ConfigError, flat


def cifar10(root: str) -> Source:
    """uint8 [60000, 3, 32, 32], 10 classes, of which 10,000 are test images (Krizhevsky 2009)."""
    return _both_parts(CIFAR10, root)


def cifar100(root: str) -> Source:
    """uint8 [60000, 3, 32, 32], 100 classes, of which 10,000 are test images (Krizhevsky 2009)."""
    return _both_parts(CIFAR100, root)


def fashion_mnist(root: str) -> Source:
    """uint8 [70000, 1, 28, 28], 10 classes, of which 10,000 are test images (Xiao et al. 2017)."""
    return _both_parts(FashionMNIST, root)


def _both_parts(dataset: type[CIFAR10 | FashionMNIST], root: str) -> Source:
    try:
        parts = [dataset(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # readers of damaged files raise all kinds
        problem = (
            f"{dataset.__name__} is missing from {Path(root).resolve()} or damaged, and cannot be downloaded "
            f"({flat(error, 300)})"
        )
        files = "torchvision's files there, or dataset=image_folder for images of your own"
        raise ConfigError("root", root, files, problem) from error
    images = np.concatenate([np.asarray(part.data) for part in parts])
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return Source(
        images=torch.from_numpy(np.ascontiguousarray(images)),
        labels=torch.cat([torch.as_tensor(part.targets) for part in parts]).long(),
        class_names=tuple(parts[0].classes),
        given={"test": torch.arange(len(parts[0]), len(images))},
    )
