"""Batches on their way to the device: the same values in the same order, the next one in good time."""

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.data.dataset import Images, PerImageValues
from kdpipe.data.feeding import feed, one_ahead
from kdpipe.data.unlabelled import Concatenated

IMAGES = torch.arange(2 * 20, dtype=torch.uint8).view(20, 2, 1, 1)
LABELS = torch.arange(20) % 7
ORDER = torch.randperm(20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "images", [IMAGES, Concatenated(IMAGES[:8], IMAGES[8:]), PerImageValues(torch.arange(20), IMAGES)], ids=type
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_fed_in_order_with_their_images_and_labels(images: Images, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    batches = ORDER.split(6)
    fed = list(feed(batches, images, LABELS, torch.device(device)))
    assert len(fed) == 4
    for batch, (positions, some_images, some_labels) in zip(batches, fed, strict=True):
        assert positions is batch
        assert torch.equal(some_images.cpu(), IMAGES[batch]) and torch.equal(some_labels.cpu(), LABELS[batch])
        assert some_images.device.type == some_labels.device.type == device


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    def batches() -> Iterator[Tensor]:
        yield ORDER[:5]
        raise AssertionError("the second batch was read")

    assert torch.equal(next(feed(batches(), IMAGES, LABELS, torch.device("cpu")))[2], LABELS[ORDER[:5]])


@given(st.lists(st.integers(), max_size=5))
def test_the_next_item_is_loaded_while_the_current_one_is_used(items: list[int]) -> None:
    begun = [threading.Event() for _ in items]

    def load(number: int) -> int:
        begun[number].set()
        return items[number]

    for number, item in enumerate(one_ahead(range(len(items)), load)):
        assert item == items[number]
        if number + 1 < len(items):
            assert begun[number + 1].wait(10)
        assert not any(event.is_set() for event in begun[number + 2 :])


def test_an_error_while_loading_comes_in_its_turn() -> None:
    loaded = one_ahead([4, 2, 0], lambda item: 1 / item)
    assert [next(loaded), next(loaded)] == [0.25, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(loaded)
