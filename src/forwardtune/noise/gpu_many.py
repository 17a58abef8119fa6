"""Sweeps over many CUDA tensors in one launch each: launching takes the host longer than small tensors take the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import gpu_kernels as kernels
from . import gpu_launch as launch
from .columns import Columns, split
from .definition import Strips, Update
from .directions import Direction

# Counts are added up in so many places. A program perturbs so many tiles, or moves so many: to find its tensor takes as long as a tile.
_SLOTS, _PERTURBED, _TILES = 256, 4, 8


def many_strips(
    direction: Direction, seed: int, many: Sequence[Strips], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """See :func:`.definition.many_strips`."""
    columns = Columns.of(many)
    out = torch.empty(int(columns.places[-1]), dtype=torch.float32, device=device)
    if out.numel():
        tiles = (columns.counts + 7 + launch.ROW_TILE - 1) // launch.ROW_TILE
        strip = np.repeat(np.arange(len(tiles)), tiles)
        tile = np.arange(len(strip)) - np.repeat(tiles.cumsum() - tiles, tiles)
        program = np.stack([strip, tile]).astype(np.int32)
        words = np.stack([columns.tensors, columns.steps, columns.probes]).view(np.int32)
        places = np.stack([columns.starts, columns.counts, columns.places[:-1]])
        with launch.on(device):
            kernels.many_strips[(len(strip),)](
                out, launch.values(direction, torch.float32, device, launch.stream(device)),
                *(launch.copied(torch.from_numpy(each), device) for each in (program, words, places, columns.scales)),
                len(strip), len(tiles), direction.shift, *launch.key(seed), **launch.options(launch.ROW_TILE, launch.ROW_WARPS),
            )  # fmt: skip
    return split(out.to(dtype), many)


def fits(tensor: Tensor) -> bool:
    """Whether a tensor can be one of many."""
    aligned = tensor.data_ptr() % 16 == 0 and tensor.numel() % 16 == 0
    return aligned and tensor.is_contiguous() and tensor.dtype in launch.DTYPES


def perturber(
    outs: Sequence[Tensor], sources: Sequence[Tensor], direction: Direction, seed: int, tensors: Sequence[int]
) -> Callable[[int, int, float], None]:
    """What perturbs these whole tensors of one dtype on one device, which :func:`fits` all, when it is called with a step, a probe
    and a scale (:func:`.definition.perturb`)."""
    device, many, like = sources[0].device, len(sources), launch.stored(sources[0])
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
    device, many = weights[0].device, len(weights)
    active = [item for item in updates if not item.is_empty]
    still = (len(updates) - len(active)) * sum(weight.numel() for weight in weights)
    unchanged = torch.zeros(_SLOTS, dtype=torch.int64, device=device)
    table, programs = _table(weights, weights, tensors, _TILES * launch.UPDATE_TILE)
    for fused in launch.sweeps(active):
        sizes = tuple(repr(size) for item in fused for _, size in item.terms)
        with launch.on(device):
            kernels.update_many[(programs,)](
                launch.stored(weights[0]), table, unchanged, launch.plan(tuple(fused), repr(fused), device, launch.stream(device)),
                launch.tables(direction, sizes, device, launch.stream(device)), many, len(fused), direction.shift, *launch.key(seed),
                doublings=many.bit_length(), entries=direction.values.numel(), slots=_SLOTS, tiles=_TILES,
                **launch.options(launch.UPDATE_TILE, launch.UPDATE_WARPS),
            )  # fmt: skip
    return unchanged.sum() + still


def _table(sources: Sequence[Tensor], outs: Sequence[Tensor], tensors: Sequence[int], each: int) -> tuple[Tensor, int]:
    """What kernels read of the tensors, and the number of programs of so many elements that they need."""
    device = sources[0].device
    rows = tuple((s.data_ptr(), o.data_ptr(), s.numel(), t) for s, o, t in zip(sources, outs, tensors, strict=True))
    return _table_of(rows, each, device, launch.stream(device))


@functools.lru_cache(maxsize=32)
def _table_of(rows: tuple[tuple[int, ...], ...], each: int, device: torch.device, stream: int) -> tuple[Tensor, int]:
    columns = np.array(list(zip(*rows, strict=True)), np.int64)
    programs = -(-columns[2] // each)
    table = np.concatenate([columns, (programs.cumsum() - programs)[None]])
    return launch.copied(torch.from_numpy(table), device), int(programs.sum())
