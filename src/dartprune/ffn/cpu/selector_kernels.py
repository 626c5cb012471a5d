"""FFNs in which a row has the same bits alone and in a batch, fused, in Numba: of selectors, and of given masks.

Both selectors end alike: a score for every neuron, the exact cut of each row by a radix search over the bits of its
scores, then the rows of the chosen neurons. Every sum is made in one order whatever the number of threads and of rows:
a dot product belongs to one thread, and the down rows are added in ascending order by the thread that owns the columns.
So a row gives the same bits alone and in a batch.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import ACTIVATIONS as ACTIVATIONS
from dartprune.ffn.cpu.activations import ZERO, activate
from dartprune.ffn.cpu.blocks import LINE, add_rows, dots, float_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.cut import choose_part
from dartprune.ffn.cpu.kernels import MOST_ROWS as MOST_ROWS
from dartprune.ffn.cpu.kernels import union_of
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.sketch import BLOCK, estimates_part, integers_of, outlier_tables, round_row, score_part
from dartprune.ffn.cpu.sketch_bytes import input_bytes, outlier_columns

AHEAD = 4  # neurons between the one that is computed and the one that is fetched


@njit(inline="always")
def _dot(x, row, following):
    """One row at a time, so that its sum is made in the same order whoever else needs it."""
    (total,) = dots((x,), (row,), (following,))
    return total


@lean()
def _gate_part(first, last, x, weights, member, union, slots, importance, kind, key, value):
    """Read the candidates union[first:last]: their activations to value [N, I], their scores to key [N, I]."""
    gated, gate, up, _, gate_bias, up_bias, biased = weights
    matrix = gate if gated else up
    bias = gate_bias if gated else up_bias
    with_bias = biased & (1 if gated else 2)
    for u in range(first, last):
        i, following = union[u], union[min(u + AHEAD, last - 1)]
        for n in range(x.shape[0]):
            if (member[i] >> np.uint64(n)) & np.uint64(1):
                v = _dot(x[n], matrix[i], matrix[following])
                if with_bias:
                    v += bias[i]
                v = activate(kind, v)
                value[n, i] = v
                if importance.shape[0]:
                    v *= importance[slots[n] if importance.shape[0] > 1 else 0, i]
                key[n, i] = abs(v)  # last, also for the sign of a NaN: the search needs bits without a sign


@lean()
def _up_alone(first, last, x, weights, union, kind, means, slot, value):
    """`_up_part` of one row, which has chosen the whole union, two neurons at a time; returns where the rest begins."""
    _, gate, up, _, gate_bias, up_bias, biased = weights
    while first + 2 <= last:
        i, j = union[first], union[first + 1]
        p, q = union[min(first + AHEAD, last - 1)], union[min(first + AHEAD + 1, last - 1)]
        g, a, h, b = dots((x,), (gate[i], up[i], gate[j], up[j]), (gate[p], up[p], gate[q], up[q]))
        if biased & 1:
            g, h = g + gate_bias[i], h + gate_bias[j]
        if biased & 2:
            a, b = a + up_bias[i], b + up_bias[j]
        a, b = a * activate(kind, g), b * activate(kind, h)
        if means.shape[0]:
            a, b = a - float_of(means[slot, i]), b - float_of(means[slot, j])
        value[i], value[j] = a, b
        first += 2
    return first


@lean()
def _up_part(first, last, x, weights, member, union, kind, known, means, slots, value):
    """Make value[n, i] the chosen neurons' `act(gate . x) * (up . x)`; with `known` it holds the activation already.

    means bf16 words [S, I] or empty: taken off, for they stand in the place of all neurons.
    """
    gated, gate, up, _, gate_bias, up_bias, biased = weights
    if gated and not known and x.shape[0] == 1:
        first = _up_alone(first, last, x[0], weights, union, kind, means, slots[0], value[0])
    for u in range(first, last):
        i, following = union[u], union[min(u + AHEAD, last - 1)]
        for n in range(x.shape[0]):
            if (member[i] >> np.uint64(n)) & np.uint64(1):
                v = _dot(x[n], up[i], up[following])
                if biased & 2:
                    v += up_bias[i]
                if not gated:
                    v = activate(kind, v)
                elif known:
                    v *= value[n, i]
                else:
                    g = _dot(x[n], gate[i], gate[following])
                    if biased & 1:
                        g += gate_bias[i]
                    v *= activate(kind, g)
                if means.shape[0]:
                    v -= float_of(means[slots[n], i])
                value[n, i] = v


@lean()
def _down_block(first, last, down, rows, ahead, value, out):
    """Add the down rows of the neurons `rows` to out, columns first:last of one output row, while `ahead` are fetched.

    `ahead` starts with `rows` themselves.
    """
    i, end = 0, ahead.shape[0] - 1
    while i + 4 <= rows.shape[0]:
        a, b, c, d = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        e, f, g, h = ahead[min(i + 4, end)], ahead[min(i + 5, end)], ahead[min(i + 6, end)], ahead[min(i + 7, end)]
        following = down[e, first:last], down[f, first:last], down[g, first:last], down[h, first:last]
        p, q, r, s = down[a, first:last], down[b, first:last], down[c, first:last], down[d, first:last]
        add_rows((out,), (value[a], value[b], value[c], value[d]), (p, q, r, s), following)
        i += 4
    while i < rows.shape[0]:
        row = down[rows[i], first:last]
        add_rows((out,), (value[rows[i]],), (row,), (row,))
        i += 1


@njit(nogil=True)
def _down_part(first, last, down, union, index, count, value, compensation, slots, out):
    """Columns first:last of every output row: its neurons' down rows, in ascending order.

    compensation float32 [S, H] or empty: what a row of each slot begins with.

    The union passes block by block, so that a row of weights comes from memory once for all that chose it.
    """
    rows = out.shape[0]
    for n in range(rows):
        if compensation.shape[0]:
            out[n, first:last] = compensation[slots[n], first:last]
        else:
            out[n, first:last] = ZERO
    done = np.zeros(rows, np.int64)
    for start in range(0, union.shape[0], BLOCK):
        highest = union[min(start + BLOCK, union.shape[0]) - 1]
        for n in range(rows):
            mine = index[n, : count[n]]
            until = done[n]
            while until < mine.shape[0] and mine[until] <= highest:
                until += 1
            _down_block(first, last, down, mine[done[n] : until], mine[done[n] :], value[n], out[n, first:last])
            done[n] = until


@lean()
def _share(whole, t, threads, unit):
    """The t-th of `threads` shares of a range, cut at multiples of `unit`."""
    units = -(-whole // unit)
    return min(units * t // threads * unit, whole), min(units * (t + 1) // threads * unit, whole)


@njit(nogil=True)
def _no_others():
    """Nothing stands in the place of a neuron that is left out."""
    return np.empty((0, 0), np.uint16), np.empty((0, 0), np.float32)


# ---- what is called


@kernel()
def round_rows(x, bits, gaussian_step, outliers):
    """Rows x float32 [N, H] rounded, as the arrays of `sketch.InputPlanes`."""
    rows, words = x.shape[0], -(-x.shape[1] // 64)
    planes, step, total = np.empty((rows, bits, words), np.int64), np.empty(rows, np.float32), np.empty(rows, np.int32)
    place, exact = np.empty((rows, outliers), np.int64), np.empty((rows, outliers), np.float32)
    for n in range(rows):
        step[n], total[n] = round_row(x[n], bits, gaussian_step, planes[n], place[n], exact[n])
    return planes, step, total, place, exact


@njit(nogil=True)
def _rounded(x, rounding):
    """The rounded rows as `sketch.estimates_part` takes them."""
    planes, step, total, place, exact = round_rows(x, *rounding)
    inputs = input_bytes(planes)
    return planes, step, total, place, outlier_tables(exact), inputs, *outlier_columns(place, inputs.shape[1])


@kernel()
def integers(planes, x, total, out):
    """`sketch.sketch_integers` into out int32 [N, I]."""
    for n in range(x.shape[0]):
        integers_of(0, planes.shape[0], planes, x[n], total[n], out[n])


@kernel(parallel=True)
def estimates(x, rounding, gated, sketches, threads, gates, ups):
    """`sketch.sketch_dots` of rows x float32 [N, H] into gates (where there is a gate) and ups [N, I].

    sketches: planes and scale of gate and of up, the latter twice where there is no gate.
    """
    rounded = _rounded(x, rounding)
    for t in prange(threads):
        first, last = _share(ups.shape[1], t, threads, BLOCK)
        if gated:
            estimates_part(first, last, rounded, sketches[:2], gates)
        estimates_part(first, last, rounded, sketches[2:], ups)


@kernel()
def choose(key, slots, wanted, least, index, count, cut):
    """`selector_ops.chosen_rows` with each slot's wanted and least score; key and least as bits, uint32."""
    choose_part(0, key.shape[0], key, slots, wanted, least, index, count, cut)


