"""Work that no result depends on: where it fails, that is a warning."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kdpipe.settings.errors import one_line

log = logging.getLogger("kdpipe")
BACKEND = "MPLBACKEND"


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Let the block fail with a warning that names what is missing, such as "timing". Interruptions pass."""
    try:
        yield
    except Exception as error:
        log.warning("%s: left out (%s)", what, one_line(error))


@contextmanager
def no_windows() -> Iterator[None]:
    """Import Matplotlib in this block, for files alone: what draws in windows and notebooks (MPLBACKEND, which every
    notebook passes on to its processes) may not be installed here, and then it could not be imported."""
    backend = os.environ.pop(BACKEND, None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ[BACKEND] = backend
