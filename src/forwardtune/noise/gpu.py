"""The noise sweeps for CUDA tensors, compiled by Triton: the bits of :mod:`.definition` in one pass over the memory.

A program handles one tile. A thread computes whole Philox blocks, so the eight elements of a block, 16 bytes in half
precision, are its own; a gather from the scaled table, which stays in the first-level cache, and one float32 addition
do the rest. Kernels are launched without fused multiply-adds, and no launch waits for the device.

bfloat16 storage is seen as int16 and converted by integer arithmetic, which is the same on every GPU and in Triton's
interpreter, which cuts bfloat16 off.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import definition
from .definition import ROUNDING_PROBE, Update, perturb_factored, strips, update_factored  # noqa: F401
from .directions import DIRECTIONS, Direction
from .philox import ROUNDS, split_seed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Perturbing takes two Philox blocks a thread and still 32 registers, which every warp of a multiprocessor can have.
# Rounding and counting need more registers: an update takes one block a thread. Widths of embeddings are small
# multiples of 1,024.
_TILE, _WARPS = 2048, 4
_ROW_TILE, _ROW_WARPS = 1024, 2
_UPDATE_TILE, _UPDATE_WARPS = 1024, 4
# Terms fused into one sweep: their tables, 16 KiB each, should leave half of the smallest first-level caches free.
_FUSED_TERMS = 4

_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(ROUNDS)
_ROUNDING = tl.constexpr(ROUNDING_PROBE - 2**32)  # as the signed word that counters are passed as
_SIGN = tl.constexpr(0x80000000)
_SMALLEST_NORMAL_HALF = tl.constexpr(2.0**-14)
_HALF_SPACING, _PER_HALF_SPACING = tl.constexpr(2.0**-24), tl.constexpr(2.0**24)  # a division is approximate


# --- conversions -----------------------------------------------------------------------------------------------------


@triton.jit
def _widen(stored):  # type: ignore[no-untyped-def]  # Triton's types are not Python's
    """Stored value -> float32, exactly."""
    if stored.dtype == tl.int16:
        x = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = stored.to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 -> stored value, to nearest, ties to even."""
    if dtype == tl.int16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        stored = tl.where(x != x, 0x7FC0, rounded).to(tl.int16)
    else:
        stored = x.to(dtype)
    return stored


