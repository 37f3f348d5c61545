"""Networks: one file per family. A network is any `nn.Module` from float images [N, channels, size, size] to logits.

Some attributes are optional, needed only for what they are for:
    head_name: the submodule that stays trainable with `model.freeze=backbone`, such as "fc";
    roles: its stages and embedding, for losses that compare features; see `kdpipe.models.roles`;
    imagenet_weights: a function without arguments that returns the pretrained state dict, for `model.weights=imagenet`;
    imagenet_classes: the names of the classes of its head, which is kept where the data set has the same;
    imagenet_cache: the folder where these are kept, if not PyTorch's own;
    preprocessing: what its pretrained weights were trained with, by the names of `Classifier`'s arguments, for values
        that the config leaves at null.
"""

from kdpipe.models.classifier import Classifier, size_mb
from kdpipe.models.ensemble import Ensemble
