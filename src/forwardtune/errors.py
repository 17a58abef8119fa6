"""The errors that the command line tells apart, in a module that needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one line or a few, and ends with the remedy."""


class LogError(ValueError):
    """A step log that cannot be used; the message says what is wrong with it and what to do."""


class LogWriteError(LogError):
    """The step log could not be written, as on a full disk; everything before it is intact."""


class NonFiniteLossError(RuntimeError):
    """The loss was infinite or not a number in too many steps in a row."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` if a known word is close, else nothing."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""
