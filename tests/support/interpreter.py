"""Triton's interpreter, without the two thirds of an operation's time that change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any


def hurry() -> None:
    """For the rest of this process: what the interpreter computes stays bit for bit as it is."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if getattr(builder.options, "sanitize_overflow", False) and not builder.options.debug:
        # Whether an addition overflows is computed with eight operations more, and then nobody asks unless he debugs.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    slow, known = interpreter._get_np_dtype, {}
    if getattr(slow, "remembers", False):
        return

    def remembered(dtype: Any) -> Any:
        """NumPy's name of a type, for which a table of all of them is made at every call. Its own name tells all that matters."""
        name = dtype.scalar.name
        if name not in known:
            known[name] = slow(dtype)
        return known[name]

    remembered.remembers = True  # type: ignore[attr-defined]
    interpreter._get_np_dtype = remembered
