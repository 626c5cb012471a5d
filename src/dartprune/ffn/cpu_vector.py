"""Vector code for Numba beside `cpu_blocks`: bits in common, and activations that a loop can vectorise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from dartprune.ffn.cpu_blocks import LEVEL, _call, _pointers
from dartprune.ffn.cpu_kernels import GELU_CUBE, GELU_SCALE, HALF, ONE, QUICK, ZERO, _activate

LOG2E = np.float32(1 / math.log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)

_AHEAD = 4096  # bytes between what is counted and what is fetched
_WORD = ir.IntType(64)
_WORDS = ir.VectorType(_WORD, 8)


@intrinsic
def common_ones(context: Any, rows: Any, planes: Any) -> Any:
    """Bits that each row has in common with the planes: the sum of w_p * popcount(row AND plane p).

    Tuples of contiguous int64 arrays [words]. One plane has the weight 1; of several, plane p has 2^p and the last one
    -2^p (two's complement). Returns a tuple of int64, one for each row. What lies 4 KB behind each row is fetched
    meanwhile: rows are read in the order in which they lie.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        length = builder.extract_value(
            context.make_array(rows[0])(context, builder, builder.extract_value(args[0], 0)).shape, 0
        )
        whole = builder.sub(length, builder.urem(length, _WORD(_WORDS.count)))
        left, right = (_pointers(context, builder, kind, arg) for kind, arg in zip(signature.args, args, strict=True))

        def load(pointer: Any, at: Any, kind: Any) -> Any:
            return builder.load(builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer()), align=8)

        def count(sums: list[list[Any]], at: Any, kind: Any) -> None:
            words = [load(pointer, at, kind) for pointer in left]
            for p, pointer in enumerate(right):
                plane = load(pointer, at, kind)
                for r, word in enumerate(words):
                    ones = _call(
                        builder, "llvm.ctpop." + ("v8i64" if kind is _WORDS else "i64"), kind, builder.and_(word, plane)
                    )
                    builder.store(builder.add(builder.load(sums[r][p]), ones), sums[r][p])

        def weighed(totals: list[Any]) -> Any:
            result = builder.load(totals[0])
            for p, total in enumerate(totals[1:], start=1):
                value = builder.load(total)
                places = ir.Constant(value.type, [p] * value.type.count if value.type is _WORDS else p)
                change = builder.sub if p == len(totals) - 1 else builder.add
                result = change(result, builder.shl(value, places))
            return result

        vectors, scalars = (
            [[cgutils.alloca_once_value(builder, zero) for _ in right] for _ in left]
            for zero in (ir.Constant(_WORDS, [0] * _WORDS.count), ir.Constant(_WORD, 0))
        )
        with cgutils.for_range_slice(builder, _WORD(0), whole, _WORD(_WORDS.count)) as (at, _):
            for pointer in left:
                ahead = builder.gep(pointer, [builder.add(at, _WORD(_AHEAD // 8))])
                hints = [ir.IntType(32)(hint) for hint in (0, LEVEL, 1)]
                place = builder.bitcast(ahead, ir.IntType(8).as_pointer())
                _call(builder, "llvm.prefetch.p0", ir.VoidType(), place, *hints)
            count(vectors, at, _WORDS)
        with cgutils.for_range_slice(builder, whole, length, _WORD(1)) as (at, _):
            count(scalars, at, _WORD)
        results = [
            builder.add(_call(builder, "llvm.vector.reduce.add.v8i64", _WORD, weighed(vector)), weighed(scalar))
            for vector, scalar in zip(vectors, scalars, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, results)

    return types.UniTuple(types.int64, len(rows))(rows, planes), generate


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
