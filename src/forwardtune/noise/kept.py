"""Compiled code that Numba keeps: beside its source, or in the user's cache.

Neither may be writable (a container), full or damaged: then the kernels are compiled anew, and nothing else changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, NullCache

from ..errors import warn

# Of a change Numba notices one in the file of the kernel alone. What kernels call is in other files, too.
_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("cpu_*.py")))
).hexdigest()


class _Kept(FunctionCache):
    """Numba's cache of a function, of which no trouble with files gets out."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return super()._index_key(sig, codegen), _SOURCES

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # damaged: unpickling raises whatever it likes
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            try:
                super().save_overload(sig, data)
            except OSError:
                raise
            except Exception:  # the index is damaged
                self.flush()
                super().save_overload(sig, data)
        except OSError as error:
            _tell_once(error)


class _NotKept(NullCache):
    """For a function whose compiled code has no place to be kept in, because of ``reason``."""

    def __init__(self, reason: object) -> None:
        self._reason = reason

    def save_overload(self, sig: Any, cres: Any) -> None:
        _tell_once(self._reason)


_told = False


def _tell_once(reason: object) -> None:
    global _told
    if not _told:
        _told = True
        warn(
            "the compiled noise kernels cannot be kept, so every process compiles them again, for some seconds: set "
            f"NUMBA_CACHE_DIR to a folder that can be written ({reason})",
        )


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call; it releases the GIL."""
    compiled = numba.njit(nogil=True)(function)
    try:
        compiled._cache = _Kept(function)
    except RuntimeError as error:  # no folder can be written
        compiled._cache = _NotKept(error)
    return compiled
