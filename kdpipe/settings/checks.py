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
            f"{word} {limit}"
            for word, limit in (("above", above), ("from", low), ("to", high), ("below", below))
            if limit is not None
        ]
        noun = "a whole number" if integer else "a number"
        raise ValueError(f"{key}={as_typed(value)}: {' '.join([noun, *limits])} is accepted")


def check_numbers(
    key: str, values: object, *, above: float | None = None, low: float | None = None, integer: bool = False
) -> None:
    """Raise ValueError unless `values` is a list of numbers as `check_number` accepts them."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{key}={as_typed(values)}: a list of numbers is accepted")
    for value in values:
        check_number(key, value, above=above, low=low, integer=integer)


def check_choice(key: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        accepted = ", ".join(as_typed(choice) for choice in choices)
        raise ValueError(f"{key}={as_typed(value)}: one of {accepted} is accepted")


def as_typed(value: object) -> str:
    """As it stands on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
