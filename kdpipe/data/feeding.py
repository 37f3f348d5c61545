"""Getting the batches of an epoch to the device in time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from kdpipe.data.dataset import Images

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def feed(
    batches: Iterable[Tensor], images: Images, labels: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each batch of positions int64 [n], with its images [n, …] and its labels int64 [n] on the device.

    If the images are in the CPU's memory and the device is a GPU, the next batch is gathered and copied, from pinned
    memory, while the current one is used.
    """
    if device.type != "cuda" or labels.is_cuda:
        for batch in batches:
            yield batch, images[batch].to(device), labels[batch].to(device)
        return

    def load(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        some_images, some_labels = images[batch].pin_memory(), labels[batch].pin_memory()
        return batch, some_images.to(device, non_blocking=True), some_labels.to(device, non_blocking=True)

    yield from one_ahead(batches, load)


def one_ahead(items: Iterable[Item], load: Callable[[Item], Loaded]) -> Iterator[Loaded]:
    """`load` of each item, in order; a thread loads the next one while the current one is used."""
    with ThreadPoolExecutor(1) as thread:
        loading: Future[Loaded] | None = None
        for item in items:
            current, loading = loading, thread.submit(load, item)
            if current:
                yield current.result()
        if loading:
            yield loading.result()
