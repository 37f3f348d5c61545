"""Names of a run's files and tags, and addresses of its weights."""

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
UNLABELLED_IMAGES = "kdpipe.unlabelled_images"  # how many it was trained on
TIMED_ON = "kdpipe.timed_on"  # the hardware of its latencies
ONE_THREAD = "_1_thread"  # suffix of latencies on one CPU thread


def epoch_file(epoch: object) -> str:
    """The file with the weights after an epoch; a pattern for "*"."""
    return f"epoch_{epoch}.safetensors"


def names_weights(address: object) -> bool:
    """Whether this is an address of weights: runs:/<run id> or runs:/<run id>/epoch_<number>."""
    return bool(re.fullmatch(r"runs:/[^/]+(/(model|epoch_[1-9]\d*)(\.safetensors)?)?", str(address)))


def run_and_file(address: str) -> tuple[str, str]:
    """The run id in such an address, and the name of the file of weights."""
    run_id, _, name = address.removeprefix("runs:/").partition("/")
    return run_id, f"{name.removesuffix('.safetensors')}.safetensors" if name else WEIGHTS


def weights_address(run_id: str, file: str) -> str:
    """The address of a run's weights: runs:/<run id> for those at the end."""
    return f"runs:/{run_id}" if file == WEIGHTS else f"runs:/{run_id}/{file.removesuffix('.safetensors')}"
