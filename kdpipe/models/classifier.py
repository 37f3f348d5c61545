"""A network together with the preprocessing that its weights were trained with."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop

from kdpipe.settings.errors import ConfigError, as_typed
from kdpipe.settings.identity import FIRST_RESIZING
from kdpipe.settings.values import Interpolation, Number, Positive, PositiveInt, PositiveShare, Resize, checked
from kdpipe.system.padding import cut_out, is_padded


class Classifier(nn.Module):
    """From raw images to logits: resize, scale to [0, 1], normalise, `network`.

    Args:
        network: from float [N, len(mean), image_size, image_size] to logits [N, classes].
        image_size: height and width in pixels; other images are resized (antialiased).
        mean, std: of each channel, for pixels in [0, 1].
        freeze: "none", or "backbone": only the network's head is trained, and the backbone's BatchNorm and dropout
            stay in evaluation mode.
        resize: "squeeze" both sides to the same length, or the shorter side with the ratio kept, of which the centre
            is "crop"ped.
        interpolation: of resizing.
        crop_pct: the centre that is kept, as a share of the length that images are resized to.

    Raises:
        ConfigError: a value outside its range, or "backbone" for a network without `head_name`.
    """

    @checked
    def __init__(
        self,
        network: nn.Module,
        image_size: PositiveInt,
        mean: Sequence[Number],
        std: Sequence[Positive],
        freeze: Literal["none", "backbone"] = "none",
        resize: Resize = "squeeze",
        interpolation: Interpolation = "bilinear",
        crop_pct: PositiveShare = 1,
    ) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ConfigError("std", std, f"as many values as in mean={as_typed(mean)}")
        self.network = network.to(memory_format=torch.channels_last)
        self.image_size = image_size
        self.resize, self.interpolation, self.crop_pct = resize, interpolation, crop_pct
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.frozen_backbone = freeze == "backbone"
        if self.frozen_backbone:
            if not hasattr(network, "head_name"):
                raise ConfigError("freeze", freeze, "none", f"{type(network).__name__} has no head_name")
            network.requires_grad_(False)
            self.head.requires_grad_(True)

    def extra_repr(self) -> str:
        """The preprocessing, which predictions depend on as much as on the weights."""
        size = f"image_size={self.image_size}, mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
        if self._resizes_as_first:
            return size
        return f"{size}, resize={self.resize}, interpolation={self.interpolation}, crop_pct={self.crop_pct}"

    @property
    def _resizes_as_first(self) -> bool:
        return {name: getattr(self, name) for name in FIRST_RESIZING} == FIRST_RESIZING

    @property
    def head(self) -> nn.Module:
        """The part that stays trainable when the backbone is frozen."""
        return self.network.get_submodule(str(self.network.head_name))

    def preprocess(self, images: Tensor) -> Tensor:
        """From uint8 images [N, C, H, W] to the network's input; one-channel images are repeated for all channels, and
        photos of several sizes, which are padded (see `system.padding`), are resized one by one."""
        channels = len(self.mean)
        if channels == 3 and is_padded(images):
            shape = (len(images), self.image_size, self.image_size, channels)
            pixels = self.mean.new_empty(shape).permute(0, 3, 1, 2)  # channels-last
            for positions, photos in cut_out(images):
                if len(positions) == len(images):
                    return self.preprocess(photos)
                pixels[positions] = self.preprocess(photos)
            return pixels
        if images.shape[1] == 1:
            images = images.expand(-1, channels, -1, -1)
        elif images.shape[1] != channels:
            raise ValueError(f"images have {images.shape[1]} channels; expected {channels} or 1")
        if not self._resizes_as_first:
            pixels = (self._resized(images) / 255 - self.mean) / self.std
            return pixels.contiguous(memory_format=torch.channels_last)
        pixels = images.float() / 255
        size = (self.image_size, self.image_size)
        if max(pixels.shape[-2:]) > self.image_size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        # Equivalent before enlarging, and cheaper.
        pixels = (pixels - self.mean) / self.std
        if pixels.shape[-2:] != size:
            pixels = enlarge(pixels, self.image_size)
        return pixels.contiguous(memory_format=torch.channels_last)

    def _resized(self, images: Tensor) -> Tensor:
        """uint8 images [N, C, H, W] as float [N, C, image_size, image_size], from 0 to 255, as torchvision's and timm's
        transforms resize them: pixels are rounded, and cropped afterwards."""
        height, width = images.shape[-2:]
        length = math.floor(self.image_size / self.crop_pct + 1e-6)  # 224 / (224 / 232) is less than 232
        size = (length, length)
        if self.resize == "crop":
            shorter = min(height, width)
            size = (int(length * height / shorter), int(length * width / shorter))
        if size == (height, width):
            return center_crop(images, [self.image_size, self.image_size]).float()
        pixels = F.interpolate(images.float(), size=size, mode=self.interpolation, antialias=True)
        return center_crop(pixels.clamp(0, 255).round(), [self.image_size, self.image_size])

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of uint8 images [N, C, H, W]."""
        return self.network(self.preprocess(images))

    def features(self, images: Tensor) -> Tensor:
        """The head's inputs, float [N, …], for uint8 images [N, C, H, W]."""
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
        """Whether the head is the last layer, so that its inputs determine the logits; tried on a few images."""
        with eval_mode(self):
            features, logits = self._features_and_logits(images)
            answer = self.head(features)
        return logits.shape == answer.shape and torch.allclose(logits, answer, rtol=1e-3, atol=1e-5)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_backbone:
            self.network.eval()
            self.head.train(mode)
        return self


def enlarge(pixels: Tensor, size: int) -> Tensor:
    """Bilinear interpolation of float [N, C, H, W] to [N, C, size, size], channels-last; enlarging cannot alias.

    First the width, then the height with each row as one long vector: on a CPU this takes half the time of both at
    once, with the same result but for rounding.
    """
    if torch.compiler.is_exporting():  # strides become a Gather, which makes an ONNX file twice as slow
        return F.interpolate(pixels, size=(size, size), mode="bilinear")
    count, channels, height, _ = pixels.shape
    wide = F.interpolate(pixels, size=(height, size), mode="bilinear")
    row = size * channels
    rows = wide.permute(0, 2, 3, 1).contiguous()
    # Strides that PyTorch recognises as channels-last, although a side is 1.
    vectors = rows.as_strided((count, row, height, 1), (height * row, 1, row, row))
    tall = F.interpolate(vectors, size=(size, 1), mode="bilinear")
    return tall.permute(0, 2, 3, 1).reshape(count, size, size, channels).permute(0, 3, 1, 2)


def size_mb(module: nn.Module) -> float:
    """Size of the saved parameters and buffers in MB (2²⁰ bytes)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()) / 2**20


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode inside the block, and back into the mode they were in after it."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was_training in zip(models, modes, strict=True):
            model.train(was_training)
