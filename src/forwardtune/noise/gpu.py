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

import numpy as np
import torch
import triton
from torch import Tensor

from . import definition
from . import gpu_kernels as kernels
from .columns import Columns, split
from .definition import Places, Strips, Update
from .directions import DIRECTIONS, Direction
from .philox import split_seed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Perturbing takes two Philox blocks a thread and still 32 registers, which every warp of a multiprocessor can have. An
# update, which rounds and counts, takes one block. Widths of embeddings are small multiples of 1,024.
_TILE, _WARPS = 2048, 4
_ROW_TILE, _ROW_WARPS = 1024, 2
_UPDATE_TILE, _UPDATE_WARPS = 1024, 4
# Terms fused into one sweep: their tables, 16 KiB each, should leave half of the smallest first-level caches free.
_FUSED_TERMS = 4


def strips(
    direction: Direction, seed: int, tensor: int, steps: Sequence[int], probes: Places, starts: Places,
    scales: Sequence[float], count: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """See :func:`.definition.strips`."""
    many, stream = len(probes), _stream(device)
    out = torch.empty(many, count, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out

    def each(numbers: Any, dtype: torch.dtype) -> Tensor:
        if not isinstance(numbers, Tensor):
            words = map(_signed, numbers) if dtype == torch.int32 else numbers
            numbers = _kept(tuple(words), repr(numbers), dtype, device, stream)
        return numbers.to(dtype).expand(many).contiguous()

    size = min(_ROW_TILE, triton.next_power_of_2(count + 7))
    tiles = triton.cdiv(count + 7, size)
    with _on(device):
        kernels.strips[(many * tiles,)](
            out, _values(direction, torch.float32, device, stream),
            each(steps, torch.int32), each(probes, torch.int32), each(starts, torch.int64), each(scales, torch.float64),
            count, tiles, direction.shift, *_key(seed), _signed(tensor), **_options(size, max(1, _ROW_WARPS * size // _ROW_TILE)),
        )  # fmt: skip
    return out


def many_strips(
    direction: Direction, seed: int, many: Sequence[Strips], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """See :func:`.definition.many_strips`: one launch for all, as a launch for each takes the host longer than the device draws."""
    columns = Columns.of(many)
    out = torch.empty(int(columns.places[-1]), dtype=torch.float32, device=device)
    if out.numel():
        tiles = (columns.counts + 7 + _ROW_TILE - 1) // _ROW_TILE
        strip = np.repeat(np.arange(len(tiles)), tiles)
        tile = np.arange(len(strip)) - np.repeat(tiles.cumsum() - tiles, tiles)
        program = np.stack([strip, tile]).astype(np.int32)
        words = np.stack([columns.tensors, columns.steps, columns.probes]).view(np.int32)
        places = np.stack([columns.starts, columns.counts, columns.places[:-1]])
        with _on(device):
            kernels.many_strips[(len(strip),)](
                out, _values(direction, torch.float32, device, _stream(device)),
                *(_copied(torch.from_numpy(each), device) for each in (program, words, places, columns.scales)),
                len(strip), len(tiles), direction.shift, *_key(seed), **_options(_ROW_TILE, _ROW_WARPS),
            )  # fmt: skip
    return split(out.to(dtype), many)


def perturb(
    out: Tensor, source: Tensor, direction: Direction, seed: int, tensor: int, step: int, probe: int, scale: float,
    start: int = 0,
) -> None:  # fmt: skip
    """See :func:`.definition.perturb`."""
    count, offset = source.numel(), start % 8
    if count == 0:
        return
    with _on(source.device):
        kernels.perturb[(triton.cdiv(count + offset, _TILE),)](
            _stored(out), _stored(source), _tables(direction, (repr(float(scale)),), source.device, _stream(source.device)),
            count, offset, _signed(start // 8), direction.shift, *_key(seed), *map(_signed, (tensor, step, probe)),
            **_options(_TILE, _WARPS),
        )  # fmt: skip


def perturb_factored(out: Tensor, source: Tensor, u: Tensor, v: Tensor, start: int = 0) -> None:
    """See :func:`.definition.perturb_factored`."""
    count, (width, rank) = source.numel(), v.shape
    if count == 0:
        return
    with _on(source.device):
        kernels.perturb_factored[(triton.cdiv(count, _TILE),)](
            _stored(out), _stored(source), u, v, count, start % width, len(u), width, rank, **_options(_TILE, _WARPS)
        )


def perturb_rows(
    out: Tensor, source: Tensor, rows: Tensor, direction: Direction, seed: int, tensor: int, step: int, probe: int,
    scale: float,
) -> None:  # fmt: skip
    """See :func:`.cpu.perturb_rows`."""
    width = source.shape[1]
    if out.numel() == 0:
        return
    aligned = width % 8 == 0
    with _on(source.device):
        kernels.perturb_rows[(len(rows), triton.cdiv(width + (0 if aligned else 7), _ROW_TILE))](
            _stored(out), _stored(source), rows,
            _tables(direction, (repr(float(scale)),), source.device, _stream(source.device)),
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
    active, unchanged = _active(weight, updates)
    for fused in _sweeps(active):
        sizes = tuple(repr(size) for item in fused for _, size in item.terms)
        tables = _tables(direction, sizes, weight.device, _stream(weight.device))
        terms = (tables, direction.shift, tables, tables, 0, 1, 1, 1)  # of which the last six are not read
        _sweep(weight, unchanged, fused, terms, direction.values.numel(), seed, tensor, start)
    return unchanged


def update_factored(
    weight: Tensor, updates: Sequence[Update], u: Tensor, v: Tensor, seed: int, tensor: int, start: int = 0
) -> Tensor:
    """See :func:`.definition.update_factored`: all steps in one sweep, and the count as in :func:`update`."""
    active, unchanged = _active(weight, updates)
    if active:
        _, width, rank = v.shape
        _sweep(weight, unchanged, active, (v, 0, u, v, start % width, u.shape[1], width, rank), 0, seed, tensor, start)
    return unchanged


def _active(weight: Tensor, updates: Sequence[Update]) -> tuple[list[Update], Tensor]:
    """The steps that do something, if there is something to do it to; and the count of what the others leave alone."""
    active = [item for item in updates if weight.numel() and not item.is_empty]
    still = (len(updates) - len(active)) * weight.numel()
    return active, torch.full((), still, dtype=torch.int64, device=weight.device)


def _sweep(
    weight: Tensor, unchanged: Tensor, updates: Sequence[Update], terms: tuple[Any, ...], entries: int, seed: int,
    tensor: int, start: int,
) -> None:  # fmt: skip
    count, offset = weight.numel(), start % 8
    plan = _plan(tuple(updates), repr(updates), weight.device, _stream(weight.device))
    with _on(weight.device):
        kernels.update[(triton.cdiv(count + offset, _UPDATE_TILE),)](
            _stored(weight), unchanged, plan, len(updates), count, offset, _signed(start // 8), *_key(seed),
            _signed(tensor), *terms, entries=entries, **_options(_UPDATE_TILE, _UPDATE_WARPS),
        )  # fmt: skip


def store(weight: Tensor, x: Tensor, seed: int, tensor: int, step: int, start: int = 0) -> Tensor:
    """See :func:`.definition.store`; for half precision. The count is an int64 scalar on the device."""
    count, offset = weight.numel(), start % 8
    unchanged = torch.zeros((), dtype=torch.int64, device=weight.device)
    if count == 0:
        return unchanged
    with _on(weight.device):
        kernels.store[(triton.cdiv(count + offset, _UPDATE_TILE),)](
            _stored(weight), x, unchanged, count, offset, _signed(start // 8), *_key(seed), _signed(tensor), _signed(step),
            **_options(_UPDATE_TILE, _UPDATE_WARPS),
        )  # fmt: skip
    return unchanged


def trouble(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the definition should serve this device and dtype instead; None if the kernels compile and give its bits.

    A compiler that is not as it should be must not cost a run its bits.
    """
    weight = torch.linspace(-3, 3, 2 * _TILE, device="cpu").pow(9).to(dtype)
    names = ("strips", "many_strips", "perturb", "perturb_factored", "update", "update_factored", "store")
    ours, theirs = [globals()[name] for name in names], [getattr(definition, name) for name in names]
    try:
        for direction in DIRECTIONS.values():
            found = _samples(ours, weight.to(device, copy=True), direction)
            expected = _samples(theirs, weight.clone(), direction)
            table, rows = weight.view(-1, 512), torch.tensor([5, 0, 3], device="cpu")
            some = table[rows].to(device)
            perturb_rows(some, table.to(device), rows.to(device), direction, 1, 2, 3, 4, 1e-2)
            found.append(some)
            expected.append(expected[0].view(-1, 512)[rows])
            if not all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)):
                return "its kernels give other bits here; please report the GPU and the version of Triton"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler and a driver can fail in more ways than have a common class
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _samples(sweeps: Sequence[Any], weight: Tensor, direction: Direction) -> list[Tensor]:
    """What these sweeps make of the weights, and how many they left alone."""
    strips, many_strips, perturb, perturb_factored, update, update_factored, store = sweeps
    steps = [Update(1, (1e-4, 0.0, -3e-2)), Update(2, (1e-6,), decay=0.75)]
    u, v = (
        strips(direction, 1, 2, [3], [0, 2, 1], [at], [1e-2], 2 * n, weight.device) for at, n in ((5, 41), (9, 101))
    )
    u, v = u.view(3, 41, 2), v.view(3, 101, 2)  # 41 rows of 101 elements hold all weights
    outs = [torch.empty_like(weight), torch.empty_like(weight)]
    perturb(outs[0], weight, direction, 1, 2, 3, 4, 1e-2)
    perturb_factored(outs[1], weight, u[0], v[0], 3)
    moved = [weight.clone(), weight.clone()]
    counts = [update(moved[0], steps, direction, 1, 2), update_factored(moved[1], steps, u, v, 1, 2, 3)]
    if weight.dtype != torch.float32:
        moved.append(moved[0].clone())
        counts.append(store(moved[2], moved[0].float() * 1.001, 1, 2, 3))
    many = [Strips(2, [3], [0, 2, 1], [at], [1e-2], n) for at, n in ((5, 1100), (9, 17))]
    return [
        *outs,
        u,
        v,
        *many_strips(direction, 1, many, weight.device),
        *moved,
        *(torch.as_tensor(count) for count in counts),
    ]


# --- arguments -------------------------------------------------------------------------------------------------------
# What the host prepares is kept, as all tensors of a step share it, and copied without waiting for the device. It
# belongs to the stream that copied it. Numbers are also told apart by their text, because 0.0 and -0.0 are equal.


@functools.lru_cache(maxsize=32)
def _plan(updates: tuple[Update, ...], text: str, device: torch.device, stream: int) -> Tensor:
    """The steps' numbers, where the terms of each begin and where the last ones end, the decays, then each term's probe."""
    decays = torch.tensor([item.decay for item in updates], dtype=torch.float32, device="cpu").view(torch.int32)
    plan = [
        *(_signed(item.step) for item in updates),
        *itertools.accumulate((len(item.terms) for item in updates), initial=0),
        *decays.tolist(),
        *(_signed(probe) for item in updates for probe, _ in item.terms),
    ]
    return _sent(plan, torch.int32, device)


@functools.lru_cache(maxsize=32)
def _tables(direction: Direction, scales: tuple[str, ...], device: torch.device, stream: int) -> Tensor:
    """``direction.table(scale)`` for each scale, computed on the device: shape ``(len(scales), entries)``."""
    factors = _sent([float(scale) for scale in scales], torch.float64, device)
    return (_values(direction, torch.float64, device, stream) * factors.unsqueeze(1)).float()


@functools.lru_cache(maxsize=32)
def _values(direction: Direction, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return _sent(direction.values.tolist(), dtype, device)


@functools.lru_cache(maxsize=256)
def _kept(numbers: tuple[float, ...], text: str, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return _sent(numbers, dtype, device)


def _sent(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _copied(torch.tensor(numbers, dtype=dtype, device="cpu"), device)  # whatever the default device is


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _sweeps(updates: Sequence[Update]) -> list[tuple[Update, ...]]:
    """Consecutive steps with at most ``_FUSED_TERMS`` terms together; a step is never cut."""
    sweeps: list[list[Update]] = []
    terms = 0
    for item in updates:
        more = len(item.terms)
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
