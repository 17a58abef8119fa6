"""The noise sweeps for CPU tensors, compiled by Numba: the bits of :mod:`.definition` at the speed of memory.

A sweep walks a tensor in tiles of 512 elements. The half-words of a tile come from 64 Philox blocks computed side by
side, which the compiler turns into vector instructions; a gather from the scaled table and one float32 addition do the
rest. Large tensors are cut into one range per torch thread.

bfloat16 storage is seen as uint16 and float16 as int16: the storage type selects the conversions below.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache, NullCache
from numba.extending import intrinsic
from torch import Tensor

from ..errors import warn
from .definition import ROUNDING_PROBE, Update, perturb_factored, strips, update_factored  # noqa: F401
from .directions import RADEMACHER, Direction
from .philox import split_seed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BLOCKS = 64
_TILE = 8 * _BLOCKS
# Below so many elements a thread, another thread costs more than it saves. It costs much more between two modules of a
# forward pass: torch's own threads still spin on the other cores there, waiting for the next operation.
_MIN_PER_THREAD = 1 << 16
_MIN_PER_THREAD_IN_FORWARD = 1 << 22
# Steps fused into one sweep: their tables (16 KiB a term) should stay in the second-level cache.
_FUSED_STEPS = 8


# --- compiled code that is kept ----------------------------------------------------------------------------------------
# Numba keeps it beside this file or in the user's cache. Neither may be writable (a container), full or damaged: then the
# kernels are compiled anew, and nothing else changes.


class _Kept(FunctionCache):
    """Numba's cache of a function, of which no trouble with files gets out."""

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


def _kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call; it releases the GIL."""
    compiled = numba.njit(nogil=True)(function)
    try:
        compiled._cache = _Kept(function)
    except RuntimeError as error:  # no folder can be written
        compiled._cache = _NotKept(error)
    return compiled


# --- conversions -----------------------------------------------------------------------------------------------------
# LLVM has the half type and bit casts; Numba does not expose them on CPU. Each intrinsic is a line or two of LLVM.


@intrinsic
def _bits(context, x):  # type: ignore[no-untyped-def]  # Numba's calling convention
    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def _from_bits(context, x):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def _widen(context, x):  # type: ignore[no-untyped-def]
    """Stored value -> float32, exactly."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        (value,) = args
        if x == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16)), ir.FloatType())
        if x == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return types.float32(x), build


