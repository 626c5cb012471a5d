"""The sketch for Numba: inputs rounded to bit planes, products estimated from bits in common, scores of neurons."""

from __future__ import annotations

import numpy as np
from numba import njit

from dartprune.ffn.cpu.activations import ZERO, activate_all
from dartprune.ffn.cpu.blocks import common_ones, float_of
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


@njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True)
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


@njit(nogil=True)
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
def _add_outliers(first, planes, codes, place, exact, products):
    """Add what up to four exact entries of x give to products [B] of the neurons from `first` on.

    Their bits, side by side, are the place in a table of the 16 sums that can come of it. codes: the neurons' planes as
    bytes, or no columns.
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
    if codes.shape[1]:
        # of places that are not there any will do: they are in no entry of the table
        four = w0 << 6 | j0, w1 << 6 | j1, w2 << 6 | j2, w3 << 6 | j3
        for i in range(0, products.shape[0], LANES):
            add_looked_up(codes, i, four, bits, -base, table, products)
        return
    for i in range(products.shape[0]):
        total = -base
        for k in range(bits):
            plane = planes[first + i, k]
            low = (plane[w0] >> j0 & 1) | (plane[w1] >> j1 & 1) << 1
            high = (plane[w2] >> j2 & 1) | (plane[w3] >> j3 & 1) << 1
            total += np.float32(2 << k) * table[low | high << 2]
        products[i] += total


@njit(nogil=True)
def _integers(first, last, planes, x, total, inputs, codes, out):
    """`sketch.sketch_integers` of the neurons first:last and all rows, to out [N, B]; by bytes where there are any."""
    if inputs.shape[0]:
        integers_by_bytes(first, last, planes, inputs, total, codes, out)
    else:
        for n in range(x.shape[0]):
            integers_of(first, last, planes, x[n], total[n], out[n])


@njit(nogil=True)
def _room(rounded):
    """Room for a block of neurons: their integers [N, B] and their codes in bytes [B + 1, words * 64]."""
    planes, _, _, _, _, inputs = rounded
    return np.empty((planes.shape[0], BLOCK), np.int32), np.empty((BLOCK + 1, inputs.shape[1]), np.uint8)


@njit(nogil=True)
def _estimate(first, last, planes, scale, step, place, exact, bias, exactly, codes, products):
    """Estimated products float32 [last - first] of the neurons first:last with one rounded row, to products.

    exactly int32 [B], codes: of these neurons and this row, see `_room`.
    """
    for i in range(last - first):
        products[i] = np.float32(exactly[i]) * step
    for o in range(0, place.shape[0], 4):
        _add_outliers(first, planes, codes, place[o : o + 4], exact[o : o + 4], products[: last - first])
    for i in range(first, last):
        products[i - first] *= scale[i]
    if bias.shape[0]:
        for i in range(first, last):
            products[i - first] += bias[i]


@njit(nogil=True)
def estimates_part(first, last, rounded, sketch, out):
    """Estimated products of the neurons first:last with every row, without biases, to out [N, I].

    rounded: as `selector_kernels.round_rows` gives them, and `input_bytes` of them.
    """
    matrix, scale = sketch
    planes, step, total, place, exact, inputs = rounded
    none = np.empty(0, np.float32)
    exactly, codes = _room(rounded)
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        _integers(start, end, matrix, planes, total, inputs, codes, exactly)
        for n in range(planes.shape[0]):
            row = step[n], place[n], exact[n]
            _estimate(start, end, matrix, scale, *row, none, exactly[n], codes, out[n, start:end])


@njit(nogil=True)
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


@njit(nogil=True)
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


@njit(nogil=True)
def expected_block(kind, gated, g, u, errors, low, high):
    """Make u [B] sizes of activations from products g and u [B]; expected ones where errors [4 or 2, B] are given."""
    if errors.shape[0]:
        _expect(kind, gated, g, u, errors, low, high)
    elif gated:
        activate_all(kind, g)
        for i in range(u.shape[0]):
            u[i] *= g[i]
    else:
        activate_all(kind, u)


@njit(nogil=True)
def score_part(first, last, rounded, weights, sketches, slots, importance, errors, kind, key):
    """Scores of the neurons first:last for every row, to key [N, I]: see `sketch.sketch_scores`."""
    gated, _, _, _, gate_bias, up_bias, _ = weights
    gate, gate_scale, up, up_scale = sketches
    planes, step, total, place, exact, inputs = rounded
    g, u = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    low, high = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    of_gate, gate_codes = _room(rounded)
    of_up, up_codes = _room(rounded)
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        _integers(start, end, up, planes, total, inputs, up_codes, of_up)
        if gated:
            _integers(start, end, gate, planes, total, inputs, gate_codes, of_gate)
        for n in range(planes.shape[0]):
            row = step[n], place[n], exact[n]
            _estimate(start, end, up, up_scale, *row, up_bias, of_up[n], up_codes, u)
            if gated:
                _estimate(start, end, gate, gate_scale, *row, gate_bias, of_gate[n], gate_codes, g)
            size = end - start
            known = errors[slots[n], :, start:end] if errors.shape[0] else errors[:0, 0, 0:0]
            expected_block(kind, gated, g[:size], u[:size], known, low[:size], high[:size])
            scale = importance[slots[n] if importance.shape[0] > 1 else 0]
            for i in range(start, end):
                key[n, i] = abs(u[i - start] * scale[i])
