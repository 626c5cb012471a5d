"""Per-token selection and the FFN over the chosen neurons, fused, in Numba.

Both selectors end alike: a score for every neuron, the exact cut of each row by a radix search over the bits of its
scores, then the rows of the chosen neurons. Every sum is made in one order whatever the number of threads and of rows:
a dot product belongs to one thread, and the down rows are added in ascending order by the thread that owns the columns.
So a row gives the same bits alone and in a batch.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu_blocks import LINE, add_rows, dots
from dartprune.ffn.cpu_kernels import ACTIVATIONS as ACTIVATIONS
from dartprune.ffn.cpu_kernels import MOST_ROWS as MOST_ROWS
from dartprune.ffn.cpu_kernels import ZERO, _activate, _union
from dartprune.ffn.cpu_vector import activate_all, common_ones

BLOCK = 64  # neurons that pass through the nearer caches at a time
BINS = 2048
AHEAD = 4  # neurons between the one that is computed and the one that is fetched
INFINITE = np.uint32(0x7F800000)  # the bits of float32 infinity


# ---- the cut of one row


@njit(nogil=True)
def _bin_of(tally, need):
    """The highest bin with `need` entries in it and above, and how many of its own are needed."""
    b = tally.shape[0] - 1
    while tally[b] < need:
        need -= tally[b]
        b -= 1
    return b, need


@njit(nogil=True)
def _cut(key, wanted, tally, pool):
    """The wanted-th highest key, and how many keys equal to it are taken; wanted is 1 .. the number of keys over 0.

    key uint32 [I], bits of floats that are not negative, searched 11 + 11 + 9 bits at a time. pool uint32 [I].
    """
    tally[:] = 0
    for i in range(key.shape[0]):
        tally[key[i] >> np.uint32(20)] += 1
    b, need = _bin_of(tally, wanted)
    found = 0
    for i in range(key.shape[0]):
        pool[found] = key[i]
        found += np.int64(key[i] >> np.uint32(20) == b)
    cut = np.uint32(b) << np.uint32(20)
    tally[:] = 0
    for i in range(found):
        tally[(pool[i] >> np.uint32(9)) & np.uint32(2047)] += 1
    b, need = _bin_of(tally, need)
    cut |= np.uint32(b) << np.uint32(9)
    tally[:512] = 0
    for i in range(found):
        if pool[i] >> np.uint32(9) == cut >> np.uint32(9):
            tally[pool[i] & np.uint32(511)] += 1
    b, need = _bin_of(tally[:512], need)
    return cut | np.uint32(b), need


@njit(nogil=True)
def _choose(key, wanted, least, threshold, tally, pool, index):
    """The highest keys of one row: see `token_ops.chosen_rows`.

    key uint32 [I], threshold: whether `least`, the bits of one, holds in place of `wanted`. index int32 [W] is filled,
    ascending. Returns their number and the bits of the row's own cut.
    """
    neurons = key.shape[0]
    positive = 0
    reached = 0
    for i in range(neurons):
        positive += np.int64(key[i] > 0)
        reached += np.int64((key[i] >= least) & (key[i] > 0))
    own = min(max(wanted, 0), positive)
    lowest, ties, bits = np.uint32(0), 0, INFINITE
    if own > 0:
        lowest, ties = _cut(key, own, tally, pool)
        bits = lowest
    take = min(reached if threshold else own, index.shape[0])
    if take == 0:
        return 0, bits
    if threshold and take == reached:
        lowest, ties = max(least, np.uint32(1)), neurons
    elif take != own:
        lowest, ties = _cut(key, take, tally, pool)
    # the pool is free again: every neuron is written and kept only where it is chosen, without a branch
    k = 0
    for i in range(neurons):
        equal = key[i] == lowest
        pool[k] = i
        k += np.int64((key[i] > lowest) | (equal & (ties > 0)))
        ties -= np.int64(equal)
    for i in range(k):
        index[i] = pool[i]
    return k, bits


@njit(nogil=True)
def _choose_part(first, last, key, slots, wanted, least, index, count, cut):
    """Choose for the rows first:last; `least` is empty or has the threshold's bits for each slot."""
    tally = np.empty(BINS, np.int32)
    pool = np.empty(key.shape[1] + 1, np.uint32)
    for n in range(first, last):
        slot = slots[n]
        bits = least[slot] if least.shape[0] else np.uint32(0)
        count[n], cut[n] = _choose(key[n], wanted[slot], bits, least.shape[0] > 0, tally, pool, index[n])


# ---- the rows of weights