@intrinsic
def _narrow(context, x, like):  # type: ignore[no-untyped-def]
    """float32 -> stored value of the type of ``like``, to nearest, ties to even."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value = args[0]
        if like == types.uint16:
            i32 = ir.IntType(32)
            bits = builder.bitcast(value, i32)
            odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, i32(0x7FFF))), i32(16))
            is_nan = builder.fcmp_unordered("uno", value, value)
            return builder.trunc(builder.select(is_nan, i32(0x7FC0), rounded), ir.IntType(16))
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        return value

    return like(types.float32, like), build


@intrinsic
def _dropped_bits(context, like):  # type: ignore[no-untyped-def]
    """How many mantissa bits of float32 the stored type lacks; 0 for float32 itself."""
    count = {types.uint16: 16, types.int16: 13}.get(like, 0)

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.IntType(32)(count)

    return types.uint32(like), build


@numba.njit(inline="always")
def _round(x, random, like):  # type: ignore[no-untyped-def]
    dropped = _dropped_bits(like)
    carry = np.uint32(random) >> (np.uint32(16) - dropped)
    mask = np.uint32(np.uint32(0xFFFFFFFF) << dropped)
    rounded = _from_bits(np.uint32(np.uint32(_bits(x) + carry) & mask))
    if dropped == np.uint32(13):
        units = abs(x) * np.float32(2.0**24)
        whole = np.floor(units)
        up = (np.int32((units - whole) * np.float32(65536.0)) + np.int32(random)) >> np.int32(16)
        fixed = np.float32(whole + np.float32(up)) * np.float32(2.0**-24)
        if abs(x) < np.float32(2.0**-14):
            rounded = np.copysign(fixed, x)
    return rounded


# --- kernels ---------------------------------------------------------------------------------------------------------


@numba.njit(inline="always")
def _fill(words, first, tensor, step, probe, k0, k1):  # type: ignore[no-untyped-def]
    """The output of blocks ``first .. first + 63``, two 32-bit words in each 64-bit one.

    A counter word lives in the low half of a 64-bit lane, whatever the high half holds: the vector multiplication reads
    low halves only and leaves both halves of the product where they are wanted. In 32-bit lanes it took twice as long.
    """
    low = np.uint64(0xFFFFFFFF)
    for b in range(_BLOCKS):
        c0 = np.uint64(first) + np.uint64(b)
        c1 = np.uint64(tensor)
        c2 = np.uint64(step)
        c3 = np.uint64(probe)
        a0 = np.uint64(k0)
        a1 = np.uint64(k1)
        for _ in range(10):
            p0 = np.uint64(0xD2511F53) * (c0 & low)
            p1 = np.uint64(0xCD9E8D57) * (c2 & low)
            c0 = (p1 >> np.uint64(32)) ^ (c1 & low) ^ a0
            c1 = p1
            c2 = (p0 >> np.uint64(32)) ^ (c3 & low) ^ a1
            c3 = p0
            a0 = (a0 + np.uint64(0x9E3779B9)) & low
            a1 = (a1 + np.uint64(0xBB67AE85)) & low
        words[2 * b] = (c0 & low) | (c1 << np.uint64(32))
        words[2 * b + 1] = (c2 & low) | (c3 << np.uint64(32))


@numba.njit(inline="always")
def _gather(z, table, halves, shift):  # type: ignore[no-untyped-def]
    """``z <- table[halves >> shift]``. Apart from the addition, whose loop then vectorises in every dtype."""
    for i in range(_TILE):
        z[i] = table[halves[i] >> shift]


@_kernel
def _perturb(out, source, table, shift, k0, k1, tensor, step, probe, start, lo, hi):  # type: ignore[no-untyped-def]
    words = np.empty(2 * _BLOCKS, np.uint64)
    halves = words.view(np.uint16)
    z = np.empty(_TILE, np.float32)
    position = lo
    while position < hi:
        element = start + position
        tile = element // _TILE
        _fill(words, np.uint32(tile * _BLOCKS), tensor, step, probe, k0, k1)
        _gather(z, table, halves, shift)
        offset = element - tile * _TILE
        count = min(_TILE - offset, hi - position)
        if count == _TILE:
            target = out[position : position + _TILE]
            origin = source[position : position + _TILE]
            for i in range(_TILE):
                target[i] = _narrow(_widen(origin[i]) + z[i], origin[i])
        else:
            for i in range(count):
                out[position + i] = _narrow(_widen(source[position + i]) + z[offset + i], source[position + i])
        position += count


@_kernel
def _perturb_rows(out, source, rows, table, shift, k0, k1, tensor, step, probe, lo, hi):  # type: ignore[no-untyped-def]
    width = source.shape[1]
    zero = lo - lo  # an int64 as for other callers: for a literal 0 Numba would compile the callee once more
    for i in range(lo, hi):
        row = rows[i]
        _perturb(out[i], source[row], table, shift, k0, k1, tensor, step, probe, row * width, zero, width)


@_kernel
def _update(weight, tables, probes, ends, steps, decays, shift, k0, k1, tensor, start, lo, hi):  # type: ignore[no-untyped-def]
    # Whole tiles have loops of their own, of a length that the compiler knows: that halves the time.
    words = np.empty(2 * _BLOCKS, np.uint64)
    halves = words.view(np.uint16)
    x = np.empty(_TILE, np.float32)
    z = np.empty(_TILE, np.float32)
    before = np.empty(_TILE, np.float32)
    like = weight[0]
    half_precision = _dropped_bits(like) != 0
    unchanged = 0
    position = lo
    while position < hi:
        element = start + position
        tile = element // _TILE
        first = np.uint32(tile * _BLOCKS)
        offset = element - tile * _TILE
        count = min(_TILE - offset, hi - position)
        part = weight[position : position + count]
        if count == _TILE:
            for i in range(_TILE):
                x[i] = _widen(part[i])
        else:
            for i in range(count):
                x[offset + i] = _widen(part[i])
        term = 0
        for s in range(steps.shape[0]):
            for i in range(_TILE):
                before[i] = x[i]
            if decays[s] != np.float32(1.0):
                for i in range(_TILE):
                    x[i] = x[i] * decays[s]
            while term < ends[s]:
                _fill(words, first, tensor, steps[s], probes[term], k0, k1)
                _gather(z, tables[term], halves, shift)
                for i in range(_TILE):
                    x[i] = x[i] + z[i]
                term += 1
            if half_precision:
                _fill(words, first, tensor, steps[s], np.uint32(ROUNDING_PROBE), k0, k1)
                for i in range(_TILE):
                    x[i] = _widen(_narrow(_round(x[i], halves[i], like), like))
            same = np.int32(0)
            if count == _TILE:
                for i in range(_TILE):
                    same += np.int32(x[i] == before[i])
            else:
                for i in range(offset, offset + count):
                    same += np.int32(x[i] == before[i])
            unchanged += same
        if count == _TILE:
            for i in range(_TILE):
                part[i] = _narrow(x[i], like)
        else:
            for i in range(count):
                part[i] = _narrow(x[offset + i], like)
        position += count
    return unchanged


@_kernel
def _store(weight, x, k0, k1, tensor, step, start, lo, hi):  # type: ignore[no-untyped-def]
    words = np.empty(2 * _BLOCKS, np.uint64)
    halves = words.view(np.uint16)
    like = weight[0]
    unchanged = 0
    position = lo
    while position < hi:
        element = start + position
        tile = element // _TILE
        _fill(words, np.uint32(tile * _BLOCKS), tensor, step, np.uint32(ROUNDING_PROBE), k0, k1)
        offset = element - tile * _TILE
        count = min(_TILE - offset, hi - position)
        for i in range(count):
            stored = _narrow(_round(x[position + i], halves[offset + i], like), like)
            unchanged += np.int32(_widen(stored) == _widen(weight[position + i]))
            weight[position + i] = stored
        position += count
    return unchanged


# --- calls -----------------------------------------------------------------------------------------------------------


def perturb(
    out: Tensor, source: Tensor, direction: Direction, seed: int, tensor: int, step: int, probe: int, scale: float,
    start: int = 0,
) -> None:  # fmt: skip
    """See :func:`.definition.perturb`."""
    arguments = (*_drawn(direction, scale, seed), *_words(tensor, step, probe), start)
    kernel = partial(_perturb, _array(out), _array(source), *arguments)
    _spread(kernel, source.numel(), _TILE, _MIN_PER_THREAD_IN_FORWARD)


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
    arguments = (*_drawn(direction, scale, seed), *_words(tensor, step, probe))
    kernel = partial(_perturb_rows, _array(out), _array(source), rows.numpy(), *arguments)
    _spread(kernel, len(rows), 1, _MIN_PER_THREAD_IN_FORWARD // source.shape[1])


def update(
    weight: Tensor, updates: Sequence[Update], direction: Direction, seed: int, tensor: int, start: int = 0
) -> int:
    """See :func:`.definition.update`. Several steps are applied in one sweep over the weights."""
    array = _array(weight)
    active = [item for item in updates if not item.is_empty]
    unchanged = (len(updates) - len(active)) * weight.numel()
    for lo in range(0, len(active), _FUSED_STEPS):
        arguments = (*_plan(active[lo : lo + _FUSED_STEPS], direction, seed), *_words(tensor), start)
        unchanged += sum(_spread(partial(_update, array, *arguments), weight.numel(), _TILE, _MIN_PER_THREAD))
    return unchanged


def store(weight: Tensor, x: Tensor, seed: int, tensor: int, step: int, start: int = 0) -> int:
    """See :func:`.definition.store`; for half precision."""
    kernel = partial(_store, _array(weight), _array(x), *_words(*split_seed(seed)), *_words(tensor, step), start)
    return int(sum(_spread(kernel, weight.numel(), _TILE, _MIN_PER_THREAD))) if weight.numel() else 0


def compile_kernels(dtypes: Iterable[torch.dtype], buffered: bool, announce: Callable[[str], object]) -> None:
    """See :func:`forwardtune.noise.compile_kernels`."""
    kernels = (_perturb, _perturb_rows, _update, _store)

    def compiled() -> int:
        return sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels)

    before, announced = compiled(), False
    step = [Update(0, (1.0,))]
    for dtype in dtypes:
        weight, x, rows = torch.zeros(1, dtype=dtype), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        table = weight.view(1, 1)
        calls: list[Callable[[], object]] = [
            partial(perturb, weight, weight, RADEMACHER, 0, 0, 0, 0, 1.0),
            partial(perturb_rows, table, table, rows, RADEMACHER, 0, 0, 0, 0, 1.0),
            partial(update, weight, step, RADEMACHER, 0, 0),
        ]
        if buffered and dtype != torch.float32:
            calls += [partial(update, x, step, RADEMACHER, 0, 0), partial(store, weight, x, 0, 0, 0)]
        for call in calls:
            call()
            if compiled() > before and not announced:  # the first one, of several
                announced = True
                announce("compiling the noise kernels: this takes some seconds, once on a machine")


def _plan(updates: Sequence[Update], direction: Direction, seed: int) -> tuple[Any, ...]:
    """The steps as arrays: one table and probe number per term, and where each step's terms end."""
    terms = [[(probe, size) for probe, size in enumerate(item.sizes) if size != 0.0] for item in updates]
    sizes = np.array([size for step in terms for _, size in step], np.float64)
    # The same arithmetic as Direction.table, in NumPy: torch would wake its threads for it, which then spin beside ours.
    tables = (direction.values.numpy().astype(np.float64) * sizes[:, None]).astype(np.float32)
    return (
        tables,
        np.array([probe for step in terms for probe, _ in step], np.uint32),
        np.cumsum([len(step) for step in terms]),
        np.array([item.step for item in updates], np.uint32),
        np.array([item.decay for item in updates], np.float32),
        np.uint16(direction.shift),
        *_words(*split_seed(seed)),
    )


