"""Checks of what a caller names or sets, with errors that help."""

import math
from collections.abc import Collection, Sequence
from difflib import get_close_matches


def check_known(what: str, value: str, known: Collection[str]) -> None:
    """Raise ValueError if `value` is none of the `known` names, with the closest one and the list of them."""
    if not isinstance(value, str) or value not in known:
        close = get_close_matches(str(value), known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown {what} {value!r}{hint}; choose one of {', '.join(known)}")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError if `value` is not a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and no bool."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def check_positive(settings: object, names: Sequence[str]) -> None:
    """Raise ValueError if an attribute is not a positive finite number."""
    for name in names:
        value = getattr(settings, name)
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name}={value!r} must be a positive number")
