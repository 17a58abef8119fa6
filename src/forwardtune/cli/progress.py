"""Progress bars on stderr."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def bar(total: int, description: str, unit: str, initial: int = 0) -> Any:
    """A progress bar on stderr: speed and time left; rarely redrawn when nobody watches."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        mininterval=0.2 if watched else 10.0,
        dynamic_ncols=True,
        file=sys.stderr if watched else _Lines(),
    )


class _Lines(io.TextIOBase):
    """Where nobody watches, a bar is drawn as lines: nothing that moves a cursor goes into a file."""

    def write(self, text: str) -> int:
        if shown := text.replace("\r", "").replace("\x1b[A", "").strip():
            print(shown, file=sys.stderr)
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def reach(progress: Any) -> Callable[[int, int], object]:
    """A function that moves the bar to ``done`` of so many."""

    def reached(done: int, total: int) -> None:
        progress.total = total
        progress.update(done - progress.n)

    return reached