@kernel(parallel=True)
def mask_rows(x, weights, lists, kind, threads, value, out):
    """`Backend.ffn` for up to 64 rows, each with the bits that it has alone; the weights' arguments as below.

    lists (index, count) of each row, ascending; value float32 [N, I], anything; out float32 [N, H] is filled.
    """
    rows, hidden, neurons = x.shape[0], x.shape[1], value.shape[1]
    index, count = lists
    own, (means, compensation) = np.arange(rows), _no_others()
    kept, union = union_of(neurons, rows, index, count, own)
    for t in prange(threads):
        first, last = _share(union.shape[0], t, threads, 1)
        _up_part(first, last, x, weights, kept, union, kind, False, means, own, value)
    for t in prange(threads):
        first, last = _share(hidden, t, threads, LINE)
        _down_part(first, last, weights[3], union, index, count, value, compensation, own, out)


@kernel()
def gate_rows_alone(x, weights, lists, choice, importance, kind, key, value, index, count, cut, out):
    """`selector_ops.gated_rows` for up to 64 rows in the calling thread.

    x float32 [N, H]; weights (gated, gate, up, down, gate_bias, up_bias, biased); lists (index, count, slots) of the
    candidates; choice (wanted, least); importance float32 [S, I], [1, I] or empty; key float32 [N, I], zeros;
    value float32 [N, I], anything; index int32 [N, W], count int32 [N], cut uint32 [N], out float32 [N, H] are filled.
    """
    neurons, slots = key.shape[1], lists[2]
    member, union = union_of(neurons, x.shape[0], *lists)
    _gate_part(0, union.shape[0], x, weights, member, union, slots, importance, kind, key, value)
    choose_part(0, x.shape[0], key.view(np.uint32), slots, *choice, index, count, cut)
    member, union = union_of(neurons, x.shape[0], index, count, np.arange(x.shape[0]))
    means, compensation = _no_others()
    if weights[0]:
        _up_part(0, union.shape[0], x, weights, member, union, kind, True, means, slots, value)
    _down_part(0, x.shape[1], weights[3], union, index, count, value, compensation, slots, out)


