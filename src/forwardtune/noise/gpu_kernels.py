"""The kernels of :mod:`.gpu`, written in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .definition import ROUNDING_PROBE
from .philox import ROUNDS

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
def perturb(out, source, table, count, offset, first, shift, k0, k1, tensor, step, probe, size: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = tl.program_id(0)
    position = tile.to(tl.int64) * size + tl.arange(0, size) - offset
    inside = (position >= 0) & (position < count)
    block = first.to(tl.uint32, bitcast=True) + tile.to(tl.uint32) * (size // 8)
    z = tl.load(table + (_half_words(block, k0, k1, tensor, step, probe, size) >> shift))
    # Past the first-level cache, which is the table's.
    x = _widen(tl.load(source + position, mask=inside, other=0, cache_modifier=".cg"))
    tl.store(out + position, _narrow(x + z, out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_products(x, inside, u, v, begin, end, place, tile, rows, width, rank, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x <- x + u v^T`` for these terms, in order; ``place``: that of the first tile's first element in the matrix u v^T."""
    place = tile.to(tl.int64) * size + place
    # What lies before the first element is masked, so it does not matter that division truncates.
    column = (place % width).to(tl.int32) + tl.arange(0, size)
    row = place // width + column // width
    column = column % width
    left = u + (begin.to(tl.int64) * rows + row) * rank
    right = v + (begin.to(tl.int64) * width + column) * rank
    for _ in range(begin, end):
        for rho in range(rank):
            x = x + tl.load(left + rho, mask=inside, other=0.0) * tl.load(right + rho, mask=inside, other=0.0)
        left += rows * rank
        right += width * rank
    return x


