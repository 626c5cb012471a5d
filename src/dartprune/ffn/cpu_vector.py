"""Vector code for Numba: dot products with prefetch, counted bits, an exponential that vectorises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from dartprune.ffn.cpu_kernels import GELU_CUBE, GELU_SCALE, HALF, ONE, QUICK, ZERO, _activate

LANES = 16  # floats of one vector; narrower machines take two or four registers for it
LINE = 64  # bytes that memory gives at a time
LOG2E = np.float32(1 / math.log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


def _prefetch(builder: Any, pointer: Any) -> None:
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [builder.bitcast(pointer, byte), word(0), word(3), word(1)])


@intrinsic
def dot(context: Any, x: Any, weight: Any, ahead: Any) -> Any:
    """Sum of x[j] * weight[j] in float32; while it runs, `ahead`, the row that comes next, is fetched.

    x float32 [H], weight and ahead [H] in a weight's words, all contiguous. Four vectors of partial sums, folded in
    one fixed order.
    """
    floats = ir.VectorType(ir.FloatType(), LANES)
    size = {types.uint16: 2, types.int16: 2, types.float32: 4}.get(weight.dtype)
    if size is None or x.dtype != types.float32 or ahead.dtype != weight.dtype:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [context.make_array(k)(context, builder, v) for k, v in zip(signature.args, args, strict=True)]
        length = builder.extract_value(arrays[0].shape, 0)
        step = ir.Constant(length.type, 4 * LANES)

        def wide(pointer: Any, kind: Any) -> Any:
            if weight.dtype == types.float32:
                return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)
            lanes = kind.count if isinstance(kind, ir.VectorType) else 0

            def like(scalar: Any) -> Any:
                return ir.VectorType(scalar, lanes) if lanes else scalar

            if weight.dtype == types.int16:
                half = like(ir.HalfType())
                return builder.fpext(builder.load(builder.bitcast(pointer, half.as_pointer()), align=2), kind)
            words, doubled = like(ir.IntType(16)), like(ir.IntType(32))
            word = builder.load(builder.bitcast(pointer, words.as_pointer()), align=2)
            sixteen = ir.Constant(doubled, [16] * lanes if lanes else 16)
            return builder.bitcast(builder.shl(builder.zext(word, doubled), sixteen), kind)

        def multiply_add(total: Any, at: Any, kind: Any) -> None:
            value = builder.load(builder.bitcast(builder.gep(arrays[0].data, [at]), kind.as_pointer()), align=4)
            product = builder.fmul(value, wide(builder.gep(arrays[1].data, [at]), kind), flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)

        totals = [cgutils.alloca_once_value(builder, ir.Constant(floats, [0.0] * LANES)) for _ in range(4)]
        word = ir.IntType(32)
        whole = builder.sub(length, builder.urem(length, step))
        with cgutils.for_range_slice(builder, ir.Constant(length.type, 0), whole, step) as (at, _):
            for r in range(4):
                multiply_add(totals[r], builder.add(at, ir.Constant(length.type, LANES * r)), floats)
            for line in range(size):  # 64 weights are `size` lines of 64 bytes
                place = builder.gep(arrays[2].data, [builder.add(at, ir.Constant(length.type, LINE // size * line))])
                _prefetch(builder, place)
        s = [builder.load(total) for total in totals]
        folded = builder.fadd(builder.fadd(s[0], s[1]), builder.fadd(s[2], s[3]))
        for half in (8, 4, 2, 1):
            mask = ir.Constant(ir.VectorType(word, half), list(range(half)))
            other = ir.Constant(ir.VectorType(word, half), list(range(half, 2 * half)))
            folded = builder.fadd(
                builder.shuffle_vector(folded, folded, mask), builder.shuffle_vector(folded, folded, other)
            )
        total = cgutils.alloca_once_value(builder, builder.extract_element(folded, word(0)))
        with cgutils.for_range_slice(builder, whole, length, ir.Constant(length.type, 1)) as (at, _):
            multiply_add(total, at, ir.FloatType())
        return builder.load(total)

    return types.float32(x, weight, ahead), generate


@intrinsic
def fetch(context: Any, array: Any, at: Any) -> Any:
    """Ask for the line of array[at] without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        _prefetch(builder, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def ones(context: Any, word: Any) -> Any:
    """Number of set bits of an int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), generate


@intrinsic
def power_of_two(context: Any, exponent: Any) -> Any:
    """2^k as float32 from an int32 k in -126 .. 127."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        shifted = builder.shl(builder.add(args[0], ir.Constant(word, 127)), ir.Constant(word, 23))
        return builder.bitcast(shifted, ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always")
def exp(v):
    """e^v in plain arithmetic, so that a loop over it vectorises; v beyond +-87 counts as +-87."""
    v = min(max(v, np.float32(-87.0)), np.float32(87.0))
    k = np.rint(v * LOG2E)
    r = v - k * LN2_HIGH - k * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + HALF
    return (p * r * r + r + ONE) * power_of_two(np.int32(k))


@njit(fastmath={"contract"}, nogil=True)
def activate_all(kind, v):
    """Activate v float32 [B] in place, a vector at a time."""
    if kind == 0:
        for i in range(v.shape[0]):
            v[i] = v[i] / (ONE + exp(-v[i]))
    elif kind == 5:
        for i in range(v.shape[0]):
            v[i] = v[i] / (ONE + exp(-QUICK * v[i]))
    elif kind == 2:  # (1 + tanh z) / 2 = 1 / (1 + e^-2z)
        for i in range(v.shape[0]):
            z = GELU_SCALE * (v[i] + GELU_CUBE * v[i] * v[i] * v[i])
            v[i] = v[i] / (ONE + exp(np.float32(-2.0) * z))
    elif kind == 3:
        for i in range(v.shape[0]):
            v[i] = max(v[i], ZERO)
    elif kind == 4:
        for i in range(v.shape[0]):
            v[i] = max(v[i], ZERO) * max(v[i], ZERO)
    else:
        for i in range(v.shape[0]):
            v[i] = _activate(kind, v[i])
