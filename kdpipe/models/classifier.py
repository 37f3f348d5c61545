"""A network with the preprocessing that its weights were trained with."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.settings.checks import check_choice, check_number, check_numbers


class Classifier(nn.Module):
    """From raw images to logits: resize, scale to [0, 1], normalise, `network`.

    Args:
        network: from float [N, len(mean), image_size, image_size] to logits [N, classes].
        image_size: side in pixels; images of another size are resized (bilinear, antialiased).
        mean, std: of each channel, on the scale of [0, 1].
        freeze: "none", or "backbone": only the network's head is trained, and the backbone's BatchNorm and dropout
            stay as in evaluation.
        key: where in the config this network stands, for messages ("model" or "teacher").

    Raises:
        ValueError: a value outside of its range, or "backbone" for a network that names no head.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        freeze: str = "none",
        key: str = "model",
    ) -> None:
        super().__init__()
        check_number(f"{key}.image_size", image_size, low=1, integer=True)
        check_choice(f"{key}.freeze", freeze, ["none", "backbone"])
        check_numbers(f"{key}.mean", mean)
        check_numbers(f"{key}.std", std, above=0)
        if len(mean) != len(std):
            raise ValueError(f"{key}.std={list(std)}: as many values as in {key}.mean={list(mean)} are accepted")
        self.network = network.to(memory_format=torch.channels_last)
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.frozen_backbone = freeze == "backbone"
        if self.frozen_backbone:
            if not hasattr(network, "head_name"):
                raise ValueError(f"{key}.freeze=backbone: {type(network).__name__} names no head; none is accepted")
            network.requires_grad_(False)
            self.head.requires_grad_(True)

    def extra_repr(self) -> str:
        """The preprocessing, which answers depend on as on the weights."""
        return f"image_size={self.image_size}, mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"

    @property
    def head(self) -> nn.Module:
        """The part that stays trainable when the backbone is frozen."""
        return self.network.get_submodule(str(self.network.head_name))

    def preprocess(self, images: Tensor) -> Tensor:
        """From uint8 images [N, C, H, W] to the network's input; one-channel images are repeated for all channels."""
        channels = len(self.mean)
        if images.shape[1] == 1:
            images = images.expand(-1, channels, -1, -1)
        elif images.shape[1] != channels:
            raise ValueError(f"images of {images.shape[1]} channels, but the network takes {channels} (or 1)")
        pixels = images.float() / 255
        size = (self.image_size, self.image_size)
        if max(pixels.shape[-2:]) > self.image_size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        # Before images are enlarged it is the same, and costs less.
        pixels = (pixels - self.mean) / self.std
        if pixels.shape[-2:] != size:
            pixels = enlarge(pixels, self.image_size)
        return pixels.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of uint8 images [N, C, H, W]."""
        logits: Tensor = self.network(self.preprocess(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """What the head is given, float [N, …], for uint8 images [N, C, H, W]."""
        return self._features_and_logits(images)[0]

    def _features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        caught: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda head, inputs: caught.append(inputs[0]))
        try:
            logits = self(images)
        finally:
            hook.remove()
        return caught[-1], logits

    @torch.no_grad()
    def ends_with_head(self, images: Tensor) -> bool:
        """Whether nothing comes after the head, so that the features are all it takes; told from a few images."""
        was_training = self.training
        self.eval()
        features, logits = self._features_and_logits(images)
        answer = self.head(features)
        self.train(was_training)
        return logits.shape == answer.shape and torch.allclose(logits, answer, rtol=1e-3, atol=1e-5)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_backbone:
            self.network.eval()
            self.head.train(mode)
        return self


def enlarge(pixels: Tensor, size: int) -> Tensor:
    """Bilinear interpolation of float [N, C, H, W] to [N, C, size, size], channels-last; what is enlarged cannot alias.

    First the width, then the height with each row as one long vector: on a CPU that takes half of the time of both at
    once, and gives the same but for rounding.
    """
    if torch.compiler.is_exporting():  # strides become a Gather, and an ONNX file takes twice the time
        return F.interpolate(pixels, size=(size, size), mode="bilinear")
    count, channels, height, _ = pixels.shape
    wide = F.interpolate(pixels, size=(height, size), mode="bilinear")
    row = size * channels
    rows = wide.permute(0, 2, 3, 1).contiguous()
    # Strides that PyTorch takes for channels-last, though a side is 1.
    vectors = rows.as_strided((count, row, height, 1), (height * row, 1, row, row))
    tall = F.interpolate(vectors, size=(size, 1), mode="bilinear")
    return tall.permute(0, 2, 3, 1).reshape(count, size, size, channels).permute(0, 3, 1, 2)


def size_mb(module: nn.Module) -> float:
    """Parameters and buffers, as saved, in MB of 2²⁰ bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()) / 2**20
