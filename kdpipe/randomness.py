"""Each use of chance draws from a generator of its own, derived from the seed.

So the arms of one seed share the student's first weights and its batches, whatever else they draw.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose ("student", "order/3", …): a hash, so that seeds 0 and 1 share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]) >> 1


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose: the same draws on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose))
