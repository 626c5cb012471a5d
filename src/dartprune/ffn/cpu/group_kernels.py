"""Fused FFN over rows of 4 and 8 bits in Numba: the chosen neurons are read where they lie, nothing else is.

Neurons are split over threads by their numbers, and passed block by block, so that a row of weights comes from memory
once for all inputs that need it. Within a block each input adds its own neurons, four at a time and in ascending order:
so it gives the same bits alone and in a batch.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import ACTIVATIONS as ACTIVATIONS
from dartprune.ffn.cpu.activations import activate
from dartprune.ffn.cpu.blocks import float_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.cut import choose_part
from dartprune.ffn.cpu.group_blocks import fetch_bytes
from dartprune.ffn.cpu.group_parts import (
    AGAIN,
    AHEAD,
    MANY,
    add,
    gather,
    high_part,
    neuron_values,
    product,
    room_for_rows,
    rounded_rows,
    share,
)
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.sketch import expected_block
from dartprune.ffn.row_format import GROUP

BLOCK = 256  # neurons that pass through the second cache at a time
SCORED = 64  # neurons that are scored at a time


@lean()
def _span(
    inputs, n, head, tail, offsets, biases, kind, known, gates, ups, means, index, first, last, room, partial
):  # fmt: skip
    """Add what the neurons index[first:last] give for input n to partial [width + groups]; those behind are fetched.

    means bf16 words [I] or empty: taken off, for they stand in the place of all neurons.  room: of `room_for_rows`.
    """
    codes, scale, sums = inputs
    rows, reals, shares = room
    width, end = offsets[0] * GROUP, index.shape[0] - 1
    i = first
    while i < last:
        many = min(MANY, last - i)
        for r in range(MANY):
            rows[0, r], rows[1, r] = index[i + min(r, many - 1)], index[min(i + many + r, end)]
        neuron_values(
            codes[n], scale[n], sums[n], head, tail, offsets, rows, many, biases, kind, known, gates, ups, reals
        )  # fmt: skip
        if means.shape[0]:
            for r in range(many):
                reals[1, r] -= float_of(means[rows[0, r]])
        add(partial[:width], partial[width:], shares, reals, tail, offsets, rows)
        i += many


@njit(nogil=True)
def _rows_part(
    first, last, inputs, head, tail, offsets, biases, kind, known, gates, ups, means, slots,
    index, count, partial,
):  # fmt: skip
    """Add the neurons first:last of every input's list (ascending) to partial [N, width + groups].

    means bf16 words [S, I] of each slot, or empty.
    """
    lines, room = partial.shape[0], room_for_rows(offsets[0])
    done, stop = np.empty(lines, np.int64), np.empty(lines, np.int64)
    nothing = np.empty(0, np.uint16)
    for n in range(lines):
        done[n], stop[n] = np.searchsorted(index[n, : count[n]], first), np.searchsorted(index[n, : count[n]], last)
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        for n in range(lines):
            mine, until = index[n, : count[n]], done[n]
            while until < stop[n] and mine[until] < end:
                until += MANY  # whole groups, whatever the blocks: a list is grouped alone as in a batch
            until = min(until, stop[n])
            _span(
                inputs, n, head, tail, offsets, biases, kind, known, gates[n], ups[n],
                means[slots[n]] if means.shape[0] else nothing, mine, done[n], until, room, partial[n],
            )  # fmt: skip
            done[n] = until


@njit(nogil=True)
def _lists(index, count, slots):
    """Each input's neurons, ascending: index int32 [N, W], count int32 [N] from lists of slots in any order."""
    rows = slots.shape[0]
    most = 0
    for n in range(rows):
        most = max(most, count[slots[n]])
    mine, many = np.empty((rows, most), np.int32), np.empty(rows, np.int32)
    for n in range(rows):
        k = count[slots[n]]
        given, ascending = index[slots[n]], True
        for i in range(k):
            mine[n, i] = given[i]
            ascending &= i == 0 or given[i] > given[i - 1]
        many[n] = k
        if not ascending:
            mine[n, :k] = np.sort(mine[n, :k])
    return mine, many


