"""Fused pruned FFN in Numba: for each kept neuron its rows are read once, where they lie.

dot(gate row, x), dot(up row, x), activation, scaled add of the down row into the output. bf16 and fp16 weights are
widened in registers; all sums are float32. The kept neurons are split over threads, each with its own partial output,
and the partial outputs are added in a fixed order, so that a result does not depend on timing.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

# workqueue, the third threading layer, aborts the process when two Python threads enter it
if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "threadsafe"

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
MOST_ROWS = 64  # bits of a membership word

ZERO, ONE, HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
INVERSE_ROOT_TWO = np.float32(1 / math.sqrt(2))
GELU_SCALE, GELU_CUBE = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
QUICK = np.float32(1.702)


@intrinsic
def _wide(context: Any, value: Any) -> Any:
    """A weight as float32, widened in registers: uint16 holds bf16, int16 holds fp16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == types.uint16:
            word = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(word, ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    if value not in (types.uint16, types.int16, types.float32):
        return None
    return types.float32(value), generate


@njit(inline="always")
def _activate(kind: int, v: float) -> Any:
    if kind == 0:
        return v / (ONE + np.exp(-v))
    if kind == 1:
        return HALF * v * (ONE + np.float32(math.erf(v * INVERSE_ROOT_TWO)))
    if kind == 2:
        return HALF * v * (ONE + np.tanh(GELU_SCALE * (v + GELU_CUBE * v * v * v)))
    if kind == 3:
        return max(v, ZERO)
    if kind == 4:
        return max(v, ZERO) * max(v, ZERO)
    return v / (ONE + np.exp(-QUICK * v))


@njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True)
def _four_dots(x, a, b, c, d):
    s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
    for j in range(x.shape[0]):
        v = x[j]
        s0 += v * _wide(a[j])
        s1 += v * _wide(b[j])
        s2 += v * _wide(c[j])
        s3 += v * _wide(d[j])
    return s0, s1, s2, s3


@njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True)
def _add_two(out, s0, p, s1, q):
    for j in range(out.shape[0]):
        out[j] += s0 * _wide(p[j]) + s1 * _wide(q[j])


@njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True)
def _gated_pair(x, gate, up, down, gate_bias, up_bias, biased, r0, r1, kind, out):
    g0, g1, u0, u1 = _four_dots(x, gate[r0], gate[r1], up[r0], up[r1])
    if biased & 1:
        g0 += gate_bias[r0]
        g1 += gate_bias[r1]
    if biased & 2:
        u0 += up_bias[r0]
        u1 += up_bias[r1]
    _add_two(out, _activate(kind, g0) * u0, down[r0], _activate(kind, g1) * u1, down[r1])


@njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True)
def _plain_pair(x, up, down, up_bias, biased, r0, r1, kind, out):
    u0, u1 = ZERO, ZERO
    c, d = up[r0], up[r1]
    for j in range(x.shape[0]):
        v = x[j]
        u0 += v * _wide(c[j])
        u1 += v * _wide(d[j])
    if biased & 2:
        u0 += up_bias[r0]
        u1 += up_bias[r1]
    _add_two(out, _activate(kind, u0), down[r0], _activate(kind, u1), down[r1])


@njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True)
def _one(x, gated, gate, up, down, gate_bias, up_bias, biased, row, kind, out):
    g, u = ZERO, ZERO
    c = up[row]
    if gated:
        a = gate[row]
        for j in range(x.shape[0]):
            g += x[j] * _wide(a[j])
            u += x[j] * _wide(c[j])
        if biased & 1:
            g += gate_bias[row]
    else:
        for j in range(x.shape[0]):
            u += x[j] * _wide(c[j])
    if biased & 2:
        u += up_bias[row]
    s = _activate(kind, g) * u if gated else _activate(kind, u)
    p = down[row]
    for j in range(out.shape[0]):
        out[j] += s * _wide(p[j])


