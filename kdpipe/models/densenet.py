"""The tutorial's teacher."""

from torch import nn

from kdpipe.models.torchvision import classifier, roles_of


def densenet121(num_classes: int) -> nn.Module:
    """torchvision's DenseNet-121 (Huang et al. 2017) with the tutorial's head: linear 1024 → 250 → 50 → classes."""
    network = classifier("densenet121", num_classes)
    network.head_name = "classifier"  # type: ignore[assignment]
    network.roles = {**roles_of(network), "embedding": "classifier.2"}  # type: ignore[assignment]
    network.classifier = nn.Sequential(nn.Linear(1024, 250), nn.Linear(250, 50), nn.Linear(50, num_classes))
    return network