def _array(tensor: Tensor) -> np.ndarray:
    """The storage of a contiguous tensor as an array of the type that selects the conversions."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy()
    if tensor.dtype == torch.float16:
        return tensor.detach().view(torch.int16).numpy()
    return tensor.detach().numpy()


def _drawn(direction: Direction, scale: float, seed: int) -> tuple[Any, ...]:
    return direction.table(scale).numpy(), np.uint16(direction.shift), *_words(*split_seed(seed))


def _words(*values: int) -> tuple[np.uint32, ...]:
    return tuple(np.uint32(value) for value in values)


# --- threads ---------------------------------------------------------------------------------------------------------
# Plain threads that release the GIL, together with the caller as many as torch uses, and asleep between sweeps: Numba's
# own thread pool would spin beside torch's on the same cores.

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _spread(kernel: Callable[[int, int], Any], count: int, unit: int, least: int) -> list[Any]:
    """Run ``kernel(lo, hi)`` over ``0 .. count``: a range of at least ``least``, a multiple of ``unit``, for each thread.

    When it returns or raises, no thread is at work on it.
    """
    available = torch.get_num_threads()
    threads = min(available, max(1, count // max(1, least)))
    if threads == 1:
        return [kernel(0, count)]
    length = -(-count // (threads * unit)) * unit
    ranges = [(lo, min(lo + length, count)) for lo in range(0, count, length)]
    others = _submit(kernel, ranges[1:], available - 1)
    try:
        return [kernel(*ranges[0]), *(other.result() for other in others)]
    finally:
        wait(others)


def _submit(kernel: Callable[[int, int], Any], ranges: Sequence[tuple[int, int]], workers: int) -> list[Future[Any]]:
    """Start the ranges on a pool of so many threads. It is replaced when torch's number of threads was changed."""
    global _pool, _pool_size
    with _pool_lock:  # so that no one closes the pool in between
        if _pool is None or _pool_size != workers:
            if _pool is not None:
                _pool.shutdown(wait=False)  # its threads end after the work they have
            _pool, _pool_size = ThreadPoolExecutor(workers, thread_name_prefix="forwardtune"), workers
        return [_pool.submit(kernel, lo, hi) for lo, hi in ranges]


def _forget_threads() -> None:
    """A forked child has the pool but not its threads, and the lock as another thread may have held it."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)