@njit(nogil=True)
def _span(x, gated, gate, up, down, gate_bias, up_bias, biased, index, first, last, kind, out):
    """Add what the neurons index[first:last] give for one row x [H] to out [H], two at a time."""
    i = first
    while i + 1 < last:
        if gated:
            _gated_pair(x, gate, up, down, gate_bias, up_bias, biased, index[i], index[i + 1], kind, out)
        else:
            _plain_pair(x, up, down, up_bias, biased, index[i], index[i + 1], kind, out)
        i += 2
    if i < last:
        _one(x, gated, gate, up, down, gate_bias, up_bias, biased, index[i], kind, out)


@njit(nogil=True)
def _union(neurons, rows, index, count, slots):
    """Which rows keep each neuron, as bits, and the neurons that any row keeps."""
    member = np.zeros(neurons, np.uint64)
    for n in range(rows):
        bit = np.uint64(1) << np.uint64(n)
        mine = index[slots[n]]
        for i in range(count[slots[n]]):
            member[mine[i]] |= bit
    union = np.empty(neurons, np.int32)
    k = 0
    for i in range(neurons):
        if member[i] != 0:
            union[k] = i
            k += 1
    return member, union[:k]


@njit(nogil=True)
def _shared_span(x, gated, gate, up, down, gate_bias, up_bias, biased, member, union, first, last, kind, out):
    """Add what the neurons union[first:last] give to every row that keeps them: x [N, H], out [N, H]."""
    for i in range(first, last):
        row = union[i]
        word = member[row]
        for n in range(x.shape[0]):
            if (word >> np.uint64(n)) & np.uint64(1):
                _one(x[n], gated, gate, up, down, gate_bias, up_bias, biased, row, kind, out[n])


@njit(parallel=True, nogil=True, cache=True)
def single(x, gated, gate, up, down, gate_bias, up_bias, biased, index, k, kind, threads, partial, out):
    """One row: x float32 [H], index int32 [>= k], partial float32 [threads, H], out float32 [H]."""
    for t in prange(threads):
        mine = partial[t]
        mine[:] = ZERO
        first, last = k * t // threads, k * (t + 1) // threads
        _span(x, gated, gate, up, down, gate_bias, up_bias, biased, index, first, last, kind, mine)
    for j in range(out.shape[0]):
        total = ZERO
        for t in range(threads):
            total += partial[t, j]
        out[j] = total


@njit(nogil=True, cache=True)
def single_alone(x, gated, gate, up, down, gate_bias, up_bias, biased, index, k, kind, out):
    """The same in the calling thread: no other thread is woken or waited for."""
    out[:] = ZERO
    _span(x, gated, gate, up, down, gate_bias, up_bias, biased, index, 0, k, kind, out)


@njit(parallel=True, nogil=True, cache=True)
def several(x, gated, gate, up, down, gate_bias, up_bias, biased, index, count, slots, kind, threads, partial, out):
    """Up to 64 rows, each with its slot's neurons: a weight row in the union is read once and serves all that keep it.

    x float32 [N, H], index int32 [S, W], count int32 [S], slots int64 [N], partial float32 [threads, N, H], out [N, H].
    """
    rows = x.shape[0]
    member, union = _union(up.shape[0], rows, index, count, slots)
    k = union.shape[0]
    for t in prange(threads):
        part = partial[t]
        part[:] = ZERO
        first, last = k * t // threads, k * (t + 1) // threads
        _shared_span(x, gated, gate, up, down, gate_bias, up_bias, biased, member, union, first, last, kind, part)
    for n in prange(rows):
        for j in range(out.shape[1]):
            total = ZERO
            for t in range(threads):
                total += partial[t, n, j]
            out[n, j] = total


@njit(nogil=True, cache=True)
def several_alone(x, gated, gate, up, down, gate_bias, up_bias, biased, index, count, slots, kind, out):
    """The same in the calling thread."""
    member, union = _union(up.shape[0], x.shape[0], index, count, slots)
    out[:] = ZERO
    k = union.shape[0]
    _shared_span(x, gated, gate, up, down, gate_bias, up_bias, biased, member, union, 0, k, kind, out)
