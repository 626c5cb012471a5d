"""Fused FFN over rows of 4 and 8 bits in Numba: the chosen neurons are read once, where they lie.

The input is rounded to 8 bits in groups of 32, once for a call; products of codes are whole numbers, everything that is
summed over groups is float32. Neurons are split over threads as in `kernels`, and added in the same fixed order.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import ACTIVATIONS as ACTIVATIONS
from dartprune.ffn.cpu.activations import ZERO, activate
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.group_blocks import add_codes, fetch_bytes, float_at, row_parts
from dartprune.ffn.cpu.kernels import union_of
from dartprune.ffn.quantised import GROUP, LANES, QUAD, SEGMENTS, STEPS

LARGEST, SECOND, THIRD = SEGMENTS
MOST = np.float32(127.0)
BOTH = 4  # neurons whose down rows are added at a time


@njit(nogil=True)
def group_inputs(x, codes, scale, sums):
    """Round x float32 [H] to 8 bits in groups.

    Gives codes int8 [groups * 32] in the order of the rows' codes, scale float32 [groups], and sums float32 [groups],
    each group's sum after rounding.
    """
    groups = scale.shape[0]
    padded = np.zeros(groups * GROUP, np.float32)
    padded[: x.shape[0]] = x
    first = 0
    while first < groups:
        left = groups - first
        lanes = LARGEST if left >= LARGEST else (SECOND if left >= SECOND else THIRD)
        for lane in range(lanes):
            part = padded[(first + lane) * GROUP : (first + lane + 1) * GROUP]
            largest = ZERO
            for k in range(GROUP):
                largest = max(largest, abs(part[k]))
            step = largest / MOST
            inverse = MOST / largest if largest > ZERO else ZERO
            total = np.int32(0)
            at = first * GROUP + lane * QUAD
            for s in range(STEPS):
                for j in range(QUAD):
                    code = np.int8(np.rint(part[s * QUAD + j] * inverse))
                    codes[at + s * QUAD * lanes + j] = code
                    total += np.int32(code)
            scale[first + lane] = step
            sums[first + lane] = step * np.float32(total)
        first += lanes


@njit(inline="always")
def product(x, scale, sums, head, tail, offsets, of_up):
    """One input's dot product with the gate's or up's row of a neuron: head and tail are its own."""
    groups, high, low = offsets[0], offsets[1], offsets[2]
    at, scales, rest = (offsets[5], offsets[7], offsets[9]) if of_up else (offsets[4], offsets[6], offsets[8])
    if high == 2:
        whole, lows, _ = row_parts(x, scale, sums, head, scales, head, at, groups, 2, 1)
        part, _, _ = row_parts(x, scale, sums, head, scales, tail, rest, groups, 2, 0)
        return np.float32(4.0) * whole + part + lows
    if high == 4 and low == 4:
        whole, lows, _ = row_parts(x, scale, sums, head, scales, head, at, groups, 4, 1)
        part, _, _ = row_parts(x, scale, sums, head, scales, tail, rest, groups, 4, 0)
        return np.float32(16.0) * whole + part + lows
    if high == 4:
        whole, lows, _ = row_parts(x, scale, sums, head, scales, head, at, groups, 4, 1)
        return whole + lows
    whole, lows, _ = row_parts(x, scale, sums, head, scales, head, at, groups, 8, 1)
    return whole + lows


@njit(inline="always")
def _fetch(head, tail, i):
    """Ask for a whole neuron at once, in the order of memory: spread through the arithmetic it takes half as long again."""
    fetch_bytes(head[i], 0, head.shape[1])
    fetch_bytes(tail[i], 0, tail.shape[1])


@njit(inline="always")
def _value(x, scale, sums, head, tail, offsets, i, gate_bias, up_bias, biased, kind):
    """A neuron's value, the input of its down row."""
    gate = ZERO
    if offsets[3]:
        gate = product(x, scale, sums, head[i], tail[i], offsets, False)
        if biased & 1:
            gate += gate_bias[i]
    up = product(x, scale, sums, head[i], tail[i], offsets, True)
    if biased & 2:
        up += up_bias[i]
    if offsets[3]:
        return np.float32(activate(kind, gate) * up)
    return np.float32(activate(kind, up))


