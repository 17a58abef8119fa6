"""Sweeps over many CUDA tensors in one launch each: launching takes the host longer than small tensors take the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..devices import sent
from . import gpu_kernels as kernels
from . import gpu_launch as launch
from .columns import split
from .definition import Strips, Terms, Update
from .directions import Direction

# Counts are added up in so many places. A program perturbs so many tiles, or moves so many: to find its tensor takes as long as a tile.
_SLOTS, _PERTURBED, _TILES = 256, 4, 8
# Of products: columns and tiles of four rows that a program has. A thread has eight columns.
_TILE_WIDTH, _TILE_WARPS, _TILES_DOWN = 256, 1, 8


def many_strips(
    direction: Direction, seed: int, many: Sequence[Strips], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """See :func:`.definition.many_strips`."""
    kinds = {id(each.terms): each.terms for each in many}
    firsts, count = {}, 0
    for key, kind in kinds.items():
        firsts[key], count = count, count + len(kind.probes)
    addresses = tuple((s.tensors, s.start, s.length, len(s.terms.probes), firsts[id(s.terms)]) for s in many)
    tensors, programs, total = _addresses(addresses, device, launch.stream(device))
    out = torch.empty(total, dtype=torch.float32, device=device)
    if programs:
        terms, number = _terms(list(kinds.values()), count, device), tensors.shape[1]
        with launch.on(device):
            kernels.many_strips[(programs,)](
                out, launch.values(direction, torch.float32, device, launch.stream(device)), tensors, terms, number, count, direction.shift,
                *launch.key(seed), doublings=number.bit_length(), **launch.options(launch.ROW_TILE, launch.ROW_WARPS),
            )  # fmt: skip
    return split(out.to(dtype), many)


@functools.lru_cache(maxsize=64)
def _addresses(
    many: tuple[tuple[tuple[int, ...], int, int, int, int], ...], device: torch.device, stream: int
) -> tuple[Tensor, int, int]:
    """What the kernel reads of the tensors, and the numbers of programs and of elements that are drawn."""
    rows, programs, place = [], 0, 0
    for numbers, start, length, strips, term in many:
        tiles = -(-(length + 7) // launch.ROW_TILE)
        for tensor in numbers if strips and length else ():
            rows.append((tensor, start, length, place, programs, tiles, term))
            programs += strips * tiles
            place += strips * length
    columns = np.array(rows, np.int64).reshape(-1, 7).T.copy()
    return sent(torch.from_numpy(columns), device), programs, place


def _terms(kinds: Sequence[Terms], count: int, device: torch.device) -> Tensor:
    """Step and probe of every term in one word, and the bits of its scale: int64, shape (2, terms)."""
    table, lo = np.empty((2, count), np.int64), 0
    words, scales = table[0].view(np.uint64), table[1].view(np.float64)
    for kind in kinds:
        hi = lo + len(kind.probes)
        words[lo:hi] = np.array(kind.probes, np.uint64) << np.uint64(32) | np.array(kind.steps, np.uint64)
        scales[lo:hi] = kind.scales
        lo = hi
    return sent(torch.from_numpy(table), device)


def fits(tensor: Tensor) -> bool:
    """Whether a tensor can be one of many."""
    aligned = tensor.data_ptr() % 16 == 0 and tensor.numel() % 16 == 0
    return aligned and tensor.is_contiguous() and tensor.dtype in launch.DTYPES


def perturber(
    outs: Sequence[Tensor], sources: Sequence[Tensor], direction: Direction, seed: int, tensors: Sequence[int]
) -> Callable[[int, int, float], None]:
    """What perturbs these whole tensors of one dtype on one device, which :func:`fits` all, when it is called with a step, a probe
    and a scale (:func:`.definition.perturb`)."""
    device, many, like = sources[0].device, len(sources), launch.stored(outs[0])
    table, programs = _table(sources, outs, tensors, _PERTURBED * launch.ROW_TILE)
    key, options = launch.key(seed), launch.options(launch.ROW_TILE, launch.ROW_WARPS)

    def perturb(step: int, probe: int, scale: float) -> None:
        with launch.on(device):
            scaled = launch.tables(direction, (repr(float(scale)),), device, launch.stream(device))
            kernels.perturb_many[(programs,)](
                like, table, scaled, many, direction.shift, *key, launch.signed(step), launch.signed(probe),
                doublings=many.bit_length(), tiles=_PERTURBED, **options,
            )  # fmt: skip

    return perturb


def update_many(
    weights: Sequence[Tensor], updates: Sequence[Update], direction: Direction, seed: int, tensors: Sequence[int]
) -> Tensor:
    """:func:`.definition.update` of whole tensors of one dtype on one device, which :func:`fits` all.

    Returns:
        The count for all of them, an int64 scalar on the device.
    """
    device, entries = weights[0].device, direction.values.numel()
    active, unchanged, still = _active(weights, updates)
    table, programs = _table(weights, weights, tensors, _TILES * launch.UPDATE_TILE)
    for fused in launch.sweeps(active):
        sizes = tuple(repr(size) for item in fused for _, size in item.terms)
        tables = launch.tables(direction, sizes, device, launch.stream(device))
        _sweep(weights, table, programs, unchanged, fused, tables, direction.shift, entries, seed, 1)
    return unchanged.sum() + still


def update_factored_many(
    weights: Sequence[Tensor], updates: Sequence[Update], us: Sequence[Tensor], vs: Sequence[Tensor], seed: int,
    tensors: Sequence[int],
) -> Tensor:  # fmt: skip
    """:func:`.definition.update_factored` of whole tensors of one dtype on one device, which :func:`fits` all, all steps in one sweep. The count
    as in :func:`update_many`."""
    active, unchanged, still = _active(weights, updates)
    factors = [(v.shape[1], u.shape[1], u.data_ptr(), v.data_ptr()) for u, v in zip(us, vs, strict=True)]
    for in_tiles in (True, False) if active else ():
        which = [i for i, (width, _, _, v) in enumerate(factors) if _tiled(width, v) == in_tiles]
        if not which:
            continue
        some, ids, of = [weights[i] for i in which], [tensors[i] for i in which], [factors[i] for i in which]
        if in_tiles:
            _sweep_tiles(some, ids, of, unchanged, active, us[0], seed)
        else:
            table, programs = _table(some, some, ids, _TILES * launch.UPDATE_TILE, of)
            _sweep(some, table, programs, unchanged, active, us[0], 0, 0, seed, us[0].shape[2])
    return unchanged.sum() + still


def _tiled(width: int, v: int) -> bool:
    """Whether a matrix has rows of whole blocks that fill tiles, and its V is read 16 bytes at once."""
    return width % 16 == 0 and width >= _TILE_WIDTH // 2 and v % 16 == 0


def _active(weights: Sequence[Tensor], updates: Sequence[Update]) -> tuple[list[Update], Tensor, int]:
    """The steps that do something; places for counts; and how many values the others leave alone."""
    active = [item for item in updates if not item.is_empty]
    still = (len(updates) - len(active)) * sum(weight.numel() for weight in weights)
    return active, torch.zeros(_SLOTS, dtype=torch.int64, device=weights[0].device), still


def _sweep(
    weights: Sequence[Tensor], table: Tensor, programs: int, unchanged: Tensor, fused: Sequence[Update], tables: Tensor,
    shift: int, entries: int, seed: int, rank: int,
) -> None:  # fmt: skip
    device, many = weights[0].device, len(weights)
    plan = launch.plan(tuple(fused), repr(fused), device, launch.stream(device))
    with launch.on(device):
        kernels.update_many[(programs,)](
            launch.stored(weights[0]), table, unchanged, plan, tables, many, len(fused), shift, *launch.key(seed), rank,
            doublings=many.bit_length(), entries=entries, slots=_SLOTS, tiles=_TILES,
            **launch.options(launch.UPDATE_TILE, launch.UPDATE_WARPS),
        )  # fmt: skip


def _sweep_tiles(
    weights: Sequence[Tensor], tensors: Sequence[int], factors: Sequence[tuple[int, ...]], unchanged: Tensor,
    updates: Sequence[Update], like: Tensor, seed: int,
) -> None:  # fmt: skip
    device, many = weights[0].device, len(weights)
    tiles = tuple(-(-rows // (4 * _TILES_DOWN)) * -(-width // _TILE_WIDTH) for width, rows, *_ in factors)
    table, programs = _table(weights, weights, tensors, tiles, factors)
    plan = launch.plan(tuple(updates), repr(updates), device, launch.stream(device))
    with launch.on(device):
        kernels.update_products[(programs,)](
            launch.stored(weights[0]), table, unchanged, plan, like, many, len(updates), *launch.key(seed), like.shape[2],
            doublings=many.bit_length(), slots=_SLOTS, tiles=_TILES_DOWN, **launch.options(_TILE_WIDTH, _TILE_WARPS),
        )  # fmt: skip


def _table(
    sources: Sequence[Tensor], outs: Sequence[Tensor], tensors: Sequence[int], each: int | tuple[int, ...],
    more: Sequence[tuple[int, ...]] | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """What kernels read of the tensors, and the number of programs that they need: of so many elements, or so many for each."""
    device = sources[0].device
    rows = tuple((s.data_ptr(), o.data_ptr(), s.numel(), t) for s, o, t in zip(sources, outs, tensors, strict=True))
    return _table_of(rows, None if more is None else tuple(more), each, device, launch.stream(device))


@functools.lru_cache(maxsize=64)
def _table_of(
    rows: tuple[tuple[int, ...], ...], more: tuple[tuple[int, ...], ...] | None, each: int | tuple[int, ...],
    device: torch.device, stream: int,
) -> tuple[Tensor, int]:  # fmt: skip
    columns = np.array(rows, np.int64).T
    programs = -(-columns[2] // each) if isinstance(each, int) else np.array(each, np.int64)
    parts = [columns, (programs.cumsum() - programs)[None]]
    if more is not None:
        parts.append(np.array(more, np.int64).T)
    table = np.ascontiguousarray(np.concatenate(parts))  # which has its rows one after the other, as kernels read it
    return sent(torch.from_numpy(table), device), int(programs.sum())
