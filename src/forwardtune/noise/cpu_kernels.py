"""The loops of :mod:`.cpu`, compiled by Numba."""

from __future__ import annotations

import numba
import numpy as np

from .cpu_conversions import dropped_bits, narrow, round_stochastically, wide_vectors, widen
from .definition import ROUNDING_PROBE
from .kept import kernel

BLOCKS = 64
TILE = 8 * BLOCKS


@numba.njit(inline="always")
def _fill(words, first, blocks, tensor, step, probe, k0, k1):  # type: ignore[no-untyped-def]
    """The output of so many blocks from ``first`` on, two 32-bit words in each 64-bit one.

    A counter word lives in the low half of a 64-bit lane, whatever the high half holds: the vector multiplication reads
    low halves only and leaves both halves of the product where they are wanted. In 32-bit lanes it took twice as long.
    """
    low = np.uint64(0xFFFFFFFF)
    for b in range(blocks):
        c0 = np.uint64(first) + np.uint64(b)
        c1, c2, c3 = np.uint64(tensor), np.uint64(step), np.uint64(probe)
        a0, a1 = np.uint64(k0), np.uint64(k1)
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
    for i in range(TILE):
        z[i] = table[halves[i] >> shift]


@numba.njit
def _add_products(x, lo, hi, u, v, place, term, end):  # type: ignore[no-untyped-def]
    """``x <- x + u[t] v[t]`` from ``lo`` to ``hi`` for these terms, in order; ``place``: that of ``x[lo]`` in the matrix u v^T.

    Four terms in a pass: x is read and written once for them.
    """
    wide_vectors()
    width = v.shape[1]
    row = place // width
    column = place - row * width
    while lo < hi:
        count = min(width - column, hi - lo)
        part = x[lo : lo + count]
        t = term
        while t + 4 <= end:
            u0, u1, u2, u3 = u[t, row], u[t + 1, row], u[t + 2, row], u[t + 3, row]
            v0 = v[t, column : column + count]
            v1 = v[t + 1, column : column + count]
            v2 = v[t + 2, column : column + count]
            v3 = v[t + 3, column : column + count]
            for i in range(count):
                part[i] = (((part[i] + u0 * v0[i]) + u1 * v1[i]) + u2 * v2[i]) + u3 * v3[i]
            t += 4
        while t < end:
            u0 = u[t, row]
            v0 = v[t, column : column + count]
            for i in range(count):
                part[i] = part[i] + u0 * v0[i]
            t += 1
        lo += count
        row += 1
        column = 0


