"""What the kernels over rows of 4 and 8 bits are made of: inputs rounded, products of a neuron, its down row added.

The input is rounded to 8 bits in groups of 32, once for a call; products of codes are whole numbers, everything that is
summed over groups is float32.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dartprune.ffn.cpu.activations import ZERO, activate
from dartprune.ffn.cpu.group_blocks import add_codes, fetch_bytes, float_at, row_parts
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.row_format import GROUP, QUAD, SEGMENTS, STEPS

LARGEST, SECOND, THIRD = SEGMENTS
MOST = np.float32(127.0)
BOTH = 4  # neurons whose down rows are added at a time


@lean()
def lanes_of(left):
    """How many of the groups that are left the kernels take next: see `row_format.segments`."""
    return LARGEST if left >= LARGEST else (SECOND if left >= SECOND else THIRD)


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
        lanes = lanes_of(groups - first)
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


@njit(nogil=True)
def rounded_rows(x, groups):
    """Rows x float32 [N, H] rounded, see `group_inputs`."""
    rows = x.shape[0]
    codes = np.empty((rows, groups * GROUP), np.int8)
    scale, sums = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.float32)
    for n in range(rows):
        group_inputs(x[n], codes[n], scale[n], sums[n])
    return codes, scale, sums


@lean()
def share(neurons, t, threads):
    """The neurons of a thread."""
    return neurons * t // threads, neurons * (t + 1) // threads


@njit(inline="always")
def product(x, scale, sums, head, tail, offsets, of_up, i, later):
    """One input's dot product with the gate's or up's row of neuron i; the same row of neuron `later` is fetched."""
    groups, high, low = offsets[0], offsets[1], offsets[2]
    at, scales, rest = (offsets[5], offsets[7], offsets[9]) if of_up else (offsets[4], offsets[6], offsets[8])
    home, then = head[i], head[later]
    if high == 2:
        whole, lows, _ = row_parts(x, scale, sums, home, scales, home, at, groups, 2, 1, then, then)
        part, _, _ = row_parts(x, scale, sums, home, scales, tail[i], rest, groups, 2, 0, then, tail[later])
        return np.float32(4.0) * whole + part + lows
    if high == 4 and low == 4:
        whole, lows, _ = row_parts(x, scale, sums, home, scales, home, at, groups, 4, 1, then, then)
        part, _, _ = row_parts(x, scale, sums, home, scales, tail[i], rest, groups, 4, 0, then, tail[later])
        return np.float32(16.0) * whole + part + lows
    if high == 4:
        whole, lows, _ = row_parts(x, scale, sums, home, scales, home, at, groups, 4, 1, then, then)
        return whole + lows
    whole, lows, _ = row_parts(x, scale, sums, home, scales, home, at, groups, 8, 1, then, then)
    return whole + lows


@njit(inline="always")
def low_part(x, scale, sums, head, tail, offsets, of_up, i, later):
    """What the low codes of a nested row add to the product that its high codes gave; arguments as for `product`."""
    groups, low = offsets[0], offsets[2]
    scales, rest = (offsets[7], offsets[9]) if of_up else (offsets[6], offsets[8])
    home, then = head[i], head[later]
    if low == 2:
        part, _, _ = row_parts(x, scale, sums, home, scales, tail[i], rest, groups, 2, 0, then, tail[later])
    else:
        part, _, _ = row_parts(x, scale, sums, home, scales, tail[i], rest, groups, 4, 0, then, tail[later])
    return part


@njit(inline="always")
def high_part(x, scale, sums, home, offsets, of_up):
    """Of a nested row: the product without its low codes, and what they add where each is in the middle."""
    groups, high = offsets[0], offsets[1]
    at, scales = (offsets[5], offsets[7]) if of_up else (offsets[4], offsets[6])
    if high == 2:
        whole, lows, plain = row_parts(x, scale, sums, home, scales, home, at, groups, 2, 1, None, None)
        return np.float32(4.0) * whole + lows, np.float32(1.5) * plain
    whole, lows, plain = row_parts(x, scale, sums, home, scales, home, at, groups, 4, 1, None, None)
    return np.float32(16.0) * whole + lows, np.float32(7.5) * plain


@njit(inline="always")
def neuron_value(x, scale, sums, head, tail, offsets, i, later, biases, kind, known, gates, ups):
    """The value of neuron i, the input of its down row; what neuron `later` needs for its own is fetched.

    biases (of gate, of up, which there are). known: what gates and ups float32 [I] hold already: 0 nothing, 1 the
    products without the low codes, 2 the gate's activation alone.
    """
    gate_bias, up_bias, biased = biases
    gate = ZERO
    if known == 2:
        gate = gates[i]
    elif offsets[3]:
        if known == 1:
            gate = gates[i] + low_part(x, scale, sums, head, tail, offsets, False, i, later)
        else:
            gate = product(x, scale, sums, head, tail, offsets, False, i, later)
        if biased & 1:
            gate += gate_bias[i]
        gate = np.float32(activate(kind, gate))
    if known == 1:
        up = ups[i] + low_part(x, scale, sums, head, tail, offsets, True, i, later)
    else:
        up = product(x, scale, sums, head, tail, offsets, True, i, later)
    if biased & 2:
        up += up_bias[i]
    return np.float32(gate * up) if offsets[3] else np.float32(activate(kind, up))


@njit(inline="always")
def add(out, lows, shares, values, many, tail, offsets, rows, later):
    """Add `many` (1 or 4) neurons' down rows, each by its value: codes to out [width], lows to lows [groups].

    later: as many neurons, whose down rows are fetched.
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
        fetch_bytes(tail[later[r]], scales, 2 * groups + 8)
        signed = tail[rows[r], scales + groups : scales + 2 * groups].view(np.int8)
        for g in range(groups):
            lows[g] += low * np.float32(signed[g])
    if many == BOTH:
        four = (tail[rows[0]], tail[rows[1]], tail[rows[2]], tail[rows[3]])
        then = (tail[later[0]], tail[later[1]], tail[later[2]], tail[later[3]])
        if bits == 4:
            add_codes(out, factor, shares, four, at, groups, 4, then)
        else:
            add_codes(out, factor, shares, four, at, groups, 8, then)
    else:
        if bits == 4:
            add_codes(out, factor, shares, (tail[rows[0]],), at, groups, 4, (tail[later[0]],))
        else:
            add_codes(out, factor, shares, (tail[rows[0]],), at, groups, 8, (tail[later[0]],))


@lean()
def gather(partial, n, out):
    """Out float32 [H] = what all threads summed for input n: partial float32 [threads, N, width + groups]."""
    width = partial.shape[2] // (GROUP + 1) * GROUP
    for j in range(out.shape[0]):
        total = ZERO
        for t in range(partial.shape[0]):
            total += partial[t, n, j] + partial[t, n, width + j // GROUP]
        out[j] = total
