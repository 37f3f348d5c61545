"""Addresses of weights: runs:/<run id>, runs:/<run id>/epoch_<number>; a file, FILE::part."""

import re
from pathlib import Path

WEIGHTS = "model.safetensors"  # those at the end of a run, in its folder and among its artifacts


def epoch_file(epoch: object) -> str:
    """The name of the file with the weights after an epoch; a pattern for "*"."""
    return f"epoch_{epoch}.safetensors"


def names_weights(address: object) -> bool:
    """Whether this is the address of a run's weights."""
    return bool(re.fullmatch(r"runs:/[^/]+(/(model|epoch_[1-9]\d*)(\.safetensors)?)?", str(address)))


def run_and_file(address: str) -> tuple[str, str]:
    """The id of the run and the name of its file that an address stands for."""
    run_id, _, name = address.removeprefix("runs:/").partition("/")
    return run_id, f"{name.removesuffix('.safetensors')}.safetensors" if name else WEIGHTS


def weights_address(run_id: str, file: str) -> str:
    """The address of a run's file of weights."""
    return f"runs:/{run_id}" if file == WEIGHTS else f"runs:/{run_id}/{file.removesuffix('.safetensors')}"


def file_and_part(address: str) -> tuple[Path, str]:
    """The file of weights that is no run's, and which of its state dicts: checkpoint.pt::model_ema; "" where it does
    not say."""
    whole = Path(address).expanduser()
    file, separator, part = address.rpartition("::")
    return (whole, "") if not separator or whole.is_file() else (Path(file).expanduser(), part)
