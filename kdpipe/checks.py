"""Checks of single values, with messages that name the key, the value and what would be accepted."""

from collections.abc import Sequence
from numbers import Integral, Real


def check_number(
    key: str,
    value: object,
    *,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    integer: bool = False,
) -> None:
    """Raise ValueError unless `value` is a number with `above` < or `low` <= value <= `high` or < `below`."""
    kind = Integral if integer else Real
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if (
        not is_number
        or (above is not None and not value > above)  # type: ignore[operator]
        or (low is not None and not value >= low)  # type: ignore[operator]
        or (high is not None and not value <= high)  # type: ignore[operator]
        or (below is not None and not value < below)  # type: ignore[operator]
        or abs(value) == float("inf")  # type: ignore[arg-type]
        or value != value
    ):
        limits = [
            f"{word} {limit:g}"
            for word, limit in (("above", above), ("from", low), ("to", high), ("below", below))
            if limit is not None
        ]
        noun = "a whole number" if integer else "a number"
        raise ValueError(f"{key}={_text(value)}: {' '.join([noun, *limits])} is accepted")


def check_choice(key: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        accepted = ", ".join(_text(choice) for choice in choices)
        raise ValueError(f"{key}={_text(value)}: one of {accepted} is accepted")


def _text(value: object) -> str:
    """As it stands on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
