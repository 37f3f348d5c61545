"""Networks: one file per family. A network is any `nn.Module` from float images [N, channels, size, size] to logits.

Four attributes are optional, needed only for what they are for:
    head_name: the submodule that stays trainable with `model.freeze=backbone`, such as "fc";
    roles: its stages and embedding, for losses that compare features; see `kdpipe.models.roles`;
    imagenet_backbone: a function without arguments that returns the pretrained state dict without the head, for
        `model.weights=imagenet`;
    imagenet_cache: the folder where these are kept, if not PyTorch's own;
    preprocessing: image_size, mean and std of its pretrained weights, for values that the config leaves at null.
"""

from kdpipe.models.classifier import Classifier, size_mb
from kdpipe.models.ensemble import Ensemble