@njit(inline="always")
def _add(out, lows, shares, values, many, tail, offsets, rows):
    """Add `many` (1 or 4) neurons' down rows, each by its value: codes to out [width], lows to lows [groups].

    A scale times a value is a 16-bit share of the largest one that these neurons may have.
    """
    groups, bits = offsets[0], offsets[1] + offsets[2]
    at, scales = offsets[10], offsets[11]
    largest = ZERO
    for r in range(many):
        largest = max(largest, abs(values[r] * float_at(tail[rows[r]], scales + 2 * groups)))
    factor = largest * np.float32(255.0 / 32767.0)
    inverse = np.float32(1.0) / factor if factor > ZERO else ZERO
    for p in range(-(-many // 2)):
        one, other = tail[rows[2 * p]], tail[rows[min(2 * p + 1, many - 1)]]
        step = values[2 * p] * float_at(one, scales + 2 * groups) * inverse
        step_other = values[2 * p + 1] * float_at(other, scales + 2 * groups) * inverse if many > 1 else ZERO
        mine, bytes_, theirs = shares[p], one[scales : scales + groups], other[scales : scales + groups]
        for g in range(groups):
            share = np.int32(np.rint(step * np.float32(bytes_[g])))
            mine[g] = share & 0xFFFF | np.int32(np.rint(step_other * np.float32(theirs[g]))) << 16
    for r in range(many):
        low = values[r] * float_at(tail[rows[r]], scales + 2 * groups + 4)
        signed = tail[rows[r], scales + groups : scales + 2 * groups].view(np.int8)
        for g in range(groups):
            lows[g] += low * np.float32(signed[g])
    if many == BOTH:
        four = (tail[rows[0]], tail[rows[1]], tail[rows[2]], tail[rows[3]])
        if bits == 4:
            add_codes(out, factor, shares, four, at, groups, 4)
        else:
            add_codes(out, factor, shares, four, at, groups, 8)
    else:
        if bits == 4:
            add_codes(out, factor, shares, (tail[rows[0]],), at, groups, 4)
        else:
            add_codes(out, factor, shares, (tail[rows[0]],), at, groups, 8)


@njit(nogil=True)
def _span(x, scale, sums, head, tail, offsets, gate_bias, up_bias, biased, index, first, last, kind, out, lows):
    """Add what the neurons index[first:last] give for one input to out [width] and lows [groups]."""
    values, shares = np.empty(BOTH, np.float32), np.empty((BOTH // 2, offsets[0]), np.int32)
    i = first
    while i < last:
        many = BOTH if i + BOTH <= last else 1
        then = i + many if i + 2 * many <= last else i
        rows, ahead = index[i : i + many], index[then : then + many]
        for r in range(many):
            _fetch(head, tail, ahead[r])
            values[r] = _value(x, scale, sums, head, tail, offsets, rows[r], gate_bias, up_bias, biased, kind)
        _add(out, lows, shares, values, many, tail, offsets, rows)
        i += many


@njit(nogil=True)
def _gather(partial, out):
    """out float32 [H] = the codes' and the lows' sums of all threads, partial float32 [threads, width + groups]."""
    width = partial.shape[1] // (GROUP + 1) * GROUP
    for j in range(out.shape[0]):
        total = ZERO
        for t in range(partial.shape[0]):
            total += partial[t, j] + partial[t, width + j // GROUP]
        out[j] = total


@kernel(parallel=True)
def single(x, head, tail, offsets, gate_bias, up_bias, biased, index, k, kind, threads, out):
    """One input x float32 [H], the neurons index[:k]; out float32 [H]."""
    groups = offsets[0]
    width = groups * GROUP
    codes, scale, sums = np.empty(width, np.int8), np.empty(groups, np.float32), np.empty(groups, np.float32)
    group_inputs(x, codes, scale, sums)
    partial = np.zeros((threads, width + groups), np.float32)
    for t in prange(threads):
        first, last = k * t // threads, k * (t + 1) // threads
        given = index[:k]
        _span(
            codes, scale, sums, head, tail, offsets, gate_bias, up_bias, biased, given, first, last, kind,
            partial[t, :width], partial[t, width:],
        )  # fmt: skip
    _gather(partial, out)


@kernel(parallel=True)
def several(x, head, tail, offsets, gate_bias, up_bias, biased, index, count, slots, kind, threads, out):
    """Up to 64 inputs x float32 [N, H], each with its slot's neurons: a row in the union is read once for all."""
    rows, groups = x.shape[0], offsets[0]
    width = groups * GROUP
    member, union = union_of(head.shape[0], rows, index, count, slots)
    k = union.shape[0]
    codes = np.empty((rows, width), np.int8)
    scale, sums = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.float32)
    for n in prange(rows):
        group_inputs(x[n], codes[n], scale[n], sums[n])
    partial = np.zeros((rows, threads, width + groups), np.float32)
    for t in prange(threads):
        values, shares = np.empty(BOTH, np.float32), np.empty((BOTH // 2, groups), np.int32)
        last = k * (t + 1) // threads
        for i in range(k * t // threads, last):
            mine = union[i : i + 1]
            _fetch(head, tail, union[min(i + BOTH, last - 1)])
            for n in range(rows):
                if (member[mine[0]] >> np.uint64(n)) & np.uint64(1):
                    values[0] = _value(
                        codes[n], scale[n], sums[n], head, tail, offsets, mine[0], gate_bias, up_bias, biased, kind
                    )
                    part = partial[n, t]
                    _add(part[:width], part[width:], shares, values, 1, tail, offsets, mine)
    for n in prange(rows):
        _gather(partial[n], out[n])


@kernel(parallel=True)
def products(x, head, tail, offsets, of_up, threads, out):
    """All neurons' dot products with the gate's or up's rows: x float32 [N, H], out float32 [N, I]."""
    rows, groups, neurons = x.shape[0], offsets[0], head.shape[0]
    width = groups * GROUP
    codes = np.empty((rows, width), np.int8)
    scale, sums = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.float32)
    for n in range(rows):
        group_inputs(x[n], codes[n], scale[n], sums[n])
    at, scales, rest = (offsets[5], offsets[7], offsets[9]) if of_up else (offsets[4], offsets[6], offsets[8])
    size, size_rest = groups * QUAD * offsets[1], groups * QUAD * offsets[2]
    for t in prange(threads):
        last = neurons * (t + 1) // threads
        for i in range(neurons * t // threads, last):
            later = min(i + BOTH, last - 1)
            fetch_bytes(head[later], at, size)
            fetch_bytes(tail[later], rest, size_rest)
            fetch_bytes(head[later], scales, 2 * groups + 8)
            for n in range(rows):
                out[n, i] = product(codes[n], scale[n], sums[n], head[i], tail[i], offsets, of_up)


@kernel(parallel=True)
def down_rows(a, tail, offsets, threads, out):
    """All neurons' down rows, each by its value: a float32 [N, I], out float32 [N, H]."""
    rows, groups, neurons = a.shape[0], offsets[0], tail.shape[0]
    width = groups * GROUP
    partial = np.zeros((rows, threads, width + groups), np.float32)
    order = np.arange(neurons)
    for t in prange(threads):
        shares = np.empty((BOTH // 2, groups), np.int32)
        i, last = neurons * t // threads, neurons * (t + 1) // threads
        while i < last:
            many = BOTH if i + BOTH <= last else 1
            then = i + many if i + 2 * many <= last else i
            for r in range(many):
                fetch_bytes(tail[then + r], offsets[10], tail.shape[1] - offsets[10])
            for n in range(rows):
                part, values = partial[n, t], a[n, i : i + many]
                _add(part[:width], part[width:], shares, values, many, tail, offsets, order[i : i + many])
            i += many
    for n in prange(rows):
        _gather(partial[n], out[n])


@njit(nogil=True)
def _unpack_row(head, tail, offsets, of_up, codes):
    """The codes of a gate's or up's row, to uint8 [groups * 32] in the order of the weights."""
    groups, high, low = offsets[0], offsets[1], offsets[2]
    at, rest = (offsets[5], offsets[9]) if of_up else (offsets[4], offsets[8])
    first = 0
    while first < groups:
        left = groups - first
        lanes = LARGEST if left >= LARGEST else (SECOND if left >= SECOND else THIRD)
        size = QUAD * lanes
        for step in range(STEPS):
            h, l = at + first * QUAD * high + step % high * size, 0
            if low:
                l = rest + first * QUAD * low + step % low * size
            for k in range(size):
                code = (head[h + k] >> (step // high * high)) & ((1 << high) - 1)
                if low:
                    code = code << low | ((tail[l + k] >> (step // low * low)) & ((1 << low) - 1))
                codes[(first + k // QUAD) * GROUP + step * QUAD + k % QUAD] = code
        first += lanes


@kernel(parallel=True)
def unpack_rows(head, tail, offsets, role, threads, out):
    """Rows of gate (role 0), up (1) or down (2) in float32 [I, H], as `quantised.unpack` gives them."""
    groups, bits = offsets[0], offsets[1] + offsets[2]
    for t in prange(threads):
        codes = np.empty(groups * GROUP, np.uint8)
        for i in range(out.shape[0] * t // threads, out.shape[0] * (t + 1) // threads):
            if role == 2:
                row, at, scales = tail[i], offsets[10], offsets[11]
                each = 32 // bits
                for j in range(groups * GROUP):
                    chunk, place = j // (each * LANES), j % (each * LANES)
                    k, lane = place // LANES, place % LANES
                    byte = row[at + (chunk * LANES + lane) * 4 + k * bits // 8]
                    codes[j] = (byte >> (k * bits % 8)) & ((1 << bits) - 1)
            else:
                row, scales = head[i], offsets[7] if role == 1 else offsets[6]
                _unpack_row(row, tail[i], offsets, role == 1, codes)
            unit, low_unit = float_at(row, scales + 2 * groups), float_at(row, scales + 2 * groups + 4)
            lows = row[scales + groups : scales + 2 * groups].view(np.int8)
            for g in range(groups):
                step, start = np.float32(row[scales + g]) * unit, np.float32(lows[g]) * low_unit
                for j in range(g * GROUP, min((g + 1) * GROUP, out.shape[1])):
                    out[i, j] = np.float32(codes[j]) * step + start
