"""Each operation on colours and shapes gives what torchvision's function does for the same parameters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from kdpipe.data.augmentation import ColorJitter, RandAugment, RandomErasing, RandomResizedCrop, TrivialAugment
from kdpipe.data.augmentation.colour import turn_hue
from kdpipe.data.augmentation.cropping import BOX_DRAWS, boxes_to_resize, resized
from kdpipe.data.augmentation.policies import BINS, NAMES, RAND, WIDE, operated

ALMOST_ONE = 1 - 2**-24  # the largest number that torch.rand gives
SPACES = {"TrivialAugment": (WIDE, v2.TrivialAugmentWide), "RandAugment": (RAND, v2.RandAugment)}
# Products and sums that torchvision fuses, or not, depending on where a pixel is in memory.
A_LEVEL_OFF = ("color", "contrast", "sharpness")
BETWEEN_PIXELS = ("shear_x", "shear_y", "rotate")


@pytest.fixture(scope="session")
def photos(photo) -> Tensor:
    """12 photos of 32×24 pixels, uint8 [12, 3, 32, 24]."""
    pieces = [np.asarray(photo(number % 2, number, (24, 32))) for number in range(12)]
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).contiguous()


def difference(one: Tensor, other: Tensor) -> tuple[int, float]:
    """The largest difference in levels, and the share of values that differ at all."""
    assert one.dtype == other.dtype == torch.uint8
    differing = (one.int() - other.int()).abs()
    return int(differing.max()), float((differing > 0).float().mean())


@pytest.mark.parametrize("policy", SPACES)
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_at_every_strength_is_torchvision_s(photos, name, policy):
    space, theirs = SPACES[policy]
    strengths, signed = theirs._AUGMENTATION_SPACE[theirs_of(name)]
    magnitudes = strengths(BINS, 32, 24)
    strength, negative = torch.arange(0, BINS, 3), torch.arange(0, BINS, 3) % 2 == 1  # each for one image
    images = photos[strength % len(photos)]
    operation = torch.full_like(strength, NAMES.index(name))
    for interpolation in ("nearest", "bilinear"):
        arguments = {"interpolation": InterpolationMode(interpolation), "fill": {}}
        expected = []
        for image, number, is_negative in zip(images, strength, negative, strict=True):
            magnitude = 0.0 if magnitudes is None else float(magnitudes[number])
            sign = -1 if signed and is_negative else 1
            expected.append(
                theirs()._apply_image_or_video_transform(image, theirs_of(name), sign * magnitude, **arguments)
            )
        views = operated(images, operation, strength, negative, space, interpolation)
        worst, share = difference(views, torch.stack(expected))
        is_exact = name not in A_LEVEL_OFF and (interpolation == "nearest" or name not in BETWEEN_PIXELS)
        assert worst <= (0 if is_exact else 1) and share < 0.05


def theirs_of(name: str) -> str:
    """torchvision's name of an operation."""
    return "AutoContrast" if name == "autocontrast" else name.title().replace("_", "")


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_are_grey_colour_images(photos, name):
    strength, negative = torch.arange(12) * 2, torch.arange(12) % 2 == 1
    plan = (torch.full_like(strength, NAMES.index(name)), strength, negative, WIDE, "nearest")
    colour = operated(photos[:, :1].expand(-1, 3, -1, -1), *plan)
    assert difference(operated(photos[:, :1], *plan).expand(-1, 3, -1, -1), colour)[0] <= 1


def test_both_policies_have_the_operations_of_torchvision():
    names = set(map(theirs_of, NAMES))
    assert len(NAMES) == len(names) == 14
    assert names == set(v2.TrivialAugmentWide._AUGMENTATION_SPACE) == set(v2.RandAugment._AUGMENTATION_SPACE)


def test_an_image_gets_the_operation_of_its_draw(photos):
    draws = torch.tensor([[(number + 0.5) / len(NAMES), 0.9, 0.9] for number in range(len(NAMES))])
    copies = photos[:1].expand(len(NAMES), -1, -1, -1)
    views = TrivialAugment()(copies, draws)
    number = torch.arange(len(NAMES))
    positive = torch.zeros(len(NAMES), dtype=torch.bool)
    assert torch.equal(views, operated(copies, number, torch.full_like(number, 27), positive, WIDE, "nearest"))
    assert torch.equal(views[0], photos[0]) and len({view.numpy().tobytes() for view in views}) == len(NAMES)


