"""The error that means: the input is wrong, here is how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one line or a few, and ends with the remedy."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` if a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
