"""Each use of random numbers has its own generator, derived from the seed.

So the arms of one seed share the student's initial weights and its batches, whatever else they draw. Dropout, and
whatever else a network or a loss draws by itself, uses the global generators of PyTorch, NumPy and Python.
"""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose ("student", "order/3", …): a hash, so that seeds 0 and 1 share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]) >> 1


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose: the same draws on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose))


def seed_all(seed: int, purpose: str) -> None:
    """Seed the global generators for one purpose."""
    derived = derive_seed(seed, purpose)
    torch.manual_seed(derived)  # of every device
    random.seed(derived)
    np.random.seed(derived % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the global generators, as plain values and tensors."""
    numpy = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    if device.type in ("cuda", "mps"):
        state["device"] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the global generators to a `random_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    if device.type in ("cuda", "mps") and "device" in state:
        getattr(torch, device.type).set_rng_state(state["device"])