@njit(inline="always")
def _dot(x, row, following):
    """One row at a time, so that its sum is made in the same order whoever else needs it."""
    (total,) = dots((x,), (row,), (following,))
    return total


@njit(nogil=True)
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
                v = _activate(kind, v)
                value[n, i] = v
                if importance.shape[0]:
                    v *= importance[slots[n] if importance.shape[0] > 1 else 0, i]
                key[n, i] = abs(v)  # last, also for the sign of a NaN: the search needs bits without a sign


@njit(nogil=True)
def _up_part(first, last, x, weights, member, union, kind, known, value):
    """Make value[n, i] the chosen neurons' `act(gate . x) * (up . x)`; with `known` it holds the activation already."""
    gated, gate, up, _, gate_bias, up_bias, biased = weights
    for u in range(first, last):
        i, following = union[u], union[min(u + AHEAD, last - 1)]
        for n in range(x.shape[0]):
            if (member[i] >> np.uint64(n)) & np.uint64(1):
                v = _dot(x[n], up[i], up[following])
                if biased & 2:
                    v += up_bias[i]
                if not gated:
                    v = _activate(kind, v)
                elif known:
                    v *= value[n, i]
                else:
                    g = _dot(x[n], gate[i], gate[following])
                    if biased & 1:
                        g += gate_bias[i]
                    v *= _activate(kind, g)
                value[n, i] = v


@njit(nogil=True)
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
def _down_part(first, last, down, union, index, count, value, out):
    """Columns first:last of every output row: its neurons' down rows, in ascending order.

    The union passes block by block, so that a row of weights comes from memory once for all that chose it.
    """
    rows = out.shape[0]
    out[:, first:last] = ZERO
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


# ---- the sketch


@njit(nogil=True)
def _take_outliers(x, peak, place, exact):
    """Move the largest entries of x float32 [H] to `exact`, ties to the lower place; peak uint32 [ceil(H / 64)]."""
    key = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
    for w in range(peak.shape[0]):
        peak[w] = key[w * 64 : w * 64 + 64].max()
    for o in range(place.shape[0]):
        w = np.argmax(peak)
        part = key[w * 64 : w * 64 + 64]
        at = w * 64 + np.argmax(part)
        place[o], exact[o] = at, x[at]
        x[at], key[at] = ZERO, 0
        peak[w] = part.max()


@njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True)
def _root_mean_square(x):
    total = ZERO
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    return np.sqrt(total / np.float32(x.shape[0]))


@njit(nogil=True)
def _round(x, bits, gaussian_step, planes, place, exact):
    """Round one row, see `token_ops.quantise_input`; returns the step and the total of the integers.

    x float32 [H]; planes int64 [A, words], place int64 [K] and exact float32 [K] are filled.
    """
    x = x.copy()
    top = np.float32(2 ** (bits - 1) - 1)
    _take_outliers(x, np.empty(planes.shape[1], np.uint32), place, exact)
    step = min(np.abs(x).max() / top, _root_mean_square(x) * gaussian_step)
    inverse = np.float32(1.0) / step if step > ZERO else ZERO
    total = 0
    for w in range(planes.shape[1]):
        part = x[w * 64 : w * 64 + 64]
        planes[:, w] = 0
        for j in range(part.shape[0]):
            v = np.int64(min(max(np.rint(part[j] * inverse), -top), top))
            total += v
            for p in range(bits):
                planes[p, w] |= ((v >> p) & 1) << j
    return step, total


@njit(nogil=True)
def _integers(first, last, planes, x, total, out):
    """`token_ops.sketch_integers` of the neurons first:last and one row, to out [last - first], four at a time.

    planes int64 [I, b, words], x int64 [A, words].
    """
    bits, highest = planes.shape[1], x.shape[0] - 1
    for i in range(first, last, 4):
        d = -(2**bits - 1) * total
        d0, d1, d2, d3 = d, d, d, d
        for k in range(bits):
            end = last - 1
            rows = (planes[i, k], planes[min(i + 1, end), k], planes[min(i + 2, end), k], planes[min(i + 3, end), k])
            if highest == 3:
                s0, s1, s2, s3 = common_ones(rows, (x[0], x[1], x[2], x[3]))
            else:
                s0, s1, s2, s3 = 0, 0, 0, 0
                for p in range(highest + 1):
                    weight = -(1 << p) if p == highest else 1 << p
                    t0, t1, t2, t3 = common_ones(rows, (x[p],))
                    s0, s1, s2, s3 = s0 + weight * t0, s1 + weight * t1, s2 + weight * t2, s3 + weight * t3
            d0, d1, d2, d3 = d0 + (s0 << k + 1), d1 + (s1 << k + 1), d2 + (s2 << k + 1), d3 + (s3 << k + 1)
        at = i - first
        out[at] = d0
        if i + 1 < last:
            out[at + 1] = d1
        if i + 2 < last:
            out[at + 2] = d2
        if i + 3 < last:
            out[at + 3] = d3


