"""Which axes of a feature map are its channels, its height and its width: found by trying, not by counting axes.

A tensor with four axes may be [N, C, H, W], [N, H, W, C] as in Swin and MambaOut, or no map at all, such as attention
weights [N, heads, L, L]. A network that sees a wider image shows which axis is the width, and a taller one the height.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Axes = tuple[int, ...]  # those of [N, C, H, W] in a tensor, in this order
CHANNELS_FIRST: Axes = (0, 1, 2, 3)
CHANNELS_LAST: Axes = (0, 3, 1, 2)
AXES = {"NCHW": CHANNELS_FIRST, "NHWC": CHANNELS_LAST}
MORE_PIXELS = 64  # at least, so that maps of a thirty-second of the image's size change, too
BY_DEFINITION = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)


def axes_by_definition(module: nn.Module, of_input: bool) -> Axes | None:
    """The axes of what a layer of PyTorch takes (`of_input`) or returns, where its documentation fixes them."""
    while isinstance(module, nn.Sequential) and len(module) > 0:
        module = module[0 if of_input else -1]
    if isinstance(module, BY_DEFINITION):
        return CHANNELS_FIRST
    return CHANNELS_LAST if of_input and isinstance(module, nn.Linear) else None


@torch.no_grad()
def try_size(network: nn.Module, images: Tensor, is_taller: bool) -> None:
    """Run a copy of a network, with its hooks, on an image that is wider or taller than `images`, float [N, C, H, W],
    as far as it takes such an image."""
    sides = list(images.shape[2:])
    side = 0 if is_taller else 1
    # A multiple, since windows and patches have to fit in.
    sides[side] *= 1 + -(-MORE_PIXELS // sides[side])
    try:
        copied = copy.deepcopy(network).eval()
        if resize := getattr(copied, "set_input_size", None):  # timm's transformers take one size at a time
            resize(img_size=tuple(sides))
        copied(images.new_zeros(1, images.shape[1], *sides))
    except Exception:  # of any kind: what the hooks have not caught by then stays unknown
        return


def axes_from_shapes(here: Sequence[int], wider: Sequence[int] | None, taller: Sequence[int] | None) -> Axes | None:
    """The axes of a tensor from its shapes for N images, for one wider image and for one taller image; None where a
    shape is not known, or does not depend on the image's.

    Raises:
        ValueError: it is no map: not exactly one axis follows the width, and another one the height.
    """
    if wider is None or taller is None:
        return None
    one = (1, *here[1:])
    changed = [[axis for axis in range(4) if one[axis] != there[axis]] for there in (taller, wider) if len(there) == 4]
    if changed == [[], []]:
        return None
    if [len(axes) for axes in changed] != [1, 1] or changed[0] == changed[1] or [0] in changed:
        raise ValueError
    height, width = changed[0][0], changed[1][0]
    (channels,) = {1, 2, 3} - {height, width}
    return 0, channels, height, width
