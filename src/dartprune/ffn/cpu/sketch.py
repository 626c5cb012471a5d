"""The sketch for Numba: inputs rounded to bit planes, products estimated from bits in common, scores of neurons."""

from __future__ import annotations

import numpy as np
from numba import njit

from dartprune.ffn.cpu.activations import ZERO, activate_all
from dartprune.ffn.cpu.blocks import common_ones, float_of
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.sketch_bytes import LANES, WORD, add_looked_up, bits_of, integers_by_bytes

BLOCK = 64  # neurons that pass through the nearer caches at a time


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


@lean(fastmath={"reassoc", "contract", "nsz"})
def _root_mean_square(x):
    total = ZERO
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    return np.sqrt(total / np.float32(x.shape[0]))


@njit(nogil=True)
def round_row(x, bits, gaussian_step, planes, place, exact):
    """Round one row, see `sketch.quantise_input`; returns the step and the total of the integers.

    x float32 [H]; planes int64 [A, words], place int64 [K] and exact float32 [K] are filled.
    """
    x = x.copy()
    top = np.float32(2 ** (bits - 1) - 1)
    _take_outliers(x, np.empty(planes.shape[1], np.uint32), place, exact)
    step = min(np.abs(x).max() / top, _root_mean_square(x) * gaussian_step)
    inverse = np.float32(1.0) / step if step > ZERO else ZERO
    rounded, total = np.zeros(planes.shape[1] * WORD, np.int8), np.int32(0)
    for j in range(x.shape[0]):
        rounded[j] = np.int8(min(max(np.rint(x[j] * inverse), -top), top))
    for j in range(x.shape[0]):
        total += np.int32(rounded[j])
    for w in range(planes.shape[1]):
        for p in range(bits):
            planes[p, w] = bits_of(rounded, w, p)
    return step, total


@lean()
def integers_of(first, last, planes, x, total, out):
    """`sketch.sketch_integers` of the neurons first:last and one row, to out [last - first], four at a time.

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
def outlier_tables(exact):
    """For four exact entries of a row at a time, the 16 sums that can come of them: float32 [N, K / 4, 16]."""
    rows, outliers = exact.shape
    tables = np.zeros((rows, (outliers + 3) // 4, 16), np.float32)
    for n in range(rows):
        for o in range(outliers):
            for combination in range(16):
                if combination >> (o & 3) & 1:
                    tables[n, o >> 2, combination] += exact[n, o]
    return tables


@njit(nogil=True)
def _room(rounded):
    """Room for a block of neurons: products and integers [N, B], codes [B, words * 64], columns of them [U, B]."""
    planes, _, _, _, _, inputs, columns, _ = rounded
    rows, codes = planes.shape[0], np.empty((BLOCK, inputs.shape[1]), np.uint8)
    taken = np.empty((columns.shape[0], BLOCK), np.uint8)
    return np.empty((rows, BLOCK), np.float32), np.empty((rows, BLOCK), np.int32), codes, taken


@lean()
def _integers(first, last, matrix, rounded, room):
    """`sketch.sketch_integers` of the neurons first:last and all rows; by bytes, where there are any."""
    planes, _, total, _, _, inputs, columns, _ = rounded
    _, exactly, codes, taken = room
    if not inputs.shape[0]:
        for n in range(planes.shape[0]):
            integers_of(first, last, matrix, planes[n], total[n], exactly[n])
        return
    integers_by_bytes(first, last, matrix, inputs, total, codes, exactly)
    for c in range(columns.shape[0]):
        j = columns[c]
        for i in range(last - first):
            taken[c, i] = codes[i, j]


@lean()
def _add_by_bits(first, last, n, matrix, place, tables, products):
    """Add what row n's exact entries give to products [N, B] of the neurons first:last.

    The bits of four entries, side by side, are the place in their table. In place of those that are not there any will
    do: they change nothing in it.
    """
    bits, outliers = matrix.shape[1], place.shape[1]
    for o in range(0, outliers, 4):
        end, table = outliers - 1, tables[n, o >> 2]
        p0, p1, p2, p3 = place[n, o], place[n, min(o + 1, end)], place[n, min(o + 2, end)], place[n, min(o + 3, end)]
        w0, w1, w2, w3 = np.uint64(p0 >> 6), np.uint64(p1 >> 6), np.uint64(p2 >> 6), np.uint64(p3 >> 6)
        j0, j1, j2, j3 = p0 & 63, p1 & 63, p2 & 63, p3 & 63
        base = table[15] * np.float32(2**bits - 1)
        for i in range(first, last):
            total = -base
            for k in range(bits):
                plane = matrix[i, k]
                low = (plane[w0] >> j0 & 1) | (plane[w1] >> j1 & 1) << 1
                high = (plane[w2] >> j2 & 1) | (plane[w3] >> j3 & 1) << 1
                total += np.float32(2 << k) * table[np.uint64(low | high << 2)]
            products[n, i - first] += total


@lean()
def _add_by_columns(bits, taken, which, tables, products):
    """The same for all rows and a whole block, from the columns of the codes; which [N, K] of them."""
    (rows, outliers), many = which.shape, tables.shape[1]
    columns, entries, out = taken.reshape(-1), tables.reshape(-1), products.reshape(-1)
    for n in range(rows):
        for o in range(0, outliers, 4):
            end, table = outliers - 1, (n * many + (o >> 2)) * 16
            c0, c1 = which[n, o] * BLOCK, which[n, min(o + 1, end)] * BLOCK
            c2, c3 = which[n, min(o + 2, end)] * BLOCK, which[n, min(o + 3, end)] * BLOCK
            base = -(entries[table + 15] * np.float32(2**bits - 1))
            for i in range(0, BLOCK, LANES):
                starts = c0 + i, c1 + i, c2 + i, c3 + i
                add_looked_up(columns, starts, bits, base, entries, table, out, n * BLOCK + i)


@lean()
def _estimate(first, last, sketch, rounded, bias, room):
    """Estimated products of the neurons first:last with every row: those of the room."""
    _integers(first, last, sketch[0], rounded, room)
    (matrix, scale), (_, step, _, place, tables, _, _, which) = sketch, rounded
    products, exactly, _, taken = room
    for n in range(products.shape[0]):
        for i in range(last - first):
            products[n, i] = np.float32(exactly[n, i]) * step[n]
        if not taken.shape[0]:
            _add_by_bits(first, last, n, matrix, place, tables, products)
    if taken.shape[0]:
        _add_by_columns(matrix.shape[1], taken, which, tables, products)
    for n in range(products.shape[0]):
        for i in range(first, last):
            products[n, i - first] *= scale[i]
        if bias.shape[0]:
            for i in range(first, last):
                products[n, i - first] += bias[i]


@njit(nogil=True)
def estimates_part(first, last, rounded, sketch, out):
    """Estimated products of the neurons first:last with every row, without biases, to out [N, I].

    rounded: planes, step, total and place of `selector_kernels.round_rows`, `outlier_tables` of the exact entries,
    `input_bytes` and `outlier_columns`.
    """
    room, none = _room(rounded), np.empty(0, np.float32)
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        _estimate(start, end, sketch, rounded, none, room)
        for n in range(out.shape[0]):
            for i in range(start, end):
                out[n, i] = room[0][n, i - start]


@lean()
def _mean_square(kind, estimate, mean, variance, low, high):
    """Make the estimates [B] `expected.expected_sizes`' mean squares of the activation; low and high [B]: room."""
    for i in range(estimate.shape[0]):
        middle = estimate[i] + float_of(mean[i])
        reach = np.sqrt(np.float32(3.0) * float_of(variance[i]))
        estimate[i], low[i], high[i] = middle, middle - reach, middle + reach
    activate_all(kind, estimate)
    activate_all(kind, low)
    activate_all(kind, high)
    for i in range(estimate.shape[0]):
        sides = low[i] * low[i] + high[i] * high[i]
        estimate[i] = np.float32(2 / 3) * (estimate[i] * estimate[i]) + np.float32(1 / 6) * sides


