"""MixUp (Zhang et al. 2018, https://arxiv.org/abs/1710.09412) and CutMix (Yun et al. 2019,
https://arxiv.org/abs/1905.04899). Student and teacher see the same mixed images ("consistent teaching", Beyer et al.
2022, https://arxiv.org/abs/2106.05237)."""

import random

import torch
from torch import Tensor
from torchvision.transforms import v2

from kdpipe.system.randomness import derive_seed


class Mixing:
    """torchvision's MixUp or CutMix of the images of a batch; with both, each step picks one at random. `mixup` and
    `cutmix` are the alphas of Beta(alpha, alpha), from which the mixing ratio is drawn; None turns one off. The ratio
    depends on the seed, the epoch and the step only, so that all arms of a seed see the same images."""

    def __init__(self, mixup: float | None, cutmix: float | None, num_classes: int, seed: int) -> None:
        self.seed = seed
        self.ways = [
            way(alpha=float(alpha), num_classes=num_classes)
            for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha is not None
        ]

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Mix uint8 images [N, C, H, W] with labels int64 [N], into images, float [N, C, H, W] from 0 to 255, and soft
        labels, float [N, classes]."""
        seed = derive_seed(self.seed, f"mixing/{epoch}/{step}")
        way = random.Random(seed).choice(self.ways)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's global CPU generator
            torch.random.default_generator.manual_seed(seed)
            mixed: tuple[Tensor, Tensor] = way(images.float(), labels)
        return mixed
