"""The noise sweeps for CPU tensors, compiled by Numba: the bits of :mod:`.definition` at the speed of memory.

A sweep walks a tensor in tiles of 512 elements. The half-words of a tile come from 64 Philox blocks computed side by
side, which the compiler turns into vector instructions; a gather from the scaled table and one float32 addition do the
rest. Large tensors are cut into one range per torch thread.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cpu_kernels as kernels
from .columns import Columns, split
from .definition import Places, Strips, Update
from .directions import RADEMACHER, Direction
from .philox import split_seed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Below so many elements a thread, another thread costs more than it saves. It costs much more between two modules of a
# forward pass: torch's own threads still spin on the other cores there, waiting for the next operation.
_MIN_PER_THREAD = 1 << 16
_MIN_PER_THREAD_IN_FORWARD = 1 << 22
# Steps fused into one sweep: their tables (16 KiB a term) should stay in the second-level cache.
_FUSED_STEPS = 8


# --- calls -----------------------------------------------------------------------------------------------------------


def strips(
    direction: Direction, seed: int, tensor: int, steps: Sequence[int], probes: Places, starts: Places,
    scales: Sequence[float], count: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """See :func:`.definition.strips`."""
    columns = Columns.of([tensor], steps, probes, starts, scales, count)
    return _drawn_strips(direction, seed, columns, device).view(len(probes), count)


def many_strips(
    direction: Direction, seed: int, many: Sequence[Strips], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """See :func:`.definition.many_strips`: one call of the kernel for all."""
    return split(_drawn_strips(direction, seed, Columns.of_many(many), device).to(dtype), many)


def _drawn_strips(direction: Direction, seed: int, columns: Columns, device: torch.device) -> Tensor:
    out = torch.empty(int(columns.places[-1]), dtype=torch.float32, device=device)
    drawn = (direction.values.numpy(), np.uint16(direction.shift), *_words(*split_seed(seed)), *columns[:5])
    kernel, number = partial(kernels.strips, out.numpy(), columns.places, *drawn), len(columns.tensors)
    if number:
        _spread(kernel, number, 1, _MIN_PER_THREAD_IN_FORWARD * number // max(1, out.numel()))
    return out


def perturb(
    out: Tensor, source: Tensor, direction: Direction, seed: int, tensor: int, step: int, probe: int, scale: float,
    start: int = 0,
) -> None:  # fmt: skip
    """See :func:`.definition.perturb`."""
    arguments = (*_table(direction, scale, seed), *_words(tensor, step, probe), start)
    kernel = partial(kernels.perturb, _array(out), _array(source), *arguments)
    _spread(kernel, source.numel(), kernels.TILE, _MIN_PER_THREAD_IN_FORWARD)


def perturb_factored(out: Tensor, source: Tensor, u: Tensor, v: Tensor, start: int = 0) -> None:
    """See :func:`.definition.perturb_factored`."""
    kernel = partial(kernels.perturb_factored, _array(out), _array(source), _columns(u), _columns(v), start % len(v))
    _spread(kernel, source.numel(), kernels.TILE, _MIN_PER_THREAD_IN_FORWARD)


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
    arguments = (*_table(direction, scale, seed), *_words(tensor, step, probe))
    kernel = partial(kernels.perturb_rows, _array(out), _array(source), rows.numpy(), *arguments)
    _spread(kernel, len(rows), 1, _MIN_PER_THREAD_IN_FORWARD // source.shape[1])


def update(
    weight: Tensor, updates: Sequence[Update], direction: Direction, seed: int, tensor: int, start: int = 0
) -> int:
    """See :func:`.definition.update`. Several steps are applied in one sweep over the weights."""
    active = [item for item in updates if not item.is_empty]
    unchanged = (len(updates) - len(active)) * weight.numel()
    for lo in range(0, len(active), _FUSED_STEPS):
        fused = active[lo : lo + _FUSED_STEPS]
        unchanged += _sweep(weight, fused, _drawn(fused, direction), None, 1, seed, tensor, start)
    return unchanged


def update_factored(
    weight: Tensor, updates: Sequence[Update], u: Tensor, v: Tensor, seed: int, tensor: int, start: int = 0
) -> int:
    """See :func:`.definition.update_factored`: all steps in one sweep."""
    active = [item for item in updates if not item.is_empty]
    unchanged = (len(updates) - len(active)) * weight.numel()
    if active:
        factors = _columns(u), _columns(v)
        unchanged += _sweep(weight, active, None, factors, u.shape[-1], seed, tensor, start)
    return unchanged


def _sweep(
    weight: Tensor, updates: Sequence[Update], drawn: Any, factors: Any, rank: int, seed: int, tensor: int, start: int
) -> int:
    """Args: drawn or factors: the terms, as the kernel wants them; rank: so many of them for a size."""
    steps = (
        rank * np.cumsum([len(item.terms) for item in updates]),
        np.array([item.step for item in updates], np.uint32),
        np.array([item.decay for item in updates], np.float32),
    )
    words = _words(*split_seed(seed), tensor)
    kernel = partial(kernels.update, _array(weight), drawn, factors, *steps, *words, start)
    return sum(_spread(kernel, weight.numel(), kernels.TILE, _MIN_PER_THREAD)) if weight.numel() else 0


def store(weight: Tensor, x: Tensor, seed: int, tensor: int, step: int, start: int = 0) -> int:
    """See :func:`.definition.store`; for half precision."""
    kernel = partial(kernels.store, _array(weight), _array(x), *_words(*split_seed(seed)), *_words(tensor, step), start)
    return int(sum(_spread(kernel, weight.numel(), kernels.TILE, _MIN_PER_THREAD))) if weight.numel() else 0


def compile_kernels(
    kinds: Iterable[tuple[torch.dtype, bool]], buffered: bool, announce: Callable[[str], object]
) -> None:
    """See :func:`forwardtune.noise.compile_kernels`: for dtypes, and whether tensors of theirs have low rank."""
    step, nothing = [Update(0, (1.0,))], torch.zeros(1)
    factors, rows = (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)), torch.zeros(1, dtype=torch.int64)
    address = (RADEMACHER, 0, 0, 0, 0, 1.0)
    calls: list[Callable[[], object]] = [partial(strips, RADEMACHER, 0, 0, [0], [0], [0], [1.0], 1, nothing.device)]
    for dtype, low_rank in kinds:
        weight = torch.zeros(1, dtype=dtype)
        buffers = [nothing] if buffered and dtype != torch.float32 else []
        if low_rank:
            calls.append(partial(perturb_factored, weight, weight, factors[0][0], factors[1][0]))
            calls += [partial(update_factored, x, step, *factors, 0, 0) for x in (weight, *buffers)]
        else:
            table = weight.view(1, 1)
            calls += [partial(perturb, weight, weight, *address), partial(perturb_rows, table, table, rows, *address)]
            calls += [partial(update, x, step, RADEMACHER, 0, 0) for x in (weight, *buffers)]
        calls += [partial(store, weight, x, 0, 0, 0) for x in buffers]

    def compiled() -> int:
        return sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels.ALL)

    before, announced = compiled(), False
    for call in calls:
        call()
        if compiled() > before and not announced:  # the first one, of several
            announced = True
            announce("compiling the noise kernels: this takes some seconds, once on a machine")


def _drawn(updates: Sequence[Update], direction: Direction) -> tuple[Any, ...]:
    """One table and probe number per term."""
    terms = [term for item in updates for term in item.terms]
    # The same arithmetic as Direction.table, in NumPy: torch would wake its threads for it, which then spin beside ours.
    sizes = np.array([size for _, size in terms], np.float64)
    tables = (direction.values.numpy().astype(np.float64) * sizes[:, None]).astype(np.float32)
    return tables, np.array([probe for probe, _ in terms], np.uint32), np.uint16(direction.shift)


def _columns(factor: Tensor) -> np.ndarray:
    """(..., rows, rank) -> one row for every column, those of the first matrix first."""
    rows, rank = factor.shape[-2:]
    return (
        factor.mT.contiguous().view(math.prod(factor.shape[:-2]) * rank, rows).numpy()
    )  # torch aligns memory to what vectors want


def _array(tensor: Tensor) -> np.ndarray:
    """The storage of a contiguous tensor as an array of the type that selects the conversions."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy()
    if tensor.dtype == torch.float16:
        return tensor.detach().view(torch.int16).numpy()
    return tensor.detach().numpy()


def _table(direction: Direction, scale: float, seed: int) -> tuple[Any, ...]:
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