@triton.jit  # type: ignore[untyped-decorator]
def _round(x, random, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """See :func:`.definition.round_stochastically`."""
    dropped: tl.constexpr = 16 if dtype == tl.int16 else 13
    bits = x.to(tl.uint32, bitcast=True)
    carried = ((bits + (random >> (16 - dropped))) >> dropped) << dropped
    rounded = carried.to(tl.float32, bitcast=True)
    if dropped == 13:
        magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        small = magnitude < _SMALLEST_NORMAL_HALF
        units = tl.where(small, magnitude * _PER_HALF_SPACING, 0.0)  # at most 1,024: fits the integer below
        whole = units.to(tl.int32)
        part = ((units - whole.to(tl.float32)) * 65536.0).to(tl.int32)
        fixed = (whole + ((part + random.to(tl.int32)) >> 16)).to(tl.float32) * _HALF_SPACING
        signed = (fixed.to(tl.uint32, bitcast=True) | (bits & _SIGN)).to(tl.float32, bitcast=True)
        rounded = tl.where(small, signed, rounded)
    # The NaN that a GPU computes is 0x7FFFFFFF: a carry would turn it into a zero.
    return tl.where(x != x, x, rounded)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _half_words(first, k0, k1, tensor, step, probe, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """The half-words of the ``size`` elements from block ``first`` on, as uint32. Words come as int32, bit for bit."""
    c0 = first + tl.arange(0, size // 8).to(tl.uint32)
    c1 = tensor.to(tl.uint32, bitcast=True)
    c2 = step.to(tl.uint32, bitcast=True)
    c3 = probe.to(tl.uint32, bitcast=True)
    a0 = k0.to(tl.uint32, bitcast=True)
    a1 = k1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ a0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ a1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        a0 = a0 + _W0
        a1 = a1 + _W1
    # join adds a last dimension of two: words 0, 1, 2, 3 of each block, then the two halves of each word.
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [size])


_WORDS = ["first", "shift", "k0", "k1", "tensor", "step", "probe"]


@triton.jit(do_not_specialize=_WORDS)  # type: ignore[untyped-decorator]
def _perturb(out, source, table, count, offset, first, shift, k0, k1, tensor, step, probe, size: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = tl.program_id(0)
    position = tile.to(tl.int64) * size + tl.arange(0, size) - offset
    inside = (position >= 0) & (position < count)
    block = first.to(tl.uint32, bitcast=True) + tile.to(tl.uint32) * (size // 8)
    z = tl.load(table + (_half_words(block, k0, k1, tensor, step, probe, size) >> shift))
    # Past the first-level cache, which is the table's.
    x = _widen(tl.load(source + position, mask=inside, other=0, cache_modifier=".cg"))
    tl.store(out + position, _narrow(x + z, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_WORDS[1:])  # type: ignore[untyped-decorator]
def _perturb_rows(  # type: ignore[no-untyped-def]
    out, source, rows, table, width, shift, k0, k1, tensor, step, probe, aligned: tl.constexpr, size: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    start = tl.load(rows + i) * width
    column = tile * size + tl.arange(0, size)
    if not aligned:  # rows then begin inside a block
        column = column - (start & 7).to(tl.int32)
    inside = (column >= 0) & (column < width)
    block = (start >> 3).to(tl.uint32) + tile.to(tl.uint32) * (size // 8)
    z = tl.load(table + (_half_words(block, k0, k1, tensor, step, probe, size) >> shift))
    x = _widen(tl.load(source + start + column, mask=inside, other=0, cache_modifier=".cg"))
    tl.store(out + i * width + column, _narrow(x + z, out.dtype.element_ty), mask=inside)


@triton.jit
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit(do_not_specialize=["steps", "first", "shift", "k0", "k1", "tensor"])  # type: ignore[untyped-decorator]
def _update(  # type: ignore[no-untyped-def]
    weight, unchanged, tables, plan, steps, count, offset, first, shift, k0, k1, tensor,
    entries: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = weight.dtype.element_ty
    tile = tl.program_id(0)
    position = tile.to(tl.int64) * size + tl.arange(0, size) - offset
    inside = (position >= 0) & (position < count)
    block = first.to(tl.uint32, bitcast=True) + tile.to(tl.uint32) * (size // 8)
    x = _widen(tl.load(weight + position, mask=inside, other=0, cache_modifier=".cg"))
    same = tl.full([size], 0, tl.int32)
    term = tl.full([], 0, tl.int32)
    for s in range(steps):
        step = tl.load(plan + s)
        end = tl.load(plan + steps + s)
        before = x
        x = x * tl.load(plan + 2 * steps + s).to(tl.float32, bitcast=True)  # by 1: the same bits as not at all
        for t in range(term, end):
            probe = tl.load(plan + 3 * steps + t)
            index = _half_words(block, k0, k1, tensor, step, probe, size) >> shift
            x = x + tl.load(tables + t * entries + index)
        term = end
        if dtype != tl.float32:
            rounding = tl.full([], _ROUNDING, tl.int32)
            x = _round(x, _half_words(block, k0, k1, tensor, step, rounding, size), dtype)
            if dtype == tl.float16:  # large values become infinite; of bfloat16 they are that already
                x = _widen(_narrow(x, dtype))
        same += ((x == before) & inside).to(tl.int32)
    tl.store(weight + position, _narrow(x, dtype), mask=inside)
    tl.atomic_add(unchanged, tl.reduce(same, 0, _add).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["first", "k0", "k1", "tensor", "step"])  # type: ignore[untyped-decorator]
def _store(weight, values, unchanged, count, offset, first, k0, k1, tensor, step, size: tl.constexpr):  # type: ignore[no-untyped-def]
    dtype: tl.constexpr = weight.dtype.element_ty
    tile = tl.program_id(0)
    position = tile.to(tl.int64) * size + tl.arange(0, size) - offset
    inside = (position >= 0) & (position < count)
    block = first.to(tl.uint32, bitcast=True) + tile.to(tl.uint32) * (size // 8)
    rounding = tl.full([], _ROUNDING, tl.int32)
    x = tl.load(values + position, mask=inside, other=0)
    stored = _narrow(_round(x, _half_words(block, k0, k1, tensor, step, rounding, size), dtype), dtype)
    before = _widen(tl.load(weight + position, mask=inside, other=0))
    same = ((_widen(stored) == before) & inside).to(tl.int32)
    tl.store(weight + position, stored, mask=inside)
    tl.atomic_add(unchanged, tl.reduce(same, 0, _add).to(tl.int64), sem="relaxed")


# --- calls -----------------------------------------------------------------------------------------------------------


def directions(
    direction: Direction, seed: int, tensor: int, step: int, probe: int, start: int, count: int, device: torch.device
) -> Tensor:
    """See :func:`.definition.directions`: z itself, float32, shape ``(count,)``."""
    z = torch.zeros(count, dtype=torch.float32, device=device)
    perturb(z, z, direction, seed, tensor, step, probe, 1.0, start)  # no entry is -0, so 0 + z is z
    return z


def perturb(
    out: Tensor, source: Tensor, direction: Direction, seed: int, tensor: int, step: int, probe: int, scale: float,
    start: int = 0,
) -> None:  # fmt: skip
    """See :func:`.definition.perturb`."""
    count, offset = source.numel(), start % 8
    if count == 0:
        return
    with _on(source.device):
        _perturb[(triton.cdiv(count + offset, _TILE),)](
            _stored(out), _stored(source), _table(direction, repr(float(scale)), source.device, _stream(source.device)),
            count, offset, _signed(start // 8), direction.shift, *_key(seed), *map(_signed, (tensor, step, probe)),
            **_options(_TILE, _WARPS),
        )  # fmt: skip


def perturb_rows(
    out: Tensor, source: Tensor, rows: Tensor, direction: Direction, seed: int, tensor: int, step: int, probe: int,
    scale: float,
) -> None:  # fmt: skip
    """``out[i] <- source[rows[i]] + scale * z[rows[i]]``: the rows of a table that an embedding looks up.

    Args:
        out: shape ``(len(rows), width)``.
        source: shape ``(height, width)``.
        rows: int64 row numbers, each within the table.
    """
    width = source.shape[1]
    if out.numel() == 0:
        return
    aligned = width % 8 == 0
    with _on(source.device):
        _perturb_rows[(len(rows), triton.cdiv(width + (0 if aligned else 7), _ROW_TILE))](
            _stored(out), _stored(source), rows,
            _table(direction, repr(float(scale)), source.device, _stream(source.device)),
            width, direction.shift, *_key(seed), *map(_signed, (tensor, step, probe)),
            aligned=aligned, **_options(_ROW_TILE, _ROW_WARPS),
        )  # fmt: skip


def update(
    weight: Tensor, updates: Sequence[Update], direction: Direction, seed: int, tensor: int, start: int = 0
) -> Tensor:
    """See :func:`.definition.update`. Several steps are applied in one sweep over the weights.

    Returns:
        The count as an int64 scalar on the device: reading it waits for the sweep.
    """
    count, offset = weight.numel(), start % 8
    active = [item for item in updates if not item.is_empty]
    unchanged = torch.full((), (len(updates) - len(active)) * count, dtype=torch.int64, device=weight.device)
    if count == 0:
        return unchanged
    stored = _stored(weight)
    with _on(weight.device):
        for fused in _sweeps(active):
            tables, plan = _plan(fused, repr(fused), direction, weight.device, _stream(weight.device))
            _update[(triton.cdiv(count + offset, _UPDATE_TILE),)](
                stored, unchanged, tables, plan, len(fused),
                count, offset, _signed(start // 8), direction.shift, *_key(seed), _signed(tensor),
                entries=direction.values.numel(), **_options(_UPDATE_TILE, _UPDATE_WARPS),
            )  # fmt: skip
    return unchanged


def store(weight: Tensor, x: Tensor, seed: int, tensor: int, step: int, start: int = 0) -> Tensor:
    """See :func:`.definition.store`; for half precision. The count is an int64 scalar on the device."""
    count, offset = weight.numel(), start % 8
    unchanged = torch.zeros((), dtype=torch.int64, device=weight.device)
    if count == 0:
        return unchanged
    with _on(weight.device):
        _store[(triton.cdiv(count + offset, _UPDATE_TILE),)](
            _stored(weight), x, unchanged, count, offset, _signed(start // 8), *_key(seed), _signed(tensor), _signed(step),
            **_options(_UPDATE_TILE, _UPDATE_WARPS),
        )  # fmt: skip
    return unchanged


def trouble(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the definition should serve this device and dtype instead; None if the kernels compile and give its bits.

    Tried on a few thousand weights, once a device and dtype by the caller: a compiler that is not as it should be must not cost a run its bits.
    """
    weight = torch.linspace(-3, 3, 2 * _TILE, device="cpu").pow(9).to(dtype).reshape(-1, 512)
    rows = torch.tensor([5, 0, 3], device="cpu")
    updates = [Update(1, (1e-4, 0.0, -3e-2)), Update(2, (1e-6,), decay=0.75)]
    try:
        for direction in DIRECTIONS.values():
            here = weight.to(device, copy=True)
            out, some = torch.empty_like(here), here[rows.to(device)]
            perturb(out.view(-1), here.view(-1), direction, 1, 2, 3, 4, 1e-2)
            perturb_rows(some, here, rows.to(device), direction, 1, 2, 3, 4, 1e-2)
            count = int(update(here.view(-1), updates, direction, 1, 2))

            expected, updated = torch.empty_like(weight), weight.clone()
            definition.perturb(expected.view(-1), weight.view(-1), direction, 1, 2, 3, 4, 1e-2)
            expected_count = definition.update(updated.view(-1), updates, direction, 1, 2)
            pairs = [(out, expected), (some, expected[rows]), (here, updated)]
            if dtype != torch.float32:
                moved = updated.float() * 1.001
                there = here.clone()
                count += int(store(there.view(-1), moved.to(device).view(-1), 1, 2, 3))
                stored = updated.clone()
                expected_count += definition.store(stored.view(-1), moved.view(-1), 1, 2, 3)
                pairs.append((there, stored))
            if count != expected_count or not all(torch.equal(a.cpu(), b) for a, b in pairs):
                return "its kernels give other bits here; please report the GPU and the version of Triton"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler and a driver can fail in more ways than have a common class
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


# --- arguments -------------------------------------------------------------------------------------------------------
# What the host prepares is kept, as all tensors of a step share it, and copied without waiting for the device. It
# belongs to the stream that copied it. Numbers are also told apart by their text, because 0.0 and -0.0 are equal.


@functools.lru_cache(maxsize=32)
def _table(direction: Direction, scale: str, device: torch.device, stream: int) -> Tensor:
    return _tables(direction, [float(scale)], device, stream)


@functools.lru_cache(maxsize=32)
def _plan(
    updates: tuple[Update, ...], text: str, direction: Direction, device: torch.device, stream: int
) -> tuple[Tensor, Tensor]:
    """One table a term; and each step's number, the end of its terms and its decay, then each term's probe."""
    terms = [[(probe, size) for probe, size in enumerate(item.sizes) if size != 0.0] for item in updates]
    ends = itertools.accumulate(len(step) for step in terms)
    decays = torch.tensor([item.decay for item in updates], dtype=torch.float32, device="cpu").view(torch.int32)
    plan = [
        *(_signed(item.step) for item in updates),
        *ends,
        *decays.tolist(),
        *(_signed(probe) for step in terms for probe, _ in step),
    ]
    sizes = [size for step in terms for _, size in step]
    return _tables(direction, sizes, device, stream), _sent(plan, torch.int32, device)


def _tables(direction: Direction, scales: Sequence[float], device: torch.device, stream: int) -> Tensor:
    """``direction.table(scale)`` for each scale, computed on the device: shape ``(len(scales), entries)``."""
    factors = _sent(scales, torch.float64, device)
    return (_values(direction, device, stream) * factors.unsqueeze(1)).float()


@functools.lru_cache(maxsize=32)
def _values(direction: Direction, device: torch.device, stream: int) -> Tensor:
    return _sent(direction.values.tolist(), torch.float64, device)


def _sent(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.tensor(numbers, dtype=dtype, device="cpu")  # whatever the default device is
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _sweeps(updates: Sequence[Update]) -> list[tuple[Update, ...]]:
    """Consecutive steps with at most ``_FUSED_TERMS`` terms together; a step is never cut."""
    sweeps: list[list[Update]] = []
    terms = 0
    for item in updates:
        more = sum(size != 0.0 for size in item.sizes)
        if not sweeps or terms + max(1, more) > _FUSED_TERMS:
            sweeps.append([])
            terms = 0
        sweeps[-1].append(item)
        terms += max(1, more)
    return [tuple(sweep) for sweep in sweeps]


def _stored(tensor: Tensor) -> Tensor:
    """The storage in the type that selects the conversions."""
    return tensor.detach().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor.detach()


def _signed(word: int) -> int:
    """A 32-bit word as the signed integer with its bits: Triton would compile another kernel for each wider type."""
    return word - 2**32 if word >= 2**31 else word


def _key(seed: int) -> tuple[int, int]:
    k0, k1 = split_seed(seed)
    return _signed(k0), _signed(k1)


def _options(tile: int, warps: int) -> dict[str, Any]:
    # A fused multiply-add rounds once where the definition rounds twice.
    return {"size": tile, "num_warps": warps, "enable_fp_fusion": False}


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
