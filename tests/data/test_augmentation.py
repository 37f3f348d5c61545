"""Random crops and flips: what a view is, and what it depends on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.data.augmentation import DRAWS, CropFlip, Views
from kdpipe.settings.errors import as_typed

ALMOST_ONE = 1 - 2**-24  # the largest number that torch.rand gives


def epoch_draws(seed: int, epoch: int, num_images: int, number: int | None = None) -> torch.Tensor:
    return Views(CropFlip(), "crop_flip", num_images, seed, number).draws(epoch)


def as_tensor(*images) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]))


@pytest.fixture(scope="session")
def photos(photo) -> Tensor:
    """40 photos of 16×16 pixels, uint8 [40, 3, 16, 16]."""
    return as_tensor(*(photo(number % 2, number, (16, 16)) for number in range(40)))


def views(images: Tensor, seed: int = 0, epoch: int = 1, flip: bool = True) -> Tensor:
    return CropFlip(flip)(images, epoch_draws(seed, epoch, len(images)))


def slow_view(image: np.ndarray, draws: np.ndarray, flip: bool) -> np.ndarray:
    """One view of one image, [C, H, W], written down pixel by pixel."""
    _, height, width = image.shape
    pad_rows, pad_columns = height // 8, width // 8
    # In single precision like the draws, or a product just below a whole number could end on its other side.
    top = int(draws[0] * np.float32(2 * pad_rows + 1)) - pad_rows
    left = int(draws[1] * np.float32(2 * pad_columns + 1)) - pad_columns
    view = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= top + row < height and 0 <= left + column < width:
                view[:, row, column] = image[:, top + row, left + column]
    return view[:, :, ::-1] if flip and draws[2] < 0.5 else view


def all_crops(image: Tensor, mirrored: bool) -> set[bytes]:
    """Every crop of the image's own size from the image with an eighth of zeros around it."""
    pixels = image.numpy()
    _, height, width = pixels.shape
    padded = np.pad(pixels, ((0, 0), (height // 8,) * 2, (width // 8,) * 2))
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(padded.shape[1] - height + 1)
        for left in range(padded.shape[2] - width + 1)
    ]
    return {(crop[:, :, ::-1] if mirrored else crop).tobytes() for crop in crops}


unit = st.floats(0, ALMOST_ONE, width=32)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 3]),
    st.integers(1, 26),
    st.integers(1, 26),
    st.lists(st.tuples(unit, unit, unit), min_size=1, max_size=3),
    st.booleans(),
)
def test_views_match_a_slow_reference_implementation(channels, height, width, draws, flip):
    images = np.random.default_rng(height).integers(0, 256, (len(draws), channels, height, width), np.uint8)
    numbers = np.array(draws, dtype=np.float32)
    result = CropFlip(flip)(torch.from_numpy(images), torch.from_numpy(numbers))
    expected = np.stack([slow_view(image, own, flip) for image, own in zip(images, numbers, strict=True)])
    assert result.dtype == torch.uint8
    assert np.array_equal(result, expected)


def test_every_view_is_a_crop_of_the_padded_image_flipped_or_not(photos: Tensor):
    for image, view in zip(photos, views(photos), strict=True):
        assert view.numpy().tobytes() in all_crops(image, mirrored=False) | all_crops(image, mirrored=True)


def test_all_crops_occur_and_no_others(photos: Tensor):
    copies = photos[:1].expand(4000, -1, -1, -1)
    seen = {view.tobytes() for view in views(copies).numpy()}
    straight, mirrored = all_crops(photos[0], mirrored=False), all_crops(photos[0], mirrored=True)
    assert len(straight) == 25  # two pixels to each side and none
    assert seen == straight | mirrored


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (40, 24), (7, 5)])
def test_views_have_the_shape_and_type_of_their_images(photo, size):
    images = as_tensor(photo(0, 0, size), photo(1, 0, size))
    result = views(images)
    assert result.shape == images.shape
    assert result.dtype == torch.uint8


