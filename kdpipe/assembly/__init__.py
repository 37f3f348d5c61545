"""From the config to objects: each `build_…` takes a part of it, and names the key where a value will not do."""

from kdpipe.assembly.datasets import build_data, check_selection, forget_data, plain
from kdpipe.assembly.devices import check_device, use_hardware
from kdpipe.assembly.networks import build_model, build_network, load_trained, read_config, read_model
from kdpipe.assembly.parts import (
    Parts,
    build_loss,
    build_optimizer,
    build_parts,
    check_fit,
    check_sharing,
    check_values,
    fit_loss,
)
from kdpipe.assembly.teachers import KnownTeachers, build_ensemble

__all__ = [
    "KnownTeachers",
    "Parts",
    "build_data",
    "build_ensemble",
    "build_loss",
    "build_model",
    "build_network",
    "build_optimizer",
    "build_parts",
    "check_device",
    "check_fit",
    "check_selection",
    "check_sharing",
    "check_values",
    "fit_loss",
    "forget_data",
    "load_trained",
    "plain",
    "read_config",
    "read_model",
    "use_hardware",
]
