"""What a command says once, and not in each run of a sweep."""

import logging
from functools import cache

log = logging.getLogger("kdpipe")


@cache
def log_once(level: int, message: str, *values: object) -> None:
    """Log a message, the first time in this process that it is about these values."""
    log.log(level, message, *values)


def warn_once(message: str, *values: object) -> None:
    """`log_once`, as a warning."""
    log_once(logging.WARNING, message, *values)
