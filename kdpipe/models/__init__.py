"""Networks: one file per family. A network is any `nn.Module` from float images [N, channels, size, size] to logits.

Four attributes are asked of it only where they are needed:
    head_name: the submodule that stays trainable under `model.freeze=backbone`, such as "fc";
    roles: which submodules are its stages, for losses that compare features; see `kdpipe.training.observed`;
    imagenet_backbone: a function without arguments that gives the pretrained state dict, head left out, for
        `model.weights=imagenet`;
    preprocessing: the image_size, mean and std of its pretrained weights, for those that the config leaves at null.
"""

from kdpipe.models.classifier import Classifier, size_mb
from kdpipe.models.ensemble import Ensemble

__all__ = ["Classifier", "Ensemble", "size_mb"]