@kernel(parallel=True)
def chosen(x, head, tail, offsets, biases, kind, index, count, slots, threads, out):
    """The FFN of inputs x float32 [N, H], each over its slot's neurons: index int32 [S, W], count int32 [S]."""
    rows, groups = x.shape[0], offsets[0]
    inputs = rounded_rows(x, groups)
    index, count = _lists(index, count, slots)
    nothing, means = np.empty((rows, 0), np.float32), np.empty((0, 0), np.uint16)
    partial = np.zeros((threads, rows, groups * (GROUP + 1)), np.float32)
    for t in prange(threads):
        first, last = share(head.shape[0], t, threads)
        _rows_part(
            first, last, inputs, head, tail, offsets, biases, kind, 0,
            nothing, nothing, means, slots, index, count, partial[t],
        )  # fmt: skip
    for n in range(rows):
        gather(partial, n, out[n])


@njit(nogil=True)
def _gate_part(first, last, inputs, head, tail, offsets, biases, kind, index, count, slots, importance, gates, key):
    """Activations of the candidates first:last of every input to gates [N, I], their scores to key [N, I]."""
    codes, scale, sums = inputs
    gated = bool(offsets[3])
    for n in range(key.shape[0]):
        mine = index[n, : count[n]]
        end = mine.shape[0] - 1
        for j in range(np.searchsorted(mine, first), np.searchsorted(mine, last)):
            i, later = mine[j], mine[min(j + AHEAD, end)]
            v = product(codes[n], scale[n], sums[n], head, tail, offsets, not gated, i, later)
            if gated and biases[2] & 1:
                v += biases[0][i]
            if not gated and biases[2] & 2:
                v += biases[1][i]
            v = np.float32(activate(kind, v))
            gates[n, i] = v
            if importance.shape[0]:
                v *= importance[slots[n] if importance.shape[0] > 1 else 0, i]
            key[n, i] = abs(v)  # last, also for the sign of a NaN: the search needs bits without a sign


@kernel(parallel=True)
def gate_rows(
    x, head, tail, offsets, biases, kind, candidates, slots, choice, importance, threads, key, index, count, cut, out
):
    """`selector_ops.gated_rows` of up to 64 inputs.

    candidates (index int32 [S, W], count int32 [S]) of each slot; choice (wanted, least); importance float32
    [S, I], [1, I] or empty; key float32 [N, I], zeros; index int32 [N, W], count int32 [N], cut uint32 [N] and out
    float32 [N, H] are filled.
    """
    rows, groups = x.shape[0], offsets[0]
    inputs = rounded_rows(x, groups)
    gates = np.empty(key.shape, np.float32)
    listed, many = _lists(*candidates, slots)
    for t in prange(threads):
        first, last = share(head.shape[0], t, threads)
        _gate_part(first, last, inputs, head, tail, offsets, biases, kind, listed, many, slots, importance, gates, key)
    choose_part(0, rows, key.view(np.uint32), slots, *choice, index, count, cut)
    partial = np.zeros((threads, rows, groups * (GROUP + 1)), np.float32)
    known, means = 2 if offsets[3] else 0, np.empty((0, 0), np.uint16)
    for t in prange(threads):
        first, last = share(head.shape[0], t, threads)
        _rows_part(
            first, last, inputs, head, tail, offsets, biases, kind, known,
            gates, gates, means, slots, index, count, partial[t],
        )  # fmt: skip
    for n in range(rows):
        gather(partial, n, out[n])


