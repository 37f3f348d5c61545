"""Comparing running times on a machine that also does other things."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import numpy as np
import torch

MAX_ROUNDS = 2000  # more do not make a median more precise
WARM_UP = 0.2  # seconds: the first calls allocate memory and choose algorithms


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    """The seconds that each call took, round by round, by name.

    Each round calls every function once, so that whatever slows down the machine for a while slows down all of them:
    ratios within a round are reliable when the seconds are not. The order rotates from round to round. On a GPU each
    function has to wait for the device itself. `seconds` are in total, without the warm-up, but `min_rounds` are made
    however long they take.
    """
    names = list(functions)
    for function in functions.values():
        begun, calls = time.perf_counter(), 0
        while calls < 3 and (calls < 1 or time.perf_counter() - begun < WARM_UP):
            function()
            calls += 1
    taken: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= min_rounds and time.perf_counter() - started > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begun = time.perf_counter()
            functions[name]()
            taken[name].append(time.perf_counter() - begun)
    return taken


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """How many times longer one takes than the other: the median of the rounds' ratios."""
    return median(one / other for one, other in zip(slower, faster, strict=True))


def percentile_95(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 95))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Limit PyTorch to so many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
