"""L0: times and amounts of memory as people write them."""

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


def bytes_of(text: str) -> int:
    """Bytes in ``"80GB"`` (powers of 1,000), ``"24 GiB"`` (of 1,024), ``"512MiB"``.

    Raises:
        InputError: it is none of these, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT])(i?)B?", text.strip())
    amount = 0
    if found:
        amount = int(float(found[1]) * (1024 if found[3] else 1000) ** ("kMGT".index(found[2]) + 1))
    if amount <= 0:
        raise InputError(f"{text!r} is no amount of memory: write it as 80GB, 24GiB or 512MiB")
    return amount


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
