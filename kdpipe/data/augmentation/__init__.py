"""Augmentation at the stored size, once per view, which student and teacher both see.

An augmentation is called as `augment(images, draws)`: uint8 [N, C, H, W] and float [N, augment.draws] in [0, 1), the
random numbers of each image, and returns such images. A view depends on the seed, the epoch and the image only (see
`Views`), never on the other images of its batch.
"""

from kdpipe.data.augmentation.colour import ColorJitter
from kdpipe.data.augmentation.cropping import CropFlip, Flip, RandomResizedCrop
from kdpipe.data.augmentation.drawn import DRAWS, Augmentation, Views, no_augmentation, number_of_draws, steps_of
from kdpipe.data.augmentation.erasing import RandomErasing
from kdpipe.data.augmentation.pipeline import Pipeline
from kdpipe.data.augmentation.policies import RandAugment, TrivialAugment