@kernel(parallel=True)
def gate_rows(x, weights, lists, choice, importance, kind, threads, key, value, index, count, cut, out):
    """The same with several threads."""
    rows, hidden, neurons, slots = x.shape[0], x.shape[1], key.shape[1], lists[2]
    member, union = union_of(neurons, rows, *lists)
    for t in prange(threads):
        first, last = _share(union.shape[0], t, threads, 1)
        _gate_part(first, last, x, weights, member, union, slots, importance, kind, key, value)
    bits = key.view(np.uint32)
    for t in prange(threads):
        first, last = _share(rows, t, threads, 1)
        choose_part(first, last, bits, slots, *choice, index, count, cut)
    means, compensation = _no_others()
    chosen, chosen_union = union_of(neurons, rows, index, count, np.arange(rows))
    if weights[0]:
        for t in prange(threads):
            first, last = _share(chosen_union.shape[0], t, threads, 1)
            _up_part(first, last, x, weights, chosen, chosen_union, kind, True, means, slots, value)
    for t in prange(threads):
        first, last = _share(hidden, t, threads, LINE)
        _down_part(first, last, weights[3], chosen_union, index, count, value, compensation, slots, out)


@kernel()
def sketch_rows_alone(
    x, weights, rounding, sketches, choice, slots, importance, errors, others, kind, key, value, index, count, cut, out
):
    """`selector_ops.sketched_rows` for up to 64 rows in the calling thread.

    rounding (activation bits, Gaussian step, outliers); sketches (planes and scale of gate, of up), the latter twice
    where there is no gate; errors bf16 words [S, 4 or 2, I] or empty; others (means bf16 words [S, I], compensation
    float32 [S, H]) or both empty; key float32 [N, I], anything; the rest as for `gate_rows_alone`.
    """
    neurons = key.shape[1]
    rounded = _rounded(x, rounding)
    score_part(0, neurons, rounded, weights, sketches, slots, importance, errors, kind, key)
    choose_part(0, x.shape[0], key.view(np.uint32), slots, *choice, index, count, cut)
    member, union = union_of(neurons, x.shape[0], index, count, np.arange(x.shape[0]))
    _up_part(0, union.shape[0], x, weights, member, union, kind, False, others[0], slots, value)
    _down_part(0, x.shape[1], weights[3], union, index, count, value, others[1], slots, out)


@kernel(parallel=True)
def sketch_rows(
    x, weights, rounding, sketches, choice, slots, importance, errors, others, kind, threads,
    key, value, index, count, cut, out,
):  # fmt: skip
    """The same with several threads."""
    rows, hidden, neurons = x.shape[0], x.shape[1], key.shape[1]
    rounded = _rounded(x, rounding)
    for t in prange(threads):
        first, last = _share(neurons, t, threads, BLOCK)
        score_part(first, last, rounded, weights, sketches, slots, importance, errors, kind, key)
    bits = key.view(np.uint32)
    for t in prange(threads):
        first, last = _share(rows, t, threads, 1)
        choose_part(first, last, bits, slots, *choice, index, count, cut)
    chosen, union = union_of(neurons, rows, index, count, np.arange(rows))
    for t in prange(threads):
        first, last = _share(union.shape[0], t, threads, 1)
        _up_part(first, last, x, weights, chosen, union, kind, False, others[0], slots, value)
    for t in prange(threads):
        first, last = _share(hidden, t, threads, LINE)
        _down_part(first, last, weights[3], union, index, count, value, others[1], slots, out)