@triton.jit  # type: ignore[untyped-decorator]
def perturb_factored(out, source, u, v, count, place, rows, width, rank, size: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = tl.program_id(0)
    position = tile.to(tl.int64) * size + tl.arange(0, size)
    inside = position < count
    x = _widen(tl.load(source + position, mask=inside, other=0, cache_modifier=".cg"))
    begin = tl.full([], 0, tl.int32)
    x = _add_products(x, inside, u, v, begin, begin + 1, place, tile, rows, width, rank, size)
    tl.store(out + position, _narrow(x, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles", "shift", "k0", "k1", "tensor"])  # type: ignore[untyped-decorator]
def strips(  # type: ignore[no-untyped-def]
    out, values, steps, probes, starts, scales, count, tiles, shift, k0, k1, tensor, size: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    start = tl.load(starts + t)
    column = tile * size + tl.arange(0, size) - (start & 7)
    inside = (column >= 0) & (column < count)
    block = (start >> 3).to(tl.uint32) + tile.to(tl.uint32) * (size // 8)
    half_words = _half_words(block, k0, k1, tensor, tl.load(steps + t), tl.load(probes + t), size)
    z = tl.load(values + (half_words >> shift)).to(tl.float64) * tl.load(scales + t)
    tl.store(out + t * count + column, z.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=_WORDS[1:])  # type: ignore[untyped-decorator]
def perturb_rows(  # type: ignore[no-untyped-def]
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
def add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit  # type: ignore[untyped-decorator]
def _settled(x, block, k0, k1, tensor, step, size: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A step's sum as it is stored, widened again."""
    if dtype != tl.float32:
        rounding = tl.full([], _ROUNDING, tl.int32)
        x = _round(x, _half_words(block, k0, k1, tensor, step, rounding, size), dtype)
        if dtype == tl.float16:  # large values become infinite; of bfloat16 they are that already
            x = _widen(_narrow(x, dtype))
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _moved(  # type: ignore[no-untyped-def]
    x, inside, block, plan, steps, k0, k1, tensor, tables, shift, u, v, place, tile, rows, width, rank,
    entries: tl.constexpr, size: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Steps applied to a tile, and how often each of its elements stayed. Terms are read from tables of so many entries each; if that
    is 0, they are products of u and v."""
    same = tl.full([size], 0, tl.int32)
    for s in range(steps):
        step = tl.load(plan + s)
        # Both from the plan: Triton 3.6 and 3.7 take a bound that the outer loop carries over for the one that it began with.
        begin = tl.load(plan + steps + s)
        end = tl.load(plan + steps + s + 1)
        before = x
        x = x * tl.load(plan + 2 * steps + 1 + s).to(tl.float32, bitcast=True)  # by 1: the same bits as not at all
        if entries > 0:
            for t in range(begin, end):
                probe = tl.load(plan + 3 * steps + 1 + t)
                index = _half_words(block, k0, k1, tensor, step, probe, size) >> shift
                x = x + tl.load(tables + t * entries + index)
        else:
            x = _add_products(x, inside, u, v, begin, end, place, tile, rows, width, rank, size)
        x = _settled(x, block, k0, k1, tensor, step, size, dtype)
        same += ((x == before) & inside).to(tl.int32)
    return x, same


@triton.jit(do_not_specialize=["steps", "first", "shift", "k0", "k1", "tensor"])  # type: ignore[untyped-decorator]
def update(  # type: ignore[no-untyped-def]
    weight, unchanged, plan, steps, count, offset, first, k0, k1, tensor, tables, shift, u, v, place, rows, width, rank,
    entries: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = weight.dtype.element_ty
    tile = tl.program_id(0)
    position = tile.to(tl.int64) * size + tl.arange(0, size) - offset
    inside = (position >= 0) & (position < count)
    block = first.to(tl.uint32, bitcast=True) + tile.to(tl.uint32) * (size // 8)
    x = _widen(tl.load(weight + position, mask=inside, other=0, cache_modifier=".cg"))
    x, same = _moved(
        x, inside, block, plan, steps, k0, k1, tensor, tables, shift, u, v, place - offset, tile, rows, width, rank,
        entries, size, dtype,
    )  # fmt: skip
    tl.store(weight + position, _narrow(x, dtype), mask=inside)
    tl.atomic_add(unchanged, tl.reduce(same, 0, add).to(tl.int64), sem="relaxed")


# --- several tensors in one launch -----------------------------------------------------------------------------------
# Each has a column in ``tensors``. Those whose weights are moved: address, address to write to, elements, number, and the first of its
# programs; then, if its terms are products, columns and rows of the matrix, and the addresses of u and v. All are whole, begin at a multiple
# of 16 bytes, and have a multiple of 16 elements: so they are read 16 bytes at once.


@triton.jit  # type: ignore[untyped-decorator]
def _find(tensors, many, doublings: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tensor of this program, and which tile of it: the last tensor whose first program is not after this one."""
    program = tl.program_id(0).to(tl.int64)
    low = program * 0
    for k in tl.static_range(doublings):
        middle = low + (1 << (doublings - 1 - k))
        there = tl.minimum(middle, many - 1)
        low = tl.where((middle < many) & (tl.load(tensors + 4 * many + there) <= program), middle, low)
    return low, program - tl.load(tensors + 4 * many + low)


@triton.jit(do_not_specialize=["many", "count", "shift", "k0", "k1"])  # type: ignore[untyped-decorator]
def many_strips(  # type: ignore[no-untyped-def]
    out, values, tensors, terms, many, count, shift, k0, k1, doublings: tl.constexpr, size: tl.constexpr
):
    """Of each tensor a strip for every one of its terms: ``tensors`` has its number, first element, length, place in ``out``, first program,
    programs a strip, and first term; ``terms``, of which there are so many, step and probe in one word, then the bits of each scale."""
    i, program = _find(tensors, many, doublings)
    start, length = tl.load(tensors + many + i), tl.load(tensors + 2 * many + i)
    tiles = tl.load(tensors + 5 * many + i)
    k, tile = program // tiles, program % tiles
    column = tile * size + tl.arange(0, size) - (start & 7)
    inside = (column >= 0) & (column < length)
    block = (start >> 3).to(tl.uint32) + tile.to(tl.uint32) * (size // 8)
    tensor, term = tl.load(tensors + i).to(tl.int32), terms + tl.load(tensors + 6 * many + i) + k
    word = tl.load(term)
    half_words = _half_words(block, k0, k1, tensor, word.to(tl.int32), (word >> 32).to(tl.int32), size)
    z = tl.load(values + (half_words >> shift)).to(tl.float64) * tl.load(term + count).to(tl.float64, bitcast=True)
    tl.store(out + tl.load(tensors + 3 * many + i) + k * length + column, z.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["many", "shift", "k0", "k1", "step", "probe"])  # type: ignore[untyped-decorator]
def perturb_many(  # type: ignore[no-untyped-def]
    like,
    tensors,
    table,
    many,
    shift,
    k0,
    k1,
    step,
    probe,
    doublings: tl.constexpr,
    tiles: tl.constexpr,
    size: tl.constexpr,
):
    i, first = _find(tensors, many, doublings)
    source = tl.multiple_of(tl.load(tensors + i).to(like.dtype), 16)
    out = tl.multiple_of(tl.load(tensors + many + i).to(like.dtype), 16)
    count = tl.multiple_of(tl.load(tensors + 2 * many + i), 16)
    tensor = tl.load(tensors + 3 * many + i).to(tl.int32)
    for k in range(tiles):
        tile = first * tiles + k
        if tile * size < count:
            position = tile * size + tl.arange(0, size)
            inside = position < count
            block = tile.to(tl.uint32) * (size // 8)
            z = tl.load(table + (_half_words(block, k0, k1, tensor, step, probe, size) >> shift))
            x = _widen(tl.load(source + position, mask=inside, other=0, cache_modifier=".cg"))
            tl.store(out + position, _narrow(x + z, like.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["many", "steps", "shift", "k0", "k1"])  # type: ignore[untyped-decorator]
def update_many(  # type: ignore[no-untyped-def]
    like, tensors, unchanged, plan, tables, many, steps, shift, k0, k1, rank,
    doublings: tl.constexpr, entries: tl.constexpr, slots: tl.constexpr, tiles: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Terms as in :func:`_moved`; of tables only the type counts if they are products."""
    dtype: tl.constexpr = like.dtype.element_ty
    i, first = _find(tensors, many, doublings)
    weight = tl.multiple_of(tl.load(tensors + i).to(like.dtype), 16)
    count = tl.multiple_of(tl.load(tensors + 2 * many + i), 16)
    tensor = tl.load(tensors + 3 * many + i).to(tl.int32)
    width, rows, u, v = 1, 1, tables, tables
    if entries == 0:
        width, rows = tl.load(tensors + 5 * many + i).to(tl.int32), tl.load(tensors + 6 * many + i).to(tl.int32)
        u, v = tl.load(tensors + 7 * many + i).to(tables.dtype), tl.load(tensors + 8 * many + i).to(tables.dtype)
    same = tl.full([size], 0, tl.int32)
    for k in range(tiles):
        tile = first * tiles + k
        if tile * size < count:
            position = tile * size + tl.arange(0, size)
            inside = position < count
            block = tile.to(tl.uint32) * (size // 8)
            x = _widen(tl.load(weight + position, mask=inside, other=0, cache_modifier=".cg"))
            x, stayed = _moved(
                x, inside, block, plan, steps, k0, k1, tensor, tables, shift, u, v, 0, tile, rows, width, rank, entries,
                size, dtype,
            )  # fmt: skip
            same += stayed
            tl.store(weight + position, _narrow(x, dtype), mask=inside)
    slot = tl.program_id(0) % slots  # additions to one place wait for each other
    tl.atomic_add(unchanged + slot, tl.reduce(same, 0, add).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["many", "steps", "k0", "k1"])  # type: ignore[untyped-decorator]
def update_products(  # type: ignore[no-untyped-def]
    like, tensors, unchanged, plan, factors, many, steps, k0, k1, rank,
    doublings: tl.constexpr, slots: tl.constexpr, tiles: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """:func:`update_many` of matrices whose rows are whole blocks, and whose terms are products. A tile is four rows of so many columns, so an
    element of v that was read serves four weights, and one of u a row. Of factors only the type counts."""
    dtype: tl.constexpr = like.dtype.element_ty
    i, program = _find(tensors, many, doublings)
    weight = tl.multiple_of(tl.load(tensors + i).to(like.dtype), 16)
    tensor = tl.load(tensors + 3 * many + i).to(tl.int32)
    width = tl.multiple_of(tl.load(tensors + 5 * many + i).to(tl.int32), 16)
    rows = tl.load(tensors + 6 * many + i).to(tl.int32)
    u = tl.load(tensors + 7 * many + i).to(factors.dtype)
    v = tl.multiple_of(tl.load(tensors + 8 * many + i).to(factors.dtype), 16)
    across = (width + size - 1) // size
    left = (program % across).to(tl.int32) * size
    column = left + tl.arange(0, size)
    wide = column < width
    same = tl.full([size], 0, tl.int32)
    for k in range(tiles):
        r0 = ((program // across).to(tl.int32) * tiles + k) * 4
        if r0 < rows:
            # Below the last row the last one is read again, and nothing is written.
            r1, r2, r3 = tl.minimum(r0 + 1, rows - 1), tl.minimum(r0 + 2, rows - 1), tl.minimum(r0 + 3, rows - 1)
            in1, in2, in3 = wide & (r0 + 1 < rows), wide & (r0 + 2 < rows), wide & (r0 + 3 < rows)
            p0, p1 = weight + (r0.to(tl.int64) * width + column), weight + (r1.to(tl.int64) * width + column)
            p2, p3 = weight + (r2.to(tl.int64) * width + column), weight + (r3.to(tl.int64) * width + column)
            x0 = tl.load(p0, mask=wide, other=0, cache_modifier=".cg")
            x1 = tl.load(p1, mask=in1, other=0, cache_modifier=".cg")
            x2 = tl.load(p2, mask=in2, other=0, cache_modifier=".cg")
            x3 = tl.load(p3, mask=in3, other=0, cache_modifier=".cg")
            blocks, b = (width // 8).to(tl.uint32), (left // 8).to(tl.uint32)
            d1, d2, d3 = (r1 - r0) * rank, (r2 - r0) * rank, (r3 - r0) * rank
            for s in range(steps):
                step = tl.load(plan + s)
                # Loaded in the loop, as in _moved.
                begin = tl.load(plan + steps + s)
                end = tl.load(plan + steps + s + 1)
                decay = tl.load(plan + 2 * steps + 1 + s).to(tl.float32, bitcast=True)
                y0, y1, y2, y3 = _widen(x0) * decay, _widen(x1) * decay, _widen(x2) * decay, _widen(x3) * decay
                first, last = begin * rank, end * rank
                if first < last:
                    # A term's factors are read while the one before it is added.
                    of_u = u + (begin.to(tl.int64) * rows + r0) * rank
                    of_v = v + (begin.to(tl.int64) * width + column) * rank
                    a0, a1, a2, a3 = tl.load(of_u), tl.load(of_u + d1), tl.load(of_u + d2), tl.load(of_u + d3)
                    w = tl.load(of_v, mask=wide, other=0.0)
                    for k in range(first, last):
                        b0, b1, b2, b3, ready = a0, a1, a2, a3, w
                        # After the last one it is read again.
                        across_rank = (k + 1) % rank == 0
                        of_u += tl.where(k + 1 < last, tl.where(across_rank, (rows - 1) * rank + 1, 1), 0)
                        of_v += tl.where(k + 1 < last, tl.where(across_rank, (width - 1) * rank + 1, 1), 0)
                        a0, a1, a2, a3 = tl.load(of_u), tl.load(of_u + d1), tl.load(of_u + d2), tl.load(of_u + d3)
                        w = tl.load(of_v, mask=wide, other=0.0)
                        y0, y1, y2, y3 = y0 + b0 * ready, y1 + b1 * ready, y2 + b2 * ready, y3 + b3 * ready
                y0 = _settled(y0, r0.to(tl.uint32) * blocks + b, k0, k1, tensor, step, size, dtype)
                y1 = _settled(y1, r1.to(tl.uint32) * blocks + b, k0, k1, tensor, step, size, dtype)
                y2 = _settled(y2, r2.to(tl.uint32) * blocks + b, k0, k1, tensor, step, size, dtype)
                y3 = _settled(y3, r3.to(tl.uint32) * blocks + b, k0, k1, tensor, step, size, dtype)
                same += ((y0 == _widen(x0)) & wide).to(tl.int32) + ((y1 == _widen(x1)) & in1).to(tl.int32)
                same += ((y2 == _widen(x2)) & in2).to(tl.int32) + ((y3 == _widen(x3)) & in3).to(tl.int32)
                x0, x1, x2, x3 = _narrow(y0, dtype), _narrow(y1, dtype), _narrow(y2, dtype), _narrow(y3, dtype)
            tl.store(p0, x0, mask=wide)
            tl.store(p1, x1, mask=in1)
            tl.store(p2, x2, mask=in2)
            tl.store(p3, x3, mask=in3)
    slot = tl.program_id(0) % slots
    tl.atomic_add(unchanged + slot, tl.reduce(same, 0, add).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["first", "k0", "k1", "tensor", "step"])  # type: ignore[untyped-decorator]
def store(weight, values, unchanged, count, offset, first, k0, k1, tensor, step, size: tl.constexpr):  # type: ignore[no-untyped-def]
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
    tl.atomic_add(unchanged, tl.reduce(same, 0, add).to(tl.int64), sem="relaxed")
