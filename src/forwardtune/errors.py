"""The errors that the command line tells apart, in a module that needs no torch."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

# Who stands between a user and this package.
_BETWEEN = {"forwardtune", "torch", "contextlib", "transformers", "accelerate", "peft", "tqdm", "runpy"}


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one line or a few, and ends with the remedy.

    Args:
        argument: of Python, which the remedy names: the command line says its option there.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class UnreachableError(InputError):
    """Rank 0 cannot be reached, so this process has to speak for itself."""


class LogError(ValueError):
    """A step log that cannot be used; the message says what is wrong with it and what to do."""


class LogWriteError(LogError):
    """The step log could not be written, as on a full disk; everything before it is intact."""


class NonFiniteLossError(RuntimeError):
    """The loss was infinite or not a number in too many steps in a row."""


class WorkerError(RuntimeError):
    """Another process of the run failed, is gone, or has other weights; every step so far is in the log."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` if a known word is close, else nothing."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def warn(message: str) -> None:
    """A UserWarning at the line of the user's own code that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