@lean()
def _expect(kind, gated, g, u, errors, low, high):
    """Make u [B] the expected sizes, see `expected.expected_sizes`; errors bf16 words [4 or 2, B]."""
    if gated:
        _mean_square(kind, g, errors[0], errors[1], low, high)
        for i in range(u.shape[0]):
            up = u[i] + float_of(errors[2, i])
            u[i] = np.sqrt(g[i] * (up * up + float_of(errors[3, i])))
    else:
        _mean_square(kind, u, errors[0], errors[1], low, high)
        for i in range(u.shape[0]):
            u[i] = np.sqrt(u[i])


@lean()
def activate_block(kind, gated, g, u):
    """Make u [B] activations from products g and u [B], `act(g) u`; `act(u)` where there is no gate."""
    if gated:
        activate_all(kind, g)
        for i in range(u.shape[0]):
            u[i] *= g[i]
    else:
        activate_all(kind, u)


@lean()
def expected_block(kind, gated, g, u, errors, low, high):
    """Make u [B] sizes of activations from products g and u [B]; expected ones where errors [4 or 2, B] are given."""
    if errors.shape[0]:
        _expect(kind, gated, g, u, errors, low, high)
    else:
        activate_block(kind, gated, g, u)


@njit(nogil=True)
def score_part(first, last, rounded, weights, sketches, slots, importance, errors, kind, key):
    """Scores of the neurons first:last for every row, to key [N, I]: see `sketch.sketch_scores`."""
    gated, _, _, _, gate_bias, up_bias, _ = weights
    low, high = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    gate_room, up_room = _room(rounded), _room(rounded)
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        size = end - start
        _estimate(start, end, sketches[2:], rounded, up_bias, up_room)
        if gated:
            _estimate(start, end, sketches[:2], rounded, gate_bias, gate_room)
        for n in range(key.shape[0]):
            g, u = gate_room[0][n, :size], up_room[0][n, :size]
            known = errors[slots[n], :, start:end] if errors.shape[0] else errors[:0, 0, 0:0]
            expected_block(kind, gated, g, u, known, low[:size], high[:size])
            scale = importance[slots[n] if importance.shape[0] > 1 else 0]
            for i in range(start, end):
                key[n, i] = abs(u[i - start] * scale[i])
