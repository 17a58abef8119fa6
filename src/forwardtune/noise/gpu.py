"""The noise sweeps for CUDA tensors, compiled by Triton: the bits of :mod:`.definition` in one pass over the memory.

A program handles one tile. A thread computes whole Philox blocks, so the eight elements of a block, 16 bytes in half
precision, are its own; a gather from the scaled table, which stays in the first-level cache, and one float32 addition
do the rest. Kernels are launched without fused multiply-adds, and no launch waits for the device.

bfloat16 storage is seen as int16 and converted by integer arithmetic, which is the same on every GPU and in Triton's
interpreter, which cuts bfloat16 off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import definition
from . import gpu_kernels as kernels
from . import gpu_launch as launch
from .definition import Count, Places, Strips, Terms, Update
from .directions import DIRECTIONS, Direction
from .gpu_launch import DTYPES as DTYPES
from .gpu_many import fits as fits
from .gpu_many import many_strips as many_strips
from .gpu_many import perturber as perturber
from .gpu_many import update_factored_many as update_factored_many
from .gpu_many import update_many as update_many


def strips(
    direction: Direction, seed: int, tensor: int, steps: Sequence[int], probes: Places, starts: Places,
    scales: Sequence[float], count: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """See :func:`.definition.strips`."""
    many, stream = len(probes), launch.stream(device)
    out = torch.empty(many, count, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out

    def each(numbers: Any, dtype: torch.dtype) -> Tensor:
        if not isinstance(numbers, Tensor):
            words = map(launch.signed, numbers) if dtype == torch.int32 else numbers
            numbers = launch.kept(tuple(words), repr(numbers), dtype, device, stream)
        return numbers.to(dtype).expand(many).contiguous()

    size = min(launch.ROW_TILE, triton.next_power_of_2(count + 7))
    tiles = triton.cdiv(count + 7, size)
    with launch.on(device):
        kernels.strips[(many * tiles,)](
            out, launch.values(direction, torch.float32, device, stream),
            each(steps, torch.int32), each(probes, torch.int32), each(starts, torch.int64), each(scales, torch.float64),
            count, tiles, direction.shift, *launch.key(seed), launch.signed(tensor),
            **launch.options(size, max(1, launch.ROW_WARPS * size // launch.ROW_TILE)),
        )  # fmt: skip
    return out


def perturb(
    out: Tensor, source: Tensor, direction: Direction, seed: int, tensor: int, step: int, probe: int, scale: float,
    start: int = 0,
) -> None:  # fmt: skip
    """See :func:`.definition.perturb`."""
    count, offset = source.numel(), start % 8
    if count == 0:
        return
    with launch.on(source.device):
        kernels.perturb[(triton.cdiv(count + offset, launch.TILE),)](
            launch.stored(out), launch.stored(source), launch.tables(direction, (repr(float(scale)),), source.device, launch.stream(source.device)),
            count, offset, launch.signed(start // 8), direction.shift, *launch.key(seed), *map(launch.signed, (tensor, step, probe)),
            **launch.options(launch.TILE, launch.WARPS),
        )  # fmt: skip


def perturb_factored(out: Tensor, source: Tensor, u: Tensor, v: Tensor, start: int = 0) -> None:
    """See :func:`.definition.perturb_factored`."""
    count, (width, rank) = source.numel(), v.shape
    if count == 0:
        return
    with launch.on(source.device):
        kernels.perturb_factored[(triton.cdiv(count, launch.TILE),)](
            launch.stored(out),
            launch.stored(source),
            u,
            v,
            count,
            start % width,
            len(u),
            width,
            rank,
            **launch.options(launch.TILE, launch.WARPS),
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
    with launch.on(source.device):
        kernels.perturb_rows[(len(rows), triton.cdiv(width + (0 if aligned else 7), launch.ROW_TILE))](
            launch.stored(out), launch.stored(source), rows,
            launch.tables(direction, (repr(float(scale)),), source.device, launch.stream(source.device)),
            width, direction.shift, *launch.key(seed), *map(launch.signed, (tensor, step, probe)),
            aligned=aligned, **launch.options(launch.ROW_TILE, launch.ROW_WARPS),
        )  # fmt: skip


def update(
    weight: Tensor, updates: Sequence[Update], direction: Direction, seed: int, tensor: int, start: int = 0
) -> Tensor:
    """See :func:`.definition.update`. Several steps are applied in one sweep over the weights.

    Returns:
        The count as an int64 scalar on the device: reading it waits for the sweep.
    """
    active, unchanged = _active(weight, updates)
    for fused in launch.sweeps(active):
        sizes = tuple(repr(size) for item in fused for _, size in item.terms)
        tables = launch.tables(direction, sizes, weight.device, launch.stream(weight.device))
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
    plan = launch.plan(tuple(updates), repr(updates), weight.device, launch.stream(weight.device))
    with launch.on(weight.device):
        kernels.update[(triton.cdiv(count + offset, launch.UPDATE_TILE),)](
            launch.stored(weight), unchanged, plan, len(updates), count, offset, launch.signed(start // 8), *launch.key(seed),
            launch.signed(tensor), *terms, entries=entries, **launch.options(launch.UPDATE_TILE, launch.UPDATE_WARPS),
        )  # fmt: skip


def store(weight: Tensor, x: Tensor, seed: int, tensor: int, step: int, start: int = 0) -> Tensor:
    """See :func:`.definition.store`; for half precision. The count is an int64 scalar on the device."""
    count, offset = weight.numel(), start % 8
    unchanged = torch.zeros((), dtype=torch.int64, device=weight.device)
    if count == 0:
        return unchanged
    with launch.on(weight.device):
        kernels.store[(triton.cdiv(count + offset, launch.UPDATE_TILE),)](
            launch.stored(weight), x, unchanged, count, offset, launch.signed(start // 8), *launch.key(seed), launch.signed(tensor), launch.signed(step),
            **launch.options(launch.UPDATE_TILE, launch.UPDATE_WARPS),
        )  # fmt: skip
    return unchanged


def trouble(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the definition should serve this device and dtype instead; None if the kernels compile and give its bits.

    A compiler that is not as it should be must not cost a run its bits.
    """
    weight = torch.linspace(-3, 3, 2 * launch.TILE, device="cpu").pow(9).to(dtype)
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
            pieces = [weight[:1008], weight[1008:1024], weight[1024:]]
            here = [piece.to(device, copy=True) for piece in pieces]
            outs, steps = [torch.empty_like(piece) for piece in here], [Update(1, (1e-4, -3e-2)), Update(2, (1e-6,))]
            perturber(outs, here, direction, 1, [2, 0, 7])(3, 4, 1e-2)
            found += [*outs, update_many(here, steps, direction, 1, [2, 0, 7]), *(piece.clone() for piece in here)]
            expected += _one_by_one(pieces, steps, direction)
            for width in (8, 512):  # narrow matrices are swept as they lie, others in tiles
                pieces = [weight[:1024], weight[1024:]]
                here = [piece.to(device, copy=True) for piece in pieces]
                factors = (_factors(piece, width) for piece in pieces)
                us, vs = ([factor.to(device) for factor in each] for each in zip(*factors, strict=True))
                found += [update_factored_many(here, steps, us, vs, 1, [0, 7]), *here]
                expected += _factored_one_by_one(pieces, width, steps)
            # A number that was made a tensor may lie on the default device.
            if not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True)):
                return "its kernels give other bits here; please report the GPU and the version of Triton"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler and a driver can fail in more ways than have a common class
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _one_by_one(pieces: Sequence[Tensor], steps: Sequence[Update], direction: Direction) -> list[Tensor]:
    """What the definition makes of the tensors that are perturbed and moved together."""
    outs, moved = [torch.empty_like(piece) for piece in pieces], [piece.clone() for piece in pieces]
    count: Count = 0
    for out, piece, weight, tensor in zip(outs, pieces, moved, (2, 0, 7), strict=True):
        definition.perturb(out, piece, direction, 1, tensor, 3, 4, 1e-2)
        count += definition.update(weight, steps, direction, 1, tensor)
    return [*outs, torch.as_tensor(count), *moved]


def _factors(piece: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Three terms, of rank 2, for a matrix of so many columns."""
    numbers = torch.arange(3 * 2 * (len(piece) // width + width), device="cpu").remainder(17).sub(8) * 1e-3
    v, u = numbers.split([6 * width, 6 * (len(piece) // width)])
    return u.view(3, -1, 2), v.view(3, width, 2)


def _factored_one_by_one(pieces: Sequence[Tensor], width: int, steps: Sequence[Update]) -> list[Tensor]:
    """The same of updates whose terms are products."""
    moved = [piece.clone() for piece in pieces]
    count: Count = 0
    for weight, tensor in zip(moved, (0, 7), strict=True):
        count += definition.update_factored(weight, steps, *_factors(weight, width), 1, tensor)
    return [torch.as_tensor(count), *moved]


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
    many = [Strips((2, 8), at, n, Terms([3], [0, 2, 1], [1e-2])) for at, n in ((5, 1100), (9, 17))]
    return [
        *outs,
        u,
        v,
        *many_strips(direction, 1, many, weight.device),
        *moved,
        *(torch.as_tensor(count) for count in counts),
    ]
