"""The noise sweeps in plain torch: slow, obvious, on any device. Every fast path must give these bits.

All functions work on flat, contiguous storage. ``start`` is the row-major index, in the full tensor, of the first
element that is passed, so a shard gives the same bits as the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

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

#: Numbers that the host knows, or an int64 tensor of them on the device at hand.
Places: TypeAlias = "Sequence[int] | Tensor"


@dataclass(frozen=True)
class Update:
    """One optimizer step for one tensor: ``theta <- round(decay * theta + sum_k sizes[k] * z(step, k))``.

    The multiplication comes first and is left out when ``decay`` is 1; terms are added in the order of k, and those of
    size 0 are left out. Arithmetic is float32 (float64 for float64 weights). Half-precision weights are then rounded
    stochastically, float32 weights need no rounding.

    Attributes:
        unused: ids of the tensors that the step leaves alone.
        unread: which rows of a tensor, by id, were not read up to the step, and are left alone too: bool, shape (rows,).
    """

    step: int
    sizes: tuple[float, ...]
    decay: float = 1.0
    unused: frozenset[int] = field(default=frozenset(), kw_only=True)
    unread: Mapping[int, Tensor] = field(default_factory=dict, kw_only=True, compare=False, repr=False)

    @property
    def is_empty(self) -> bool:
        """True when the step leaves every weight as it is."""
        return self.decay == 1.0 and not any(self.sizes)

    @property
    def terms(self) -> list[tuple[int, float]]:
        """Probe and size of what is added, in order."""
        return [(probe, size) for probe, size in enumerate(self.sizes) if size != 0.0]


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


def strips(
    direction: Direction, seed: int, tensor: int, steps: Sequence[int], probes: Places, starts: Places,
    scales: Sequence[float], count: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """Entry t: ``scales[t] * z`` at ``(steps[t], probes[t])`` for ``count`` elements from ``starts[t]`` on; float32, shape
    ``(number of strips, count)``. Steps and scales may be one for all."""
    number = len(probes)
    places = zip(_each(steps, number), _each(probes, number), _each(starts, number), _each(scales, number), strict=True)
    out = torch.empty(number, count, dtype=torch.float32, device=device)
    for row, (step, probe, start, scale) in zip(out, places, strict=True):
        row.copy_(directions(direction, seed, tensor, step, probe, start, count, scale=scale, device=device))
    return out


class Terms(NamedTuple):
    """At which steps and probes strips are drawn, and what they are scaled with. Steps and scales may be one for all."""

    steps: Sequence[int]
    probes: Sequence[int]
    scales: Sequence[float]


class Strips(NamedTuple):
    """What :func:`strips` is asked for, but for direction and seed, of several tensors that differ in their numbers alone."""

    tensors: tuple[int, ...]
    start: int
    length: int
    terms: Terms


def many_strips(
    direction: Direction, seed: int, many: Sequence[Strips], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """:func:`strips` of many tensors, rounded to a dtype; each of shape ``(number of tensors, number of probes, length)``."""

    def drawn(each: Strips, tensor: int) -> Tensor:
        terms = each.terms
        return strips(
            direction, seed, tensor, terms.steps, terms.probes, [each.start], terms.scales, each.length, device
        )

    return [torch.stack([drawn(each, tensor) for tensor in each.tensors]).to(dtype) for each in many]


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


def perturb_factored(out: Tensor, source: Tensor, u: Tensor, v: Tensor, start: int = 0) -> None:
    """``out <- source + u v^T``: one rounded product and one rounded addition per element and column, columns in order.

    Args:
        u: the rows that are touched, from number ``start // width`` on: float32, shape ``(rows, rank)``.
        v: float32, shape ``(width, rank)``.
    """
    for lo in range(0, source.numel(), _CHUNK):
        x = _widen(source[lo : lo + _CHUNK])
        for product in _products(u, v, start, lo, x):
            x = x + product
        out[lo : lo + _CHUNK] = x.to(out.dtype)


def update(
    weight: Tensor, updates: Sequence[Update], direction: Direction, seed: int, tensor: int, start: int = 0
) -> Count:
    """Apply steps in order to ``weight``, in place.

    Returns:
        The number of (element, step) pairs whose stored value did not change.
    """

    def added(number: int, lo: int, x: Tensor) -> Iterator[Tensor]:
        item = updates[number]
        for probe, size in item.terms:
            where = (probe, start + lo, x.numel())
            yield directions(direction, seed, tensor, item.step, *where, scale=size, device=x.device)

    return _apply(weight, updates, added, seed, tensor, start)


def update_factored(
    weight: Tensor, updates: Sequence[Update], u: Tensor, v: Tensor, seed: int, tensor: int, start: int = 0
) -> Count:
    """As :func:`update`, with the products of these factors for its terms.

    Args:
        u: one entry for every term of every step, scaled with its size, in order; each as in :func:`perturb_factored`.
        v: as many.
    """
    ends = list(accumulate((len(item.terms) for item in updates), initial=0))

    def added(number: int, lo: int, x: Tensor) -> Iterator[Tensor]:
        for term in range(ends[number], ends[number + 1]):
            yield from _products(u[term], v[term], start, lo, x)

    return _apply(weight, updates, added, seed, tensor, start)


def _products(u: Tensor, v: Tensor, start: int, lo: int, x: Tensor) -> Iterator[Tensor]:
    """What the columns of u and v add to x, which begins so many elements behind the first one."""
    width = len(v)
    element = torch.arange(start % width + lo, start % width + lo + x.numel(), device=x.device)
    rows, columns = element // width, element % width
    for left, right in zip(u.T.to(x.dtype), v.T.to(x.dtype), strict=True):
        yield left[rows] * right[columns]


def _apply(
    weight: Tensor,
    updates: Sequence[Update],
    added: Callable[[int, int, Tensor], Iterator[Tensor]],
    seed: int,
    tensor: int,
    start: int,
) -> Count:
    """``added(i, lo, x)``: what step i adds to the piece x that begins at element ``lo`` of the weight."""
    unchanged: Count = 0
    for lo in range(0, weight.numel(), _CHUNK):
        piece = weight[lo : lo + _CHUNK]
        for number, item in enumerate(updates):
            if item.is_empty:
                unchanged += piece.numel()
                continue
            x = _widen(piece)
            if item.decay != 1.0:
                x = x * torch.tensor(item.decay, dtype=torch.float32, device=x.device)
            for term in added(number, lo, x):
                x = x + term
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


def _each(numbers: Sequence[Any] | Tensor, count: int) -> list[Any]:
    values = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    return values * count if len(values) == 1 else values