@njit(nogil=True)
def _add_outliers(first, planes, place, exact, products):
    """Add what up to four exact entries of x give to products [B] of the neurons from `first` on.

    Their bits, side by side, are the place in a table of the 16 sums that can come of it.
    """
    bits, outliers = planes.shape[1], place.shape[0]
    table, word, shift = np.zeros(16, np.float32), np.zeros(4, np.int64), np.zeros(4, np.int64)
    for o in range(outliers):
        word[o], shift[o] = place[o] >> 6, place[o] & 63
        for combination in range(16):
            if combination >> o & 1:
                table[combination] += exact[o]
    w0, w1, w2, w3 = word[0], word[1], word[2], word[3]
    j0, j1, j2, j3 = shift[0], shift[1], shift[2], shift[3]
    base = table[15] * np.float32(2**bits - 1)
    for i in range(products.shape[0]):
        total = -base
        for k in range(bits):
            plane = planes[first + i, k]
            low = (plane[w0] >> j0 & 1) | (plane[w1] >> j1 & 1) << 1
            high = (plane[w2] >> j2 & 1) | (plane[w3] >> j3 & 1) << 1
            total += np.float32(2 << k) * table[low | high << 2]
        products[i] += total


@njit(nogil=True)
def _estimate(first, last, planes, scale, x, step, total, place, exact, bias, exactly, products):
    """Estimated products float32 [last - first] of the neurons first:last with one rounded row, to products."""
    _integers(first, last, planes, x, total, exactly)
    for i in range(last - first):
        products[i] = np.float32(exactly[i]) * step
    for o in range(0, place.shape[0], 4):
        _add_outliers(first, planes, place[o : o + 4], exact[o : o + 4], products[: last - first])
    for i in range(first, last):
        products[i - first] *= scale[i]
    if bias.shape[0]:
        for i in range(first, last):
            products[i - first] += bias[i]


@njit(nogil=True)
def _score_part(first, last, rounded, weights, sketches, slots, importance, kind, key):
    """Scores of the neurons first:last for every row, to key [N, I]: see `token_ops.sketch_scores`."""
    gated, _, _, _, gate_bias, up_bias, _ = weights
    gate, gate_scale, up, up_scale = sketches
    planes, step, total, place, exact = rounded
    g, u, exactly = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        for n in range(planes.shape[0]):
            row = (planes[n], step[n], total[n], place[n], exact[n])
            _estimate(start, end, up, up_scale, *row, up_bias, exactly, u)
            if gated:
                _estimate(start, end, gate, gate_scale, *row, gate_bias, exactly, g)
                activate_all(kind, g[: end - start])
                for i in range(end - start):
                    u[i] *= g[i]
            else:
                activate_all(kind, u[: end - start])
            scale = importance[slots[n] if importance.shape[0] > 1 else 0]
            for i in range(start, end):
                key[n, i] = abs(u[i - start] * scale[i])


# ---- what is called


