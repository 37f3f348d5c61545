"""Data sets: one file per source, and every source gives the same thing, a `Source`.

`split` makes of it the `ImageDataset` that the engine trains and tests on.
"""

from kdpipe.data.dataset import ImageDataset, Rows, Source, split

__all__ = ["ImageDataset", "Rows", "Source", "split"]
