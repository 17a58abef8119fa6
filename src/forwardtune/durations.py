"""L0: times as people write them."""

from __future__ import annotations

import re

from .errors import InputError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(text: str) -> float:
    """Seconds in ``"90"``, ``"90s"``, ``"30m"``, ``"1.5h"``, ``"1h30m"``.

    Raises:
        InputError: it is none of these, or nothing.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if "".join(number + unit for number, unit in parts) == text and parts:
        total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    else:
        total = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
    if total <= 0:
        raise InputError(f"{text!r} is no length of time: write it as 90s, 30m, 2h or 1h30m")
    return total


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``8 h``, ``2 d 4 h``."""
    minutes, hours, days = round(seconds / 60), round(seconds / 3600), seconds / 86400
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if days < 1:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    return f"{hours // 24} d {hours % 24} h"
