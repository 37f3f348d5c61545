"""The tutorial's teacher."""

from typing import Any

from torch import nn

from kdpipe.models.torchvision import classifier


def densenet121(num_classes: int) -> nn.Module:
    """torchvision's DenseNet-121 (Huang et al. 2017) with the tutorial's head: linear 1024 → 250 → 50 → classes."""
    network: Any = classifier("densenet121", num_classes)
    network.roles["embedding"] = "classifier.2"
    network.classifier = nn.Sequential(nn.Linear(1024, 250), nn.Linear(250, 50), nn.Linear(50, num_classes))
    return network
