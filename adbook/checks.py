"""Checks of what a caller names, with errors that help."""

from collections.abc import Collection
from difflib import get_close_matches


def check_known(what: str, value: str, known: Collection[str]) -> None:
    """Raise ValueError if `value` is none of the `known` names, with the closest one and the list of them."""
    if not isinstance(value, str) or value not in known:
        close = get_close_matches(str(value), known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown {what} {value!r}{hint}; choose one of {', '.join(known)}")
