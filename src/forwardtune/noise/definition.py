"""The noise sweeps in plain torch: slow, obvious, on any device. Every fast path must give these bits.

All functions work on flat, contiguous storage. ``start`` is the row-major index, in the full tensor, of the first
element that is passed, so a shard gives the same bits as the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from .directions import Direction
from .philox import half_words

#: The probe number whose half-words drive stochastic rounding; no direction uses it.
ROUNDING_PROBE = 0xFFFFFFFF

# Elements handled at once: bounds the int64 temporaries of the plain path.
_CHUNK = 1 << 20

#: How many stored values a sweep left as they were: a number, or an int64 scalar on the weight's device that was not read yet,
#: because reading it waits for the sweep.
Count: TypeAlias = "int | Tensor"


@dataclass(frozen=True)
class Update:
    """One optimizer step for one tensor: ``theta <- round(decay * theta + sum_k sizes[k] * z(step, k))``.

    The multiplication comes first and is left out when ``decay`` is 1; terms are added in the order of k, and those of
    size 0 are left out. Arithmetic is float32 (float64 for float64 weights). Half-precision weights are then rounded
    stochastically, float32 weights need no rounding.

    Attributes:
        unused: ids of the tensors that the step leaves alone.
    """

    step: int
    sizes: tuple[float, ...]
    decay: float = 1.0
    unused: frozenset[int] = field(default=frozenset(), kw_only=True)

    @property
    def is_empty(self) -> bool:
        """True when the step leaves every weight as it is."""
        return self.decay == 1.0 and not any(self.sizes)


def directions(
    direction: Direction,
    seed: int,
    tensor: int,
    step: int,
    probe: int,
    start: int,
    count: int,
    *,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``scale * z`` for ``count`` elements of one tensor, float32, shape ``(count,)``."""
    index = half_words(seed, tensor, step, probe, start, count, device) >> direction.shift
    return direction.table(scale).to(device)[index]


def perturb(
    out: Tensor, source: Tensor, direction: Direction, seed: int, tensor: int, step: int, probe: int, scale: float,
    start: int = 0,
) -> None:  # fmt: skip
    """``out <- source + scale * z``, added in float32 and rounded to nearest in the dtype of ``out``."""
    for lo in range(0, source.numel(), _CHUNK):
        piece = source[lo : lo + _CHUNK]
        z = directions(
            direction, seed, tensor, step, probe, start + lo, piece.numel(), scale=scale, device=source.device
        )
        out[lo : lo + _CHUNK] = (_widen(piece) + z).to(out.dtype)


def update(
    weight: Tensor, updates: Sequence[Update], direction: Direction, seed: int, tensor: int, start: int = 0
) -> Count:
    """Apply steps in order to ``weight``, in place.

    Returns:
        The number of (element, step) pairs whose stored value did not change.
    """
    unchanged: Count = 0
    for lo in range(0, weight.numel(), _CHUNK):
        piece = weight[lo : lo + _CHUNK]
        where = (start + lo, piece.numel())
        for item in updates:
            if item.is_empty:
                unchanged += piece.numel()
                continue
            x = _widen(piece)
            if item.decay != 1.0:
                x = x * torch.tensor(item.decay, dtype=torch.float32, device=x.device)
            for probe, size in enumerate(item.sizes):
                if size != 0.0:
                    x = x + directions(
                        direction, seed, tensor, item.step, probe, *where, scale=size, device=weight.device
                    )
            unchanged += _store(piece, x, seed, tensor, item.step, start + lo)
    return unchanged


def store(weight: Tensor, x: Tensor, seed: int, tensor: int, step: int, start: int = 0) -> Count:
    """``weight <- round(x)`` as :func:`update` ends: stochastically with the step's bits in half precision, else exactly.

    Args:
        weight: flat storage.
        x: float32 values (float64 for float64 weights), as many.

    Returns:
        The number of elements whose stored value did not change.
    """
    return sum(
        _store(weight[lo : lo + _CHUNK], x[lo : lo + _CHUNK], seed, tensor, step, start + lo)
        for lo in range(0, weight.numel(), _CHUNK)
    )


def _store(piece: Tensor, x: Tensor, seed: int, tensor: int, step: int, start: int) -> Count:
    if piece.dtype in (torch.bfloat16, torch.float16):
        random = half_words(seed, tensor, step, ROUNDING_PROBE, start, piece.numel(), piece.device)
        x = round_stochastically(x, random, piece.dtype)
    x = x.to(piece.dtype)
    unchanged = (x == piece).sum()
    piece.copy_(x)
    return unchanged


def round_stochastically(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to a value of ``dtype``, up in magnitude with the probability of the part cut off.

    The expectation of the result is x, to within 2**-16 of the spacing: updates far below half a unit in the last place
    are kept on average, where rounding to nearest would drop them.

    Args:
        x: float32 values.
        random: int64 values from 0 to 65,535, one for each x.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        float32 values that ``dtype`` represents exactly (or that overflow it).
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    # The carry of the addition into the kept bits is the rounding up; it moves across exponents correctly.
    bits = (bits + (random >> (16 - dropped))) & (0xFFFFFFFF << dropped) & 0xFFFFFFFF
    rounded = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:
        # Below 2**-14 float16 has the fixed spacing 2**-24.
        units = x.abs() * 2.0**24
        whole = units.floor()
        carry = (((units - whole) * 65536.0).to(torch.int64) + random) >> 16
        fixed = torch.copysign((whole + carry.float()) * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, fixed, rounded)
    # A carry would make zero of a NaN whose kept bits are all ones, as GPUs compute them.
    return torch.where(x.isnan(), x, rounded)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
