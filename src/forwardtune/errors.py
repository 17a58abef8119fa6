"""The error that means: the input is wrong, here is how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one line or a few, and ends with the remedy."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` if a known word is close, else nothing."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""
