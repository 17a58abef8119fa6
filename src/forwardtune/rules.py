"""L2: how coefficients move the weights.

A rule turns one step's coefficients into an :class:`~forwardtune.noise.Update`: float32 multiples of the step's
directions, and a factor for weight decay. Training and replay call the same function, so they cannot disagree.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .noise import Update


def sgd(step: int, coefficients: Sequence[float], lr: float, weight_decay: float = 0.0) -> Update:
    """Stochastic gradient descent with decoupled weight decay.

    ``theta <- (1 - lr * weight_decay) * theta - lr * (1/n) * sum_k c_k z_k``

    Sizes and factor are computed in float64 and rounded to float32 once.

    Source: MeZO, algorithm 1 (n = 1) and algorithm 2 (n-SPSA); decoupled decay as in AdamW.
    """
    count = len(coefficients)
    return Update(
        step=step,
        sizes=tuple(_float32(-lr * c / count) for c in coefficients),
        decay=_float32(1.0 - lr * weight_decay),
    )


def _float32(x: float) -> float:
    """The nearest float32 value; OverflowError beyond its range."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


RULES = {"sgd": sgd}
