"""Names of the files and tags of a run, and addresses of its weights."""

import re

# In a run's folder and among its artifacts.
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
PEER_WEIGHTS = "peer.safetensors"
PREDICTIONS = "predictions.csv"  # a line for each test image
CLASSES = "classes.csv"
CONFUSION, RELIABILITY, DIFFERING = "confusion.png", "reliability.png", "differing.png"
# Tags of a run.
IMAGE_SHAPE = "kdpipe.image_shape"  # of its stored images, such as 3x32x32
UNLABELLED_IMAGES = "kdpipe.unlabelled_images"  # how many it learned from, where there were any
TIMED_ON = "kdpipe.timed_on"  # the hardware that its networks were timed on
ONE_THREAD = "_1_thread"  # ends the names of times on one thread of a CPU


def epoch_file(epoch: object) -> str:
    """The name of the file with the weights that a run had after an epoch; a pattern for "*"."""
    return f"epoch_{epoch}.safetensors"


def names_weights(address: object) -> bool:
    """Whether this is how a run's weights are written: runs:/<run id>, runs:/<run id>/epoch_<number>."""
    return bool(re.fullmatch(r"runs:/[^/]+(/(model|epoch_[1-9]\d*)(\.safetensors)?)?", str(address)))


def run_and_file(address: str) -> tuple[str, str]:
    """The run's id, and the name of its file of weights, that such an address is made of."""
    run_id, _, name = address.removeprefix("runs:/").partition("/")
    return run_id, f"{name.removesuffix('.safetensors')}.safetensors" if name else WEIGHTS


def weights_address(run_id: str, file: str) -> str:
    """How such an address is written: runs:/<run id> for the weights at the end."""
    return f"runs:/{run_id}" if file == WEIGHTS else f"runs:/{run_id}/{file.removesuffix('.safetensors')}"