def test_operations_of_rand_augment_follow_each_other(photos):
    draws = torch.rand(len(photos), 4, generator=torch.manual_seed(0))
    once = RandAugment(num_ops=1, magnitude=20)
    assert torch.equal(
        RandAugment(num_ops=2, magnitude=20)(photos, draws), once(once(photos, draws[:, :2]), draws[:, 2:])
    )
    assert not torch.equal(once(photos, draws[:, :2]), RandAugment(num_ops=1, magnitude=5)(photos, draws[:, :2]))


@pytest.mark.parametrize("turn", [-0.5, -0.3, -0.01, 0.0, 0.07, 0.2, 0.5])
def test_hue_is_torchvision_s(photos, turn):
    turns = torch.full((len(photos),), turn, dtype=torch.float64)
    worst, share = difference(turn_hue(photos, turns), functional.adjust_hue(photos, turn))
    assert worst <= 1 and share < 0.01


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_color_jitter_changes_each_image_by_its_own_draw(photos, name):
    draws = torch.rand(len(photos), 5, generator=torch.manual_seed(0))
    views = ColorJitter(**{name: 0.4})(photos, draws)
    place = ["brightness", "contrast", "saturation", "hue"].index(name) + 1
    adjust = getattr(functional, f"adjust_{name}")
    for image, view, draw in zip(photos, views, draws[:, place].double(), strict=True):
        change = 0.4 * (2 * float(draw) - 1)
        worst, share = difference(view, adjust(image, change if name == "hue" else 1 + change))
        assert worst <= 1 and share < 0.05


def test_color_jitter_changes_in_the_order_that_is_drawn(photos):
    draws = torch.full((2, 5), 0.99)
    draws[:, 0] = torch.tensor([0.0, ALMOST_ONE])  # brightness … hue, hue … brightness
    views = ColorJitter(brightness=0.8, contrast=0.8)(photos[:1].expand(2, -1, -1, -1), draws)
    factor = 1 + 0.8 * (2 * 0.99 - 1)
    first = functional.adjust_contrast(functional.adjust_brightness(photos[0], factor), factor)
    last = functional.adjust_brightness(functional.adjust_contrast(photos[0], factor), factor)
    assert difference(first, last)[0] > 10
    assert difference(views[0], first)[0] <= 2 and difference(views[1], last)[0] <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 24), (16, 50)])
def test_a_resized_crop_is_torchvision_s(photos, interpolation, size):
    draws = torch.rand(len(photos), BOX_DRAWS, generator=torch.manual_seed(0))
    heights, widths = torch.full((len(photos),), 32), torch.full((len(photos),), 24)
    box = boxes_to_resize(draws, heights, widths, [0.08, 1], [3 / 4, 4 / 3])
    views = resized(photos, box, size, interpolation)
    mode, boxes = InterpolationMode(interpolation), [list(map(int, one)) for one in zip(*box, strict=True)]
    for image, one, view in zip(photos, boxes, views, strict=True):
        exact = functional.resized_crop(image.float(), *one, list(size), interpolation=mode, antialias=True)
        worst, share = difference(view, exact.round().clamp(0, 255).to(torch.uint8))
        assert worst <= 1 and share < 0.01
        # For uint8 torchvision rounds and cuts off between rows and columns.
        rounded = functional.resized_crop(image, *one, list(size), interpolation=mode)
        assert difference(view, rounded)[0] <= (1 if interpolation == "bilinear" else 8)


def test_boxes_have_the_areas_and_shapes_that_were_asked_for_and_are_of_the_photo_s_own_size():
    number = 4000
    heights, widths = torch.randint(20, 300, (2, number), generator=torch.manual_seed(1))
    draws = torch.rand(number, BOX_DRAWS, generator=torch.manual_seed(0))
    top, left, tall, wide = boxes_to_resize(draws, heights, widths, [0.25, 0.5], [0.5, 2])
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + tall <= heights).all() and (left + wide <= widths).all()
    share, shape = tall * wide / (heights * widths), wide / tall
    usual = (widths < 2 * heights) & (heights < 2 * widths)  # else 10 tries may not be enough
    assert share[usual].min() > 0.2 and share[usual].max() < 0.55 and 0.36 < share[usual].mean() < 0.39
    assert shape.min() > 0.45 and shape.max() < 2.2
    assert torch.log(shape[usual]).mean().abs() < 0.05  # as often wide as tall


