"""Data sets: one file per source; each returns a `Source`, which `split` turns into an `ImageDataset`."""

from kdpipe.data.dataset import ImageDataset, PerImageValues, Source, split

__all__ = ["ImageDataset", "PerImageValues", "Source", "split"]
