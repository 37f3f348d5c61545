"""Augmentations one after the other, their random numbers, and values that they do not take."""

import pytest
import torch
from torch import Tensor

from kdpipe.data.augmentation import (
    Augmentation,
    ColorJitter,
    CropFlip,
    Flip,
    Pipeline,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    TrivialAugment,
    Views,
)
from kdpipe.settings.errors import ConfigError
from kdpipe.system.randomness import generator

IMAGES = torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8, generator=torch.manual_seed(0))


def epoch_draws(augment: Augmentation, epoch: int = 1, seed: int = 0, number: int | None = None) -> Tensor:
    return Views(augment, "", len(IMAGES), seed, number).draws(epoch)


def test_each_step_augments_what_the_one_before_returns():
    crop, erase = CropFlip(), RandomErasing(p=1)
    pipeline = Pipeline([crop, erase])
    draws = epoch_draws(pipeline)
    assert draws.shape == (20, crop.draws + erase.draws)
    assert torch.equal(pipeline(IMAGES, draws), erase(crop(IMAGES, draws[:, :3]), draws[:, 3:]))


def test_a_step_at_the_end_leaves_the_draws_of_the_others_as_they_were():
    alone = epoch_draws(CropFlip())
    assert torch.equal(alone, torch.rand(20, 3, generator=generator(0, "augmentation/1")))  # as ever
    two, three = (epoch_draws(Pipeline(steps)) for steps in ([CropFlip(), Flip()], [CropFlip(), Flip(), Flip()]))
    assert torch.equal(two[:, :3], alone) and torch.equal(three[:, :5], two)
    assert not torch.equal(three[:, 3:5], three[:, 5:])


def test_a_pipeline_in_a_pipeline_is_its_steps():
    flat = Pipeline([CropFlip(), Flip(), TrivialAugment()])
    nested = Pipeline([Pipeline([CropFlip(), Flip()]), TrivialAugment()])
    assert torch.equal(flat(IMAGES, epoch_draws(flat)), nested(IMAGES, epoch_draws(nested)))


def test_the_draws_of_a_pipeline_depend_on_seed_and_epoch_unless_its_views_are_a_fixed_number():
    pipeline = Pipeline([Flip(), TrivialAugment()])
    draws = [epoch_draws(pipeline, epoch, seed) for epoch in (1, 2) for seed in (0, 1)]
    assert all(not torch.equal(one, other) for one in draws for other in draws if one is not other)
    assert torch.equal(epoch_draws(pipeline, 1, 0, number=2), epoch_draws(pipeline, 3, 1, number=2))


def test_images_are_flipped_either_way_as_often_as_asked():
    copies = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2).expand(2000, 1, 2, 2)
    views = Flip(horizontal=0.5, vertical=0.1)(copies, torch.rand(2000, 2, generator=torch.manual_seed(0)))
    first = views[:, 0, 0, 0]
    assert 0.45 < ((first == 1) | (first == 3)).float().mean() < 0.55  # left and right are swapped
    assert 0.07 < ((first == 2) | (first == 3)).float().mean() < 0.13
    assert torch.equal(Flip(0, 0)(copies, torch.zeros(2000, 2)), copies)
    assert torch.equal(Flip(1, 1)(copies, torch.full((2000, 2), 0.999999)), copies.flip(2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flip(horizontal=1.5), "horizontal=1.5: expected a number from 0 to 1"),
        (lambda: RandomErasing(p=-0.1), "p=-0.1: expected a number from 0 to 1"),
        (lambda: RandomErasing(value=256), "value=256: expected a number from 0 to 255, a list of one for each"),
        (lambda: RandomErasing(value="black"), "value=black: expected a number from 0 to 255"),
        (lambda: RandomResizedCrop(scale=[0.5, 2]), "scale=2: expected a number above 0 to 1"),
        (lambda: RandomResizedCrop(scale=[0.5]), "scale=[0.5]: expected two numbers above 0 up to 1"),
        (lambda: RandomResizedCrop(scale=[1, 0.5]), "scale=[1,0.5]: expected the smaller number first"),
        (lambda: RandomResizedCrop(ratio=[0, 1]), "ratio=0: expected a number above 0"),
        (
            lambda: RandomResizedCrop(interpolation="nearest"),
            "interpolation=nearest: expected one of bilinear",
        ),
        (lambda: ColorJitter(hue=0.6), "hue=0.6: expected a number from 0 to 0.5"),
        (lambda: ColorJitter(), "brightness=0: nothing changes; expected a number above 0, for it or another one"),
        (lambda: RandAugment(magnitude=31), "magnitude=31: expected a whole number from 0 to 30"),
        (lambda: RandAugment(num_ops=0), "num_ops=0: expected a whole number from 1"),
        (lambda: TrivialAugment("bicubic"), "interpolation=bicubic: expected one of nearest, bilinear"),
        (lambda: Pipeline([]), "steps=[]: expected a list with at least one augmentation"),
        (lambda: Pipeline([CropFlip(), None]), "steps.1=null: expected an augmentation"),
    ],
)
def test_values_that_an_augmentation_does_not_take(make, message):
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("augment", "channels", "message"),
    [
        (ColorJitter(hue=0.1), 1, "hue=0.1: these images have one channel; expected 0"),
        (ColorJitter(saturation=0.1), 1, "saturation=0.1: these images have one channel; expected 0"),
        (Pipeline([Flip(), ColorJitter(hue=0.1)]), 1, "steps.1.hue=0.1: these images have one channel; expected 0"),
        (TrivialAugment(), 4, "_target_: operations on colours need 1 or 3 channels, and these images have 4"),
        (RandomErasing(value=[1, 2]), 3, "value=[1,2]: expected one number, or 3, one for each channel"),
    ],
)
def test_images_that_an_augmentation_cannot_take(augment, channels, message):
    with pytest.raises(ConfigError) as raised:
        augment(torch.zeros(2, channels, 8, 8, dtype=torch.uint8), torch.zeros(2, augment.draws))
    assert str(raised.value) == message


def test_brightness_and_contrast_are_for_grey_images_too():
    grey = IMAGES[:, :1]
    assert not torch.equal(ColorJitter(0.4, 0.4)(grey, torch.rand(20, 5, generator=torch.manual_seed(0))), grey)
