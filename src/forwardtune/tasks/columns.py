"""Names of columns: each may be there once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def twice(names: Iterable[str]) -> str:
    """What to say of a name that is there twice, before a library renames or drops it; nothing if there is none."""
    name = next((name for name, count in Counter(names).items() if count > 1), None)
    return "" if name is None else f"{name!r} is the name of two columns: rename or remove one"
