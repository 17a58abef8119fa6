"""L0: the best step along a ray, from a few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

# Two points a decade: the loss along the ray is flat around its minimum, and rises within a factor of about four of it.
RATIO = 10**0.5


@dataclass(frozen=True)
class LineSearch:
    """What a search found.

    Attributes:
        tried: loss by size, in the order of evaluation; size 0 is where the ray begins. Infinite where it was not finite.
        best: the size with the smallest loss; 0 if none was smaller than that at 0.
    """

    tried: dict[float, float]
    best: float


def line_search(
    loss_at: Callable[[float], float], start: float, *, most: int, floor: float | None = None
) -> LineSearch:
    """Minimise the loss over sizes ``start * 10^(k/2)``, for integers k, by walking downhill from ``start``.

    The walk goes upwards if the first step up is better than both ``start`` and 0, else downwards, and ends when the loss
    no longer falls; but as long as no size is better than 0 it goes on downwards. A loss that is not finite counts as
    infinite, so the walk leaves a region where the model breaks.

    Args:
        loss_at: the loss at a size; the same examples every time, so that differences are not those of samples.
        start: a guess, positive.
        most: losses at most, that at 0 included, known or not; at least 3.
        floor: the loss at 0, if it is known.

    Raises:
        ValueError: ``start`` is not positive and finite, or ``most`` below 3.
    """
    asking = search(start, most=most, floor=floor)
    size = next(asking)
    while True:
        try:
            size = asking.send(loss_at(size))
        except StopIteration as end:
            found: LineSearch = end.value
            return found


def search(start: float, *, most: int, floor: float | None = None) -> Generator[float, float, LineSearch]:
    """:func:`line_search` as a generator: it yields a size, is sent the loss there, and returns what it found."""
    if not 0 < start < math.inf:
        raise ValueError(f"start must be positive, got {start!r}")
    if most < 3:
        raise ValueError(f"a search needs 3 evaluations or more, got most={most!r}")
    tried: dict[int | None, float] = {None: _finite((yield 0.0) if floor is None else floor)}

    def at(k: int) -> Generator[float, float, float]:
        if k not in tried:
            tried[k] = _finite((yield start * RATIO**k))
        return tried[k]

    k = 0
    step = 1 if min((yield from at(0)), tried[None]) > (yield from at(1)) else -1
    if step > 0:
        k = 1
    while len(tried) < most:
        if (yield from at(k + step)) >= (yield from at(k)) and tried[k] < tried[None]:
            break
        k += step
    best = min(tried, key=lambda k: (tried[k], k is not None))
    sizes = {0.0 if k is None else start * RATIO**k: loss for k, loss in tried.items()}
    return LineSearch(sizes, 0.0 if best is None else start * RATIO**best)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
