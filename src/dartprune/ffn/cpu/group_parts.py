"""What the kernels over rows of 4 and 8 bits are made of: inputs rounded, products of a neuron, its down row added.

The input is rounded to 8 bits in groups of 32, once for a call; products of codes are whole numbers, everything that is
summed over groups is float32.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dartprune.ffn.cpu.activations import ONE, ZERO, activate_all
from dartprune.ffn.cpu.group_blocks import add_codes, fetch_bytes, float_at, prepare_rows
from dartprune.ffn.cpu.group_rows import high_row, low_row, whole_row
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.row_format import GROUP, QUAD, SEGMENTS, STEPS

LARGEST, SECOND, THIRD = SEGMENTS
MOST, NAN = np.float32(127.0), np.float32(np.nan)
MANY = 16  # neurons whose down rows are added at a time
# Neurons between the one that is computed and those that are fetched, for the second time and, where rows are read in
# their order, for the first: of what a busy processor is asked for it drops some, so everything is asked for twice.
AGAIN, AHEAD = 2, 6


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
            largest, numbers = ZERO, True
            for k in range(GROUP):
                largest = max(largest, abs(part[k]))
                numbers &= part[k] == part[k]
            step = largest / MOST if numbers else NAN  # no code says that an input was none
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
        return whole_row(x, scale, sums, home, scales, at, tail[i], rest, groups, 2, 2, then, tail[later])
    if high == 4 and low == 4:
        return whole_row(x, scale, sums, home, scales, at, tail[i], rest, groups, 4, 4, then, tail[later])
    if high == 4 and low == 2:
        return whole_row(x, scale, sums, home, scales, at, tail[i], rest, groups, 4, 2, then, tail[later])
    if high == 4:
        return whole_row(x, scale, sums, home, scales, at, tail[i], rest, groups, 4, 0, then, tail[later])
    return whole_row(x, scale, sums, home, scales, at, tail[i], rest, groups, 8, 0, then, tail[later])


@njit(inline="always")
def low_part(x, scale, sums, head, tail, offsets, of_up, i, later):
    """What the low codes of a nested row add to the product that its high codes gave; arguments as for `product`."""
    groups, low = offsets[0], offsets[2]
    scales, rest = (offsets[7], offsets[9]) if of_up else (offsets[6], offsets[8])
    home, then = head[i], head[later]
    if low == 2:
        return low_row(x, scale, home, scales, tail[i], rest, groups, 2, then, tail[later])
    return low_row(x, scale, home, scales, tail[i], rest, groups, 4, then, tail[later])


@njit(inline="always")
def high_part(x, scale, sums, home, offsets, of_up):
    """Of a nested row: the product without its low codes, and what they add where each is in the middle."""
    groups, high = offsets[0], offsets[1]
    at, scales = (offsets[5], offsets[7]) if of_up else (offsets[4], offsets[6])
    if high == 2:
        return high_row(x, scale, sums, home, scales, at, groups, 2)
    return high_row(x, scale, sums, home, scales, at, groups, 4)


@lean()
def fetch_product(head, tail, offsets, of_up, i):
    """Ask for what `product` needs of neuron i."""
    groups, high, low = offsets[0], offsets[1], offsets[2]
    at, scales, rest = (offsets[5], offsets[7], offsets[9]) if of_up else (offsets[4], offsets[6], offsets[8])
    fetch_bytes(head[i], at, groups * QUAD * high)
    fetch_bytes(head[i], scales, 2 * groups + 8)
    if low:
        fetch_bytes(tail[i], rest, groups * QUAD * low)


@lean()
def _fetch_again(head, tail, offsets, known, i):
    """Ask for what is needed of neuron i; known: as for `neuron_values`."""
    first = 0 if known == 0 else (offsets[6] if known == 1 else offsets[5])
    rest = offsets[9] if known == 2 else 0
    fetch_bytes(head[i], first, head.shape[1] - first)
    fetch_bytes(tail[i], rest, tail.shape[1] - rest)


@njit(nogil=True)
def room_for_rows(groups):
    """Room for what `neuron_values` and `add` pass on: numbers of neurons, floats of each, shares of each group."""
    return np.empty((2, MANY), np.int32), np.empty((4, MANY), np.float32), np.empty((MANY // 2, groups), np.int32)


@lean()
def neuron_values(x, scale, sums, head, tail, offsets, rows, many, biases, kind, known, gates, ups, reals):
    """The values of `many` neurons, the inputs of their down rows, to reals[1]; what later ones need is fetched.

    rows: int32 [2, MANY], these neurons and as many later ones.  reals: float32 [4, MANY], see `room_for_rows`, of
    which two are filled; neurons behind the first `many` get 0.  biases (of gate, of up, which there are).  known: what
    gates and ups float32 [I] hold already: 0 nothing, 1 the products without the low codes, 2 the gate's activation
    alone.
    """
    gate_bias, up_bias, biased = biases
    gated, factors, values = bool(offsets[3]), reals[0], reals[1]
    for r in range(many):
        i, then, again = rows[0, r], rows[1, r], r + AGAIN
        _fetch_again(head, tail, offsets, known, rows[0, again] if again < many else rows[1, again - many])
        if known == 2:
            factors[r] = gates[i]
        elif gated:
            if known == 1:
                gate = gates[i] + low_part(x, scale, sums, head, tail, offsets, False, i, then)
            else:
                gate = product(x, scale, sums, head, tail, offsets, False, i, then)
            factors[r] = gate + gate_bias[i] if biased & 1 else gate
        if known == 1:
            up = ups[i] + low_part(x, scale, sums, head, tail, offsets, True, i, then)
        else:
            up = product(x, scale, sums, head, tail, offsets, True, i, then)
        values[r] = up + up_bias[i] if biased & 2 else up
    for r in range(many, MANY):
        factors[r] = values[r] = ZERO
    # not one by one: each would wait for its own product
    if not gated:
        activate_all(kind, values[:many])
        return
    if known != 2:
        activate_all(kind, factors)
    for r in range(many):
        values[r] *= factors[r]


@lean()
def add(out, lows, shares, reals, tail, offsets, rows):
    """Add neurons' down rows, each by its value: codes to out [width], lows to lows [groups].

    rows: int32 [2, MANY], these neurons and later ones, whose down rows are fetched.  reals: float32 [4, MANY], the
    second their values, the others room.  shares: see `room_for_rows`.
    A scale times a value is a 16-bit share of the largest one that these neurons may have.
    """
    groups, bits, at, scales = offsets[0], offsets[1] + offsets[2], offsets[10], offsets[11]
    floats, largest = scales + 2 * groups, ZERO
    values, steps, low_steps = reals[1], reals[2], reals[3]
    for r in range(MANY):
        fetch_bytes(tail[rows[1, r]], scales, 2 * groups + 8)
        row, value = tail[rows[0, r]], values[r]
        steps[r], low_steps[r] = value * float_at(row, floats), value * float_at(row, floats + 4)
        largest = max(largest, abs(steps[r]))
    # what a share of 1 stands for, where scale bytes are multiplied with the largest step at most
    factor = largest * np.float32(255.0 / 32767.0)
    inverse = ONE / factor if factor > ZERO else ZERO
    for r in range(MANY):
        steps[r] *= inverse
    prepare_rows(shares, lows, tail, rows[0], MANY, scales, groups, steps, low_steps)
    if bits == 4:
        add_codes(out, factor, shares, tail, rows[0], MANY, at, groups, 4, rows[1])
    else:
        add_codes(out, factor, shares, tail, rows[0], MANY, at, groups, 8, rows[1])


@lean()
def gather(partial, n, out):
    """Out float32 [H] = what all threads summed for input n: partial float32 [threads, N, width + groups]."""
    width = partial.shape[2] // (GROUP + 1) * GROUP
    for j in range(out.shape[0]):
        total = ZERO
        for t in range(partial.shape[0]):
            total += partial[t, n, j] + partial[t, n, width + j // GROUP]
        out[j] = total
