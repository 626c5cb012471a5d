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
WORDS = 8  # int64 of one vector
LINE = 64  # bytes that memory gives at a time
LOG2E = np.float32(1 / math.log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


def _prefetch(builder: Any, pointer: Any) -> None:
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [builder.bitcast(pointer, byte), word(0), word(3), word(1)])


def _wide(builder: Any, pointer: Any, dtype: Any, lanes: int) -> Any:
    """`lanes` weights as float32, widened in registers: uint16 holds bf16, int16 holds fp16."""

    def load(scalar: Any) -> Any:
        kind = ir.VectorType(scalar, lanes)
        return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=dtype.bitwidth // 8)

    floats = ir.VectorType(ir.FloatType(), lanes)
    if dtype == types.float32:
        return load(ir.FloatType())
    if dtype == types.int16:
        return builder.fpext(load(ir.HalfType()), floats)
    doubled = ir.VectorType(ir.IntType(32), lanes)
    word = builder.zext(load(ir.IntType(16)), doubled)
    return builder.bitcast(builder.shl(word, ir.Constant(doubled, [16] * lanes)), floats)


def _multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def _reduce(builder: Any, add: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, by halves."""
    lanes, word = vector.type.count, ir.IntType(32)
    while lanes > 1:
        lanes //= 2
        low, high = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(word, lanes), list(range(at, at + lanes))))
            for at in (0, lanes)
        )
        vector = add(low, high)
    return builder.extract_element(vector, word(0))


class _Arrays:
    """Pointers into the one-dimensional arrays among an intrinsic's arguments."""

    def __init__(self, context: Any, builder: Any, kinds: Any, values: Any) -> None:
        self.builder = builder
        arrays = [context.make_array(kind)(context, builder, value) for kind, value in zip(kinds, values, strict=True)]
        self.data = [array.data for array in arrays]
        self.length = builder.extract_value(arrays[0].shape, 0)
        self.integer = self.length.type

    def place(self, array: int, at: Any, offset: int = 0) -> Any:
        return self.builder.gep(self.data[array], [self.builder.add(at, self.integer(offset))])

    def vector(self, array: int, at: Any, offset: int, scalar: Any, lanes: int) -> Any:
        kind = ir.VectorType(scalar, lanes)
        pointer = self.builder.bitcast(self.place(array, at, offset), kind.as_pointer())
        return self.builder.load(pointer, align=4 if scalar == ir.FloatType() else 8)

    def steps(self, width: int) -> tuple[Any, Any]:
        """Two loops: over the whole steps of this width, and over what is left, one by one."""
        whole = self.builder.sub(self.length, self.builder.urem(self.length, self.integer(width)))
        return (
            cgutils.for_range_slice(self.builder, self.integer(0), whole, self.integer(width)),
            cgutils.for_range_slice(self.builder, whole, self.length, self.integer(1)),
        )


@intrinsic
def dot(context: Any, x: Any, weight: Any, ahead: Any) -> Any:
    """Sum of x[j] * weight[j] in float32; while it runs, `ahead`, the row that comes next, is fetched.

    x float32 [H], weight and ahead [H] in a weight's words, all contiguous. Four vectors of partial sums, folded in
    one fixed order.
    """
    size = weight.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = _Arrays(context, builder, signature.args, args)

        def add(total: Any, at: Any, offset: int, lanes: int) -> None:
            value = arrays.vector(0, at, offset, ir.FloatType(), lanes)
            row = _wide(builder, arrays.place(1, at, offset), weight.dtype, lanes)
            builder.store(_multiply_add(builder, value, row, builder.load(total)), total)

        def zero(lanes: int) -> Any:
            return cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(ir.FloatType(), lanes), [0.0] * lanes))

        totals, rest = [zero(LANES) for _ in range(4)], zero(1)
        steps, left = arrays.steps(4 * LANES)
        with steps as (at, _):
            for r in range(4):
                add(totals[r], at, LANES * r, LANES)
            for line in range(size):  # 64 weights are `size` lines of 64 bytes
                _prefetch(builder, arrays.place(2, at, LINE // size * line))
        with left as (at, _):
            add(rest, at, 0, 1)
        a, b, c, d = (builder.load(total) for total in totals)
        whole = _reduce(builder, builder.fadd, builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
        return builder.fadd(whole, _reduce(builder, builder.fadd, builder.load(rest)))

    return types.float32(x, weight, ahead), generate


@intrinsic
def add_four(context: Any, out: Any, p: Any, q: Any, r: Any, s: Any, a: Any, b: Any, c: Any, d: Any, ahead: Any) -> Any:
    """Add a * p, b * q, c * r, d * s to out, in this order for each element; `ahead` (four rows) are fetched.

    out float32 [C]; p, q, r, s and the tuple ahead's rows [C] in a weight's words, contiguous; a, b, c, d float32.
    """
    size = p.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        following = cgutils.unpack_tuple(builder, args[9], 4)
        arrays = _Arrays(context, builder, [out, p, q, r, s, *ahead.types], [*args[:5], *following])

        def add(at: Any, offset: int, lanes: int) -> None:
            kind = ir.VectorType(ir.FloatType(), lanes)
            total = arrays.vector(0, at, offset, ir.FloatType(), lanes)
            for row in range(4):
                scale = builder.insert_element(ir.Constant(kind, ir.Undefined), args[5 + row], ir.IntType(32)(0))
                mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
                weight = _wide(builder, arrays.place(1 + row, at, offset), p.dtype, lanes)
                total = _multiply_add(builder, builder.shuffle_vector(scale, scale, mask), weight, total)
            builder.store(total, builder.bitcast(arrays.place(0, at, offset), kind.as_pointer()), align=4)

        steps, left = arrays.steps(4 * LANES)
        with steps as (at, _):
            for group in range(4):
                add(at, LANES * group, LANES)
            for row in range(4):
                for line in range(size):
                    _prefetch(builder, arrays.place(5 + row, at, LINE // size * line))
        with left as (at, _):
            add(at, 0, 1)
        return context.get_dummy_value()

    return types.void(out, p, q, r, s, a, b, c, d, ahead), generate


def _common_ones(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Code that counts the bits that args[0] has in common with each of the other int64 [words], and weighs them."""
    arrays = _Arrays(context, builder, signature.args, args)
    planes, words = len(args) - 1, ir.IntType(64)

    def zero(lanes: int) -> Any:
        return cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(words, lanes), [0] * lanes))

    def ones(vector: Any) -> Any:
        name = f"llvm.ctpop.v{vector.type.count}i64"
        kind = ir.FunctionType(vector.type, [vector.type])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [vector])

    def count(totals: Any, at: Any, lanes: int) -> None:
        word = arrays.vector(0, at, 0, words, lanes)
        for p, total in enumerate(totals):
            both = builder.and_(word, arrays.vector(1 + p, at, 0, words, lanes))
            builder.store(builder.add(builder.load(total), ones(both)), total)

    def weighed(totals: Any) -> Any:
        """One plane counts as it is; of several, the last counts negative: two's complement."""
        values = [builder.load(total) for total in totals]
        result = values[0]
        for p, value in enumerate(values[1:], start=1):
            shifted = builder.shl(value, ir.Constant(value.type, [p] * value.type.count))
            result = builder.sub(result, shifted) if p == planes - 1 else builder.add(result, shifted)
        return _reduce(builder, builder.add, result)

    many, few = [zero(WORDS) for _ in range(planes)], [zero(1) for _ in range(planes)]
    steps, left = arrays.steps(WORDS)
    with steps as (at, _):
        count(many, at, WORDS)
    with left as (at, _):
        count(few, at, 1)
    return builder.add(weighed(many), weighed(few))


@intrinsic
def common_ones(context: Any, plane: Any, x: Any) -> Any:
    """Number of bits set in both: int64 [words] each, contiguous."""
    return types.int64(plane, x), _common_ones


@intrinsic
def common_four(context: Any, plane: Any, x0: Any, x1: Any, x2: Any, x3: Any) -> Any:
    """Sum over p of w_p * (number of bits set in plane and x_p), w = 1, 2, 4, -8: int64 [words] each, contiguous."""
    return types.int64(plane, x0, x1, x2, x3), _common_ones


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
