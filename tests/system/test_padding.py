"""Photos of several sizes as one batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.system.padding import boxes, cut_out, each_photo, padded

SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8)


def some_photos(sizes: list[tuple[int, int]]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=draw) for size in sizes]


@given(SIZES, st.booleans(), st.randoms())
@settings(max_examples=30, deadline=None)
def test_a_batch_that_is_indexed_and_flipped_gives_back_its_photos(
    sizes: list[tuple[int, int]], is_flipped: bool, random: object
) -> None:
    photos = some_photos(sizes)
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    batch = padded(photos)[torch.tensor(order)]
    assert batch.shape == (len(sizes), 4, max(height for height, _ in sizes), max(width for _, width in sizes))
    if is_flipped:
        batch = batch.flip(3)
    expected = [photos[number].flip(2) if is_flipped else photos[number] for number in order]
    assert all(map(torch.equal, each_photo(batch), expected))
    assert boxes(batch)[:, 2:].tolist() == [list(sizes[number]) for number in order]
    for positions, some in cut_out(batch):
        assert all(torch.equal(photo, expected[number]) for number, photo in zip(positions.tolist(), some, strict=True))


def test_photos_of_one_size_are_cut_out_together() -> None:
    batch = padded(some_photos([(4, 6), (6, 4), (4, 6)]))
    assert [positions.tolist() for positions, _ in cut_out(batch)] == [[0, 2], [1]]


def test_other_images_of_four_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="4 channels, the last of which does not say where a photo is"):
        boxes(torch.randint(0, 256, (2, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