@njit(nogil=True, cache=True)
def round_rows(x, bits, gaussian_step, outliers):
    """Rows x float32 [N, H] rounded, as the arrays of `token_ops.InputPlanes`."""
    rows, words = x.shape[0], -(-x.shape[1] // 64)
    planes, step, total = np.empty((rows, bits, words), np.int64), np.empty(rows, np.float32), np.empty(rows, np.int32)
    place, exact = np.empty((rows, outliers), np.int64), np.empty((rows, outliers), np.float32)
    for n in range(rows):
        step[n], total[n] = _round(x[n], bits, gaussian_step, planes[n], place[n], exact[n])
    return planes, step, total, place, exact


@njit(nogil=True, cache=True)
def integers(planes, x, total, out):
    """`token_ops.sketch_integers` into out int32 [N, I]."""
    for n in range(x.shape[0]):
        _integers(0, planes.shape[0], planes, x[n], total[n], out[n])


@njit(nogil=True, cache=True)
def choose(key, slots, wanted, least, index, count, cut):
    """`token_ops.chosen_rows` with each slot's wanted and least score; key and least as bits, uint32."""
    _choose_part(0, key.shape[0], key, slots, wanted, least, index, count, cut)


@njit(nogil=True)
def _share(whole, t, threads, unit):
    """The t-th of `threads` shares of a range, cut at multiples of `unit`."""
    units = -(-whole // unit)
    return min(units * t // threads * unit, whole), min(units * (t + 1) // threads * unit, whole)


@njit(nogil=True, cache=True)
def gate_rows_alone(x, weights, lists, choice, importance, kind, key, value, index, count, cut, out):
    """`token_ops.gated_rows` for up to 64 rows in the calling thread.

    x float32 [N, H]; weights (gated, gate, up, down, gate_bias, up_bias, biased); lists (index, count, slots) of the
    candidates; choice (wanted, least); importance float32 [S, I], [1, I] or empty; key float32 [N, I], zeros;
    value float32 [N, I], anything; index int32 [N, W], count int32 [N], cut uint32 [N], out float32 [N, H] are filled.
    """
    neurons, slots = key.shape[1], lists[2]
    member, union = _union(neurons, x.shape[0], *lists)
    _gate_part(0, union.shape[0], x, weights, member, union, slots, importance, kind, key, value)
    _choose_part(0, x.shape[0], key.view(np.uint32), slots, *choice, index, count, cut)
    member, union = _union(neurons, x.shape[0], index, count, np.arange(x.shape[0]))
    if weights[0]:
        _up_part(0, union.shape[0], x, weights, member, union, kind, True, value)
    _down_part(0, x.shape[1], weights[3], union, index, count, value, out)


@njit(parallel=True, nogil=True, cache=True)
def gate_rows(x, weights, lists, choice, importance, kind, threads, key, value, index, count, cut, out):
    """The same with several threads."""
    rows, hidden, neurons, slots = x.shape[0], x.shape[1], key.shape[1], lists[2]
    member, union = _union(neurons, rows, *lists)
    for t in prange(threads):
        first, last = _share(union.shape[0], t, threads, 1)
        _gate_part(first, last, x, weights, member, union, slots, importance, kind, key, value)
    bits = key.view(np.uint32)
    for t in prange(threads):
        first, last = _share(rows, t, threads, 1)
        _choose_part(first, last, bits, slots, *choice, index, count, cut)
    chosen, chosen_union = _union(neurons, rows, index, count, np.arange(rows))
    if weights[0]:
        for t in prange(threads):
            first, last = _share(chosen_union.shape[0], t, threads, 1)
            _up_part(first, last, x, weights, chosen, chosen_union, kind, True, value)
    for t in prange(threads):
        first, last = _share(hidden, t, threads, LINE)
        _down_part(first, last, weights[3], chosen_union, index, count, value, out)


@njit(nogil=True, cache=True)
def sketch_rows_alone(
    x, weights, rounding, sketches, choice, slots, importance, kind, key, value, index, count, cut, out
):
    """`token_ops.sketched_rows` for up to 64 rows in the calling thread.

    rounding (activation bits, Gaussian step, outliers); sketches (planes and scale of gate, of up), the
    latter twice where there is no gate; key float32 [N, I], anything; the rest as for `gate_rows_alone`.
    """
    neurons = key.shape[1]
    rounded = round_rows(x, *rounding)
    _score_part(0, neurons, rounded, weights, sketches, slots, importance, kind, key)
    _choose_part(0, x.shape[0], key.view(np.uint32), slots, *choice, index, count, cut)
    member, union = _union(neurons, x.shape[0], index, count, np.arange(x.shape[0]))
    _up_part(0, union.shape[0], x, weights, member, union, kind, False, value)
    _down_part(0, x.shape[1], weights[3], union, index, count, value, out)


@njit(parallel=True, nogil=True, cache=True)
def sketch_rows(
    x, weights, rounding, sketches, choice, slots, importance, kind, threads, key, value, index, count, cut, out
):
    """The same with several threads."""
    rows, hidden, neurons = x.shape[0], x.shape[1], key.shape[1]
    rounded = round_rows(x, *rounding)
    for t in prange(threads):
        first, last = _share(neurons, t, threads, BLOCK)
        _score_part(first, last, rounded, weights, sketches, slots, importance, kind, key)
    bits = key.view(np.uint32)
    for t in prange(threads):
        first, last = _share(rows, t, threads, 1)
        _choose_part(first, last, bits, slots, *choice, index, count, cut)
    chosen, union = _union(neurons, rows, index, count, np.arange(rows))
    for t in prange(threads):
        first, last = _share(union.shape[0], t, threads, 1)
        _up_part(first, last, x, weights, chosen, union, kind, False, value)
    for t in prange(threads):
        first, last = _share(hidden, t, threads, LINE)
        _down_part(first, last, weights[3], union, index, count, value, out)