@kernel
def strips(out, places, values, shift, k0, k1, tensors, steps, probes, starts, scales, lo, hi):  # type: ignore[no-untyped-def]
    """``out[places[t] : places[t + 1]] <- float32(scales[t] * z)`` from element ``starts[t]`` on: the bits of a scaled table without one."""
    wide_vectors()
    words = np.empty(2 * BLOCKS, np.uint64)
    halves = words.view(np.uint16)
    for t in range(lo, hi):
        position, end = places[t], places[t + 1]
        while position < end:
            element = starts[t] + position - places[t]
            block = element // 8
            offset = element - 8 * block
            count = min(TILE - offset, end - position)
            _fill(words, np.uint32(block), (offset + count + 7) // 8, tensors[t], steps[t], probes[t], k0, k1)
            part = out[position : position + count]
            for i in range(count):
                part[i] = values[halves[offset + i] >> shift]
            if scales[t] != 1.0:
                for i in range(count):
                    part[i] = np.float32(np.float64(part[i]) * scales[t])
            position += count


@kernel
def perturb(out, source, table, shift, k0, k1, tensor, step, probe, start, lo, hi):  # type: ignore[no-untyped-def]
    wide_vectors()
    words = np.empty(2 * BLOCKS, np.uint64)
    halves = words.view(np.uint16)
    z = np.empty(TILE, np.float32)
    position = lo
    while position < hi:
        element = start + position
        tile = element // TILE
        _fill(words, np.uint32(tile * BLOCKS), BLOCKS, tensor, step, probe, k0, k1)
        _gather(z, table, halves, shift)
        offset = element - tile * TILE
        count = min(TILE - offset, hi - position)
        if count == TILE:
            target = out[position : position + TILE]
            origin = source[position : position + TILE]
            for i in range(TILE):
                target[i] = narrow(widen(origin[i]) + z[i], origin[i])
        else:
            for i in range(count):
                out[position + i] = narrow(widen(source[position + i]) + z[offset + i], source[position + i])
        position += count


@kernel
def perturb_factored(out, source, u, v, place, lo, hi):  # type: ignore[no-untyped-def]
    wide_vectors()
    x = np.empty(TILE, np.float32)
    for position in range(lo, hi, TILE):
        count = min(TILE, hi - position)
        origin = source[position : position + count]
        for i in range(count):
            x[i] = widen(origin[i])
        _add_products(x, 0, count, u, v, place + position, 0, len(u))
        target = out[position : position + count]
        for i in range(count):
            target[i] = narrow(x[i], target[i])


@kernel
def perturb_rows(out, source, rows, table, shift, k0, k1, tensor, step, probe, lo, hi):  # type: ignore[no-untyped-def]
    wide_vectors()
    width = source.shape[1]
    zero = lo - lo  # an int64 as for other callers: for a literal 0 Numba would compile the callee once more
    for i in range(lo, hi):
        row = rows[i]
        perturb(out[i], source[row], table, shift, k0, k1, tensor, step, probe, row * width, zero, width)


@kernel
def update(weight, drawn, factors, ends, steps, decays, k0, k1, tensor, start, lo, hi):  # type: ignore[no-untyped-def]
    wide_vectors()
    # Terms are either drawn or products of factors; the other is None, and Numba leaves its branch out.
    # Whole tiles have loops of their own, of a length that the compiler knows: that halves the time.
    words = np.empty(2 * BLOCKS, np.uint64)
    halves = words.view(np.uint16)
    x = np.empty(TILE, np.float32)
    z = np.empty(TILE, np.float32)
    before = np.empty(TILE, np.float32)
    like = weight[0]
    half_precision = dropped_bits(like) != 0
    unchanged = 0
    position = lo
    while position < hi:
        element = start + position
        tile = element // TILE
        first = np.uint32(tile * BLOCKS)
        offset = element - tile * TILE
        count = min(TILE - offset, hi - position)
        part = weight[position : position + count]
        if count == TILE:
            for i in range(TILE):
                x[i] = widen(part[i])
        else:
            for i in range(count):
                x[offset + i] = widen(part[i])
        term = 0
        for s in range(steps.shape[0]):
            for i in range(TILE):
                before[i] = x[i]
            if decays[s] != np.float32(1.0):
                for i in range(TILE):
                    x[i] = x[i] * decays[s]
            if drawn is not None:
                tables, probes, shift = drawn
                for t in range(term, ends[s]):
                    _fill(words, first, BLOCKS, tensor, steps[s], probes[t], k0, k1)
                    _gather(z, tables[t], halves, shift)
                    for i in range(TILE):
                        x[i] = x[i] + z[i]
            if factors is not None:
                u, v = factors
                _add_products(x, offset, offset + count, u, v, start % v.shape[1] + position, term, ends[s])
            term = ends[s]
            if half_precision:
                _fill(words, first, BLOCKS, tensor, steps[s], np.uint32(ROUNDING_PROBE), k0, k1)
                for i in range(TILE):
                    x[i] = widen(narrow(round_stochastically(x[i], halves[i], like), like))
            same = np.int32(0)
            if count == TILE:
                for i in range(TILE):
                    same += np.int32(x[i] == before[i])
            else:
                for i in range(offset, offset + count):
                    same += np.int32(x[i] == before[i])
            unchanged += same
        if count == TILE:
            for i in range(TILE):
                part[i] = narrow(x[i], like)
        else:
            for i in range(count):
                part[i] = narrow(x[offset + i], like)
        position += count
    return unchanged


@kernel
def store(weight, x, k0, k1, tensor, step, start, lo, hi):  # type: ignore[no-untyped-def]
    wide_vectors()
    words = np.empty(2 * BLOCKS, np.uint64)
    halves = words.view(np.uint16)
    like = weight[0]
    unchanged = 0
    position = lo
    while position < hi:
        element = start + position
        tile = element // TILE
        _fill(words, np.uint32(tile * BLOCKS), BLOCKS, tensor, step, np.uint32(ROUNDING_PROBE), k0, k1)
        offset = element - tile * TILE
        count = min(TILE - offset, hi - position)
        for i in range(count):
            stored = narrow(round_stochastically(x[position + i], halves[offset + i], like), like)
            unchanged += np.int32(widen(stored) == widen(weight[position + i]))
            weight[position + i] = stored
        position += count
    return unchanged


ALL = (strips, perturb, perturb_rows, perturb_factored, update, store)
