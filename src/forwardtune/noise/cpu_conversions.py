"""Stored values and float32, for the loops of :mod:`.cpu_kernels`.

bfloat16 storage is seen as uint16 and float16 as int16. LLVM has the half type and bit casts; Numba does not expose them on
CPU. Each intrinsic is a line or two of LLVM.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def wide_vectors(context):  # type: ignore[no-untyped-def]  # Numba's calling convention
    """Let the function that calls this use vectors of 512 bits where the processor has them.

    LLVM takes half of that by itself, as it does not know how long a function computes: a clock that slows down would not pay for a short one.
    """

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        attributes = builder.function.attributes
        if isinstance(attributes, set):  # whose own ``add`` takes names alone
            set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _bits(context, x):  # type: ignore[no-untyped-def]
    """float32 as uint32, and back."""
    target, there = (types.uint32, ir.IntType(32)) if x == types.float32 else (types.float32, ir.FloatType())

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], there)

    return target(x), build


@intrinsic
def widen(context, x):  # type: ignore[no-untyped-def]
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
def narrow(context, x, like):  # type: ignore[no-untyped-def]
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
def dropped_bits(context, like):  # type: ignore[no-untyped-def]
    """How many mantissa bits of float32 the stored type lacks; 0 for float32 itself."""
    count = {types.uint16: 16, types.int16: 13}.get(like, 0)

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.IntType(32)(count)

    return types.uint32(like), build


@numba.njit(inline="always")
def round_stochastically(x, random, like):  # type: ignore[no-untyped-def]
    """See :func:`.definition.round_stochastically`."""
    dropped = dropped_bits(like)
    carry = np.uint32(random) >> (np.uint32(16) - dropped)
    mask = np.uint32(np.uint32(0xFFFFFFFF) << dropped)
    rounded = _bits(np.uint32(np.uint32(_bits(x) + carry) & mask))
    if dropped == np.uint32(13):
        units = abs(x) * np.float32(2.0**24)
        whole = np.floor(units)
        up = (np.int32((units - whole) * np.float32(65536.0)) + np.int32(random)) >> np.int32(16)
        fixed = np.float32(whole + np.float32(up)) * np.float32(2.0**-24)
        if abs(x) < np.float32(2.0**-14):
            rounded = np.copysign(fixed, x)
    return rounded
