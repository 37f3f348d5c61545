"""scikit-learn's handwritten digits (Alpaydin & Kaynak 1998), which come with the library."""

import torch
from sklearn.datasets import load_digits

from kdpipe.data.dataset import Source


def digits() -> Source:
    """1,797 images, uint8 [N, 1, 8, 8], 10 classes, no splits of their own."""
    content = load_digits()
    pixels = torch.from_numpy(content.images).unsqueeze(1)  # 0 … 16
    return Source(
        images=(pixels * 255 / 16).round().to(torch.uint8),
        labels=torch.from_numpy(content.target).long(),
        class_names=tuple(str(name) for name in content.target_names),
    )