@lean()
def _estimate_part(first, last, inputs, head, offsets, gates, ups, gate_middles, up_middles):
    """Products of the neurons first:last without their low codes, [N, I]; and what these add in the middle, [N, B]."""
    codes, scale, sums = inputs
    for i in range(first, last):
        fetch_bytes(head[min(i + AHEAD, head.shape[0] - 1)], 0, head.shape[1])
        fetch_bytes(head[min(i + AGAIN, head.shape[0] - 1)], 0, head.shape[1])
        for n in range(codes.shape[0]):
            if offsets[3]:
                gates[n, i], gate_middles[n, i - first] = high_part(
                    codes[n], scale[n], sums[n], head[i], offsets, False
                )
            ups[n, i], up_middles[n, i - first] = high_part(codes[n], scale[n], sums[n], head[i], offsets, True)


@njit(nogil=True)
def _score_part(first, last, inputs, head, offsets, biases, kind, slots, importance, errors, gates, ups, key):
    """Scores of the neurons first:last to key [N, I]; their products without the low codes to gates and ups [N, I]."""
    gated, rows = bool(offsets[3]), key.shape[0]
    middles = np.empty((2, rows, SCORED), np.float32)
    low, high = np.empty(SCORED, np.float32), np.empty(SCORED, np.float32)
    for start in range(first, last, SCORED):
        end = min(start + SCORED, last)
        _estimate_part(start, end, inputs, head, offsets, gates, ups, middles[0], middles[1])
        for n in range(rows):
            g, u = middles[0, n, : end - start], middles[1, n, : end - start]
            for i in range(start, end):
                u[i - start] += ups[n, i]
                if biases[2] & 2:
                    u[i - start] += biases[1][i]
                if gated:
                    g[i - start] += gates[n, i]
                    if biases[2] & 1:
                        g[i - start] += biases[0][i]
            known = errors[slots[n], :, start:end] if errors.shape[0] else errors[:0, 0, 0:0]
            expected_block(kind, gated, g, u, known, low[: end - start], high[: end - start])
            weight = importance[slots[n] if importance.shape[0] > 1 else 0]
            for i in range(start, end):
                key[n, i] = abs(u[i - start] * weight[i])


@kernel(parallel=True)
def nested_rows(
    x, head, tail, offsets, biases, kind, slots, choice, importance, errors, others, threads,
    key, index, count, cut, out,
):  # fmt: skip
    """`selector_ops.sketched_rows` of up to 64 inputs, the high codes being the sketch; arguments as for `gate_rows`.

    errors bf16 words [S, 4 or 2, I] or empty; others (means bf16 words [S, I], compensation float32 [S, H]) or both
    empty.
    """
    rows, groups = x.shape[0], offsets[0]
    inputs = rounded_rows(x, groups)
    gates, ups = np.empty(key.shape, np.float32), np.empty(key.shape, np.float32)
    for t in prange(threads):
        first, last = share(head.shape[0], t, threads)
        _score_part(first, last, inputs, head, offsets, biases, kind, slots, importance, errors, gates, ups, key)
    choose_part(0, rows, key.view(np.uint32), slots, *choice, index, count, cut)
    partial = np.zeros((threads, rows, groups * (GROUP + 1)), np.float32)
    for t in prange(threads):
        first, last = share(head.shape[0], t, threads)
        _rows_part(
            first, last, inputs, head, tail, offsets, biases, kind, 1,
            gates, ups, others[0], slots, index, count, partial[t],
        )  # fmt: skip
    for n in range(rows):
        gather(partial, n, out[n])
        if others[1].shape[0]:
            out[n] += others[1][slots[n]]


@kernel(parallel=True)
def estimates(x, head, offsets, threads, gates, ups):
    """Products of inputs x float32 [N, H] with the high codes, the low ones in the middle: gates and ups [N, I]."""
    inputs = rounded_rows(x, offsets[0])
    for t in prange(threads):
        first, last = share(head.shape[0], t, threads)
        middles = np.zeros((2, x.shape[0], SCORED), np.float32)
        for start in range(first, last, SCORED):
            end = min(start + SCORED, last)
            _estimate_part(start, end, inputs, head, offsets, gates, ups, middles[0], middles[1])
            ups[:, start:end] += middles[1, :, : end - start]
            if offsets[3]:
                gates[:, start:end] += middles[0, :, : end - start]
