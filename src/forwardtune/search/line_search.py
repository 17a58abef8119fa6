"""L0: the best step along a ray, from a few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def line_search(loss_at: Callable[[float], float], start: float, *, most: int) -> LineSearch:
    """Minimise the loss over 0 and the sizes ``start * 10^(k/2)``, for integers k, by walking downhill from ``start``.

    The walk goes upwards if the first step up is better than both ``start`` and 0, else downwards, and ends when the loss
    no longer falls; but as long as no size is better than 0 it goes on downwards. A loss that is not finite counts as
    infinite, so the walk leaves a region where the model breaks.

    Args:
        loss_at: the loss at a size; the same examples every time, so that differences are not those of samples.
        start: a guess, positive.
        most: evaluations at most, that at 0 included; at least 3.

    Raises:
        ValueError: ``start`` is not positive and finite, or ``most`` below 3.
    """
    if not 0 < start < math.inf:
        raise ValueError(f"start must be positive, got {start!r}")
    if most < 3:
        raise ValueError(f"a search needs 3 evaluations or more, got most={most!r}")
    tried: dict[int | None, float] = {}

    def size(k: int | None) -> float:
        return 0.0 if k is None else start * RATIO**k

    def at(k: int | None) -> float:
        if k not in tried:
            loss = loss_at(size(k))
            tried[k] = loss if math.isfinite(loss) else math.inf
        return tried[k]

    untuned = at(None)
    step, k = (1, 1) if min(at(0), untuned) > at(1) else (-1, 0)
    while len(tried) < most:
        if at(k + step) >= at(k) and at(k) < untuned:
            break
        k += step
    best = min(tried, key=lambda k: (tried[k], k is not None))
    return LineSearch({size(k): loss for k, loss in tried.items()}, size(best))
