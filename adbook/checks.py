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


def check_seed(seed: object) -> None:
    """Raise ValueError if `seed` is none that torch's and numpy's dice both take."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to below 2**63")


def check_layers(hidden: object, least: int = 0) -> None:
    """Raise ValueError if `hidden` is not a tuple of at least `least` layer widths."""
    if not isinstance(hidden, tuple) or len(hidden) < least or not all(type(w) is int and w >= 1 for w in hidden):
        raise ValueError(f"hidden={hidden!r} must be a tuple of layer widths of at least 1, such as (64, 64)")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and no bool."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def check_share(settings: object, names: Sequence[str]) -> None:
    """Raise ValueError if an attribute is not a number from 0 to 1."""
    for name in names:
        value = getattr(settings, name)
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} must be from 0 to 1")


def check_positive(settings: object, names: Sequence[str], *, or_zero: bool = False) -> None:
    """Raise ValueError if an attribute is not a finite number above 0, or 0 where that is allowed."""
    for name in names:
        value = getattr(settings, name)
        if not is_number(value) or value < 0 or (value == 0 and not or_zero):
            raise ValueError(f"{name}={value!r} must be a positive number{' or 0' if or_zero else ''}")
