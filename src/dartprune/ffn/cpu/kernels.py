"""Fused pruned FFN in Numba: for each kept neuron its rows are read once, where they lie.

dot(gate row, x), dot(up row, x), activation, scaled add of the down row into the output. bf16 and fp16 weights are
widened in registers; all sums are float32. The kept neurons are split over threads, each with its own partial output,
and the partial outputs are added in a fixed order, so that a result does not depend on timing.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import ACTIVATIONS as ACTIVATIONS
from dartprune.ffn.cpu.activations import ZERO, activate
from dartprune.ffn.cpu.blocks import add_rows, dots
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.lean import lean

# workqueue, the third threading layer, aborts the process when two Python threads enter it
if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "threadsafe"

MOST_ROWS = 64  # bits of a membership word


@njit(inline="always")
def _gated(gate, up, row, gate_bias, up_bias, biased, kind):
    """A neuron's value, the input of its down row, from its dot products."""
    if biased & 1:
        gate += gate_bias[row]
    if biased & 2:
        up += up_bias[row]
    return np.float32(activate(kind, gate) * up)


@njit(inline="always")
def _plain(up, row, up_bias, biased, kind):
    if biased & 2:
        up += up_bias[row]
    return np.float32(activate(kind, up))


@lean()
def _four(x, gated, gate, up, down, gate_bias, up_bias, biased, index, i, later, kind, out):
    """Four neurons of one row x [H], index[i : i + 4], while index[later : later + 4] are fetched."""
    r0, r1, r2, r3 = index[i], index[i + 1], index[i + 2], index[i + 3]
    n0, n1, n2, n3 = index[later], index[later + 1], index[later + 2], index[later + 3]
    ups, ahead = (up[r0], up[r1], up[r2], up[r3]), (up[n0], up[n1], up[n2], up[n3])
    if gated:
        gates, ahead_gates = (gate[r0], gate[r1], gate[r2], gate[r3]), (gate[n0], gate[n1], gate[n2], gate[n3])
        g0, g1, g2, g3, u0, u1, u2, u3 = dots((x,), gates + ups, ahead_gates + ahead)
        a0 = _gated(g0, u0, r0, gate_bias, up_bias, biased, kind)
        a1 = _gated(g1, u1, r1, gate_bias, up_bias, biased, kind)
        a2 = _gated(g2, u2, r2, gate_bias, up_bias, biased, kind)
        a3 = _gated(g3, u3, r3, gate_bias, up_bias, biased, kind)
    else:
        u0, u1, u2, u3 = dots((x,), ups, ahead)
        a0 = _plain(u0, r0, up_bias, biased, kind)
        a1 = _plain(u1, r1, up_bias, biased, kind)
        a2 = _plain(u2, r2, up_bias, biased, kind)
        a3 = _plain(u3, r3, up_bias, biased, kind)
    downs, ahead_downs = (down[r0], down[r1], down[r2], down[r3]), (down[n0], down[n1], down[n2], down[n3])
    add_rows((out,), (a0, a1, a2, a3), downs, ahead_downs)


@lean()
def _one(x, gated, gate, up, down, gate_bias, up_bias, biased, row, later, kind, out):
    """One neuron of one row x [H], while the neuron `later` is fetched."""
    if gated:
        g, u = dots((x,), (gate[row], up[row]), (gate[later], up[later]))
        a = _gated(g, u, row, gate_bias, up_bias, biased, kind)
    else:
        (u,) = dots((x,), (up[row],), (up[later],))
        a = _plain(u, row, up_bias, biased, kind)
    add_rows((out,), (a,), (down[row],), (down[later],))


@lean()
def _for_two(x, y, gated, gate, up, down, gate_bias, up_bias, biased, row, later, kind, out, out_y):
    """One neuron of two rows x and y [H]: its weights are read and widened once."""
    if gated:
        g0, g1, u0, u1 = dots((x, y), (gate[row], up[row]), (gate[later], up[later]))
        a0 = _gated(g0, u0, row, gate_bias, up_bias, biased, kind)
        a1 = _gated(g1, u1, row, gate_bias, up_bias, biased, kind)
    else:
        u0, u1 = dots((x, y), (up[row],), (up[later],))
        a0 = _plain(u0, row, up_bias, biased, kind)
        a1 = _plain(u1, row, up_bias, biased, kind)
    add_rows((out, out_y), (a0, a1), (down[row],), (down[later],))


@lean()
def _span(x, gated, gate, up, down, gate_bias, up_bias, biased, index, first, last, kind, out):
    """Add what the neurons index[first:last] give for one row x [H] to out [H], four at a time."""
    i = first
    while i + 4 <= last:
        later = i + 4 if i + 8 <= last else i
        _four(x, gated, gate, up, down, gate_bias, up_bias, biased, index, i, later, kind, out)
        i += 4
    while i < last:
        later = index[min(i + 1, last - 1)]
        _one(x, gated, gate, up, down, gate_bias, up_bias, biased, index[i], later, kind, out)
        i += 1


@njit(nogil=True)
def union_of(neurons, rows, index, count, slots):
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
    mine = np.empty(x.shape[0], np.int64)
    for i in range(first, last):
        row, later = union[i], union[min(i + 1, last - 1)]
        word, k = member[row], np.int64(0)
        for n in range(x.shape[0]):
            mine[k] = n
            k += np.int64((word >> np.uint64(n)) & np.uint64(1))
        n = 0
        while n + 2 <= k:
            p, q = mine[n], mine[n + 1]
            _for_two(x[p], x[q], gated, gate, up, down, gate_bias, up_bias, biased, row, later, kind, out[p], out[q])
            n += 2
        if n < k:
            p = mine[n]
            _one(x[p], gated, gate, up, down, gate_bias, up_bias, biased, row, later, kind, out[p])


@kernel(parallel=True)
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


@kernel()
def single_alone(x, gated, gate, up, down, gate_bias, up_bias, biased, index, k, kind, out):
    """The same in the calling thread: no other thread is woken or waited for."""
    out[:] = ZERO
    _span(x, gated, gate, up, down, gate_bias, up_bias, biased, index, 0, k, kind, out)


@kernel(parallel=True)
def several(x, gated, gate, up, down, gate_bias, up_bias, biased, index, count, slots, kind, threads, partial, out):
    """Up to 64 rows, each with its slot's neurons: a weight row in the union is read once and serves all that keep it.

    x float32 [N, H], index int32 [S, W], count int32 [S], slots int64 [N], partial float32 [threads, N, H], out [N, H].
    """
    rows = x.shape[0]
    member, union = union_of(up.shape[0], rows, index, count, slots)
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


@kernel()
def several_alone(x, gated, gate, up, down, gate_bias, up_bias, biased, index, count, slots, kind, out):
    """The same in the calling thread."""
    member, union = union_of(up.shape[0], x.shape[0], index, count, slots)
    out[:] = ZERO
    k = union.shape[0]
    _shared_span(x, gated, gate, up, down, gate_bias, up_bias, biased, member, union, 0, k, kind, out)
