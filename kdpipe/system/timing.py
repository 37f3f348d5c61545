"""How long things take beside each other, on a machine that does other things, too."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import numpy as np
import torch

MOST = 2000  # rounds: more make no median any surer
WARM_UP = 0.2  # seconds: the first calls allocate, and choose their algorithms


def time_in_turn(works: Mapping[str, Callable[[], object]], seconds: float, least: int) -> dict[str, list[float]]:
    """The seconds that each call of each work took, round by round.

    All take turns, one call each a round, so that what slows the machine down for a while slows all of them down: the
    ratio of two of them in one round holds where their seconds do not. Who is first changes from round to round.

    Args:
        works: what is called; on a GPU each waits for the device itself.
        seconds: for how long, without the warm-up, in all.
        least: rounds that are made however long they take.
    """
    names = list(works)
    for work in works.values():
        begun, calls = time.perf_counter(), 0
        while calls < 3 and (calls < 1 or time.perf_counter() - begun < WARM_UP):
            work()
            calls += 1
    taken: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(MOST):
        if number >= least and time.perf_counter() - started > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begun = time.perf_counter()
            works[name]()
            taken[name].append(time.perf_counter() - begun)
    return taken


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """How many times longer one takes than the other: the median over rounds."""
    return median(one / other for one, other in zip(slower, faster, strict=True))


def percentile_95(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 95))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many of the CPU's threads for PyTorch; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