def test_the_images_are_not_modified(photos: Tensor):
    before = photos.clone()
    views(photos)
    assert torch.equal(photos, before)


@pytest.mark.parametrize(("draw", "corner"), [(0.0, "top left"), (ALMOST_ONE, "bottom right")])
def test_the_border_is_an_eighth_of_the_side_at_most(draw, corner):
    white = torch.full((1, 3, 32, 16), 255, dtype=torch.uint8)
    view = CropFlip(flip=False)(white, torch.full((1, DRAWS), draw))[0]
    black_rows, black_columns = (view[0] == 0).all(dim=1), (view[0] == 0).all(dim=0)
    assert black_rows.sum() == 4
    assert black_columns.sum() == 2
    assert black_rows[0] == black_columns[0] == (corner == "top left")


def test_without_flip_no_image_is_flipped(photos: Tensor):
    for epoch in range(1, 6):
        for image, view in zip(photos, views(photos, epoch=epoch, flip=False), strict=True):
            assert view.numpy().tobytes() in all_crops(image, mirrored=False)


def test_half_of_the_images_are_flipped(photos: Tensor):
    copies = photos[:1].expand(2000, -1, -1, -1)
    mirrored = all_crops(photos[0], mirrored=True)
    share = np.mean([view.tobytes() in mirrored for view in views(copies).numpy()])
    assert 0.45 < share < 0.55


def test_flip_is_the_only_difference_between_views_with_it_and_without(photos: Tensor):
    draws = epoch_draws(0, 1, len(photos))
    flipped = draws[:, 2] < 0.5
    with_flip, without = CropFlip(True)(photos, draws), CropFlip(False)(photos, draws)
    assert torch.equal(with_flip[~flipped], without[~flipped])
    assert torch.equal(with_flip[flipped], without[flipped].flip(3))


def test_each_image_of_a_batch_has_its_own_draw(photos: Tensor):
    copies = photos[:1].expand(64, -1, -1, -1)
    assert len({view.tobytes() for view in views(copies).numpy()}) > 16


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(40)), st.integers(1, 40), st.integers(0, 3), st.integers(1, 3))
def test_a_view_is_the_same_in_any_order_and_any_batch_size(photos: Tensor, order, batch_size, seed, epoch):
    augment, draws = CropFlip(), epoch_draws(seed, epoch, len(photos))
    expected = augment(photos, draws)
    for batch in torch.tensor(order).split(batch_size):
        assert torch.equal(augment(photos[batch], draws[batch]), expected[batch])


def test_views_repeat_for_the_same_seed_and_epoch_whatever_else_is_drawn(photos: Tensor):
    first = views(photos, seed=3, epoch=2)
    torch.manual_seed(5)
    torch.rand(7)
    assert torch.equal(views(photos, seed=3, epoch=2), first)


@pytest.mark.parametrize(("seed", "epoch"), [(3, 3), (4, 2), (2, 3)])
def test_another_seed_or_epoch_gives_other_views(photos: Tensor, seed, epoch):
    same = (views(photos, seed, epoch) == views(photos, seed=3, epoch=2)).flatten(1).all(dim=1)
    assert same.sum() < 10


def test_the_draws_of_an_image_do_not_depend_on_how_many_images_follow():
    assert torch.equal(epoch_draws(0, 1, 1000)[:17], epoch_draws(0, 1, 17))


@pytest.mark.parametrize("flip", [1, 0, "yes", None])
def test_flip_is_true_or_false(flip):
    with pytest.raises(ValueError, match=f"^flip={as_typed(flip)}: expected true or false$"):
        CropFlip(flip)


def test_a_fixed_number_of_views_repeats_and_is_the_same_for_all_seeds() -> None:
    first, second, third, fourth = (epoch_draws(0, epoch, 20, number=3) for epoch in (1, 2, 3, 4))
    assert torch.equal(first, fourth)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert torch.equal(first, epoch_draws(1, 1, 20, number=3))
    assert not torch.equal(epoch_draws(0, 1, 20), epoch_draws(1, 1, 20))