@pytest.mark.parametrize(("height", "width", "box"), [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13))])
def test_where_no_box_fits_it_is_the_largest_in_the_middle(height, width, box):
    draws = torch.full((1, BOX_DRAWS), ALMOST_ONE)  # all of the area, 4:3
    draws[:, 10:20] = 0.5  # square
    found = boxes_to_resize(draws, torch.tensor([height]), torch.tensor([width]), [1.0, 1.0], [3 / 4, 4 / 3])
    assert tuple(map(int, found)) == box


def test_a_crop_of_everything_changes_nothing(photos):
    draws = torch.rand(len(photos), BOX_DRAWS, generator=torch.manual_seed(0))
    square = photos[:, :, :24]
    assert torch.equal(RandomResizedCrop(scale=[1, 1], ratio=[1, 1])(square, draws), square)


@pytest.mark.parametrize("value", [0, 255, [125, 123, 114], "mean", "random"])
def test_erasing_fills_one_box_and_leaves_the_rest(photos, value):
    draws = torch.rand(len(photos), RandomErasing.draws, generator=torch.manual_seed(0))
    views = RandomErasing(p=1, value=value)(photos, draws)
    for image, view in zip(photos, views, strict=True):
        differs = (image != view).any(dim=0)
        rows, columns = differs.any(dim=1).nonzero()[:, 0], differs.any(dim=0).nonzero()[:, 0]
        top, bottom, left, right = (int(end) for side in (rows, columns) for end in (side.min(), side.max() + 1))
        assert 0.01 < (bottom - top) * (right - left) / differs.numel() < 0.4
        inside = view[:, top:bottom, left:right]
        if value == "random":
            assert 90 < inside.float().mean() < 165 and inside.float().std() > 50
        else:
            expected = image.float().mean(dim=(1, 2)).round() if value == "mean" else torch.tensor(value)
            assert torch.equal(view, functional.erase(image, top, left, bottom - top, right - left, fill(expected)))


def fill(value: Tensor) -> Tensor:
    return value.to(torch.uint8).reshape(-1, 1, 1)


def test_a_share_of_the_images_is_erased(photos):
    copies = photos[:1].expand(2000, -1, -1, -1)
    draws = torch.rand(2000, RandomErasing.draws, generator=torch.manual_seed(0))
    erased = (RandomErasing(p=0.25)(copies, draws) != copies).flatten(1).any(dim=1)
    assert 0.2 < erased.float().mean() < 0.3


def test_noise_is_another_one_for_each_image():
    images = torch.zeros(50, 3, 8, 8, dtype=torch.uint8)
    draws = torch.rand(50, RandomErasing.draws, generator=torch.manual_seed(0))
    draws[:, 2:] = 0.5  # the same box
    views = RandomErasing(p=1, value="random")(images, draws)
    assert len({view.numpy().tobytes() for view in views}) == 50


AUGMENTATIONS = [
    RandomResizedCrop(),
    RandomResizedCrop(interpolation="bicubic"),
    ColorJitter(0.4, 0.4),
    TrivialAugment(),
    TrivialAugment("bilinear"),
    RandAugment(3, 30),
    RandomErasing(p=0.9, value="random"),
    RandomErasing(value="mean"),
]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(AUGMENTATIONS),
    st.sampled_from([1, 3]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.5, ALMOST_ONE, None]),
)
def test_views_of_any_images_have_their_shape_and_type_and_do_not_change_them(augment, channels, height, width, draw):
    shape = (6, channels, height, width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.manual_seed(height))
    before = images.clone()
    draws = torch.rand(6, augment.draws, generator=torch.manual_seed(width))
    views = augment(images, draws if draw is None else torch.full_like(draws, draw))
    assert (views.shape, views.dtype) == (images.shape, images.dtype)
    assert torch.equal(images, before)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(AUGMENTATIONS), st.permutations(range(12)), st.integers(3, 12), st.integers(0, 100))
def test_a_view_does_not_depend_on_the_other_images_of_its_batch(photos, augment, order, batch_size, seed):
    draws = torch.rand(len(photos), augment.draws, generator=torch.manual_seed(seed))
    expected = augment(photos, draws)
    for batch in torch.tensor(order).split(batch_size):
        assert torch.equal(augment(photos[batch], draws[batch]), expected[batch])
