"""Whole projections over rows of 4 and 8 bits in Numba: all dot products of gate or up, all down rows."""

from __future__ import annotations

import numpy as np
from numba import prange

from dartprune.ffn.cpu.activations import ZERO
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.group_pairs import row_pairs
from dartprune.ffn.cpu.group_parts import (
    AGAIN,
    AHEAD,
    MANY,
    add,
    fetch_product,
    gather,
    product,
    room_for_rows,
    rounded_rows,
    share,
)
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.row_format import GROUP


@lean()
def products_part(first, last, inputs, head, tail, offsets, of_up, out):
    """Products of the neurons first:last with all inputs, to out [N, I]."""
    codes, scale, sums = inputs
    for i in range(first, last):
        later = min(i + AHEAD, last - 1)
        fetch_product(head, tail, offsets, of_up, min(i + AGAIN, last - 1))
        for n in range(codes.shape[0]):
            out[n, i] = product(codes[n], scale[n], sums[n], head, tail, offsets, of_up, i, later)


@kernel(parallel=True)
def products(x, head, tail, offsets, of_up, threads, out):
    """All neurons' dot products with the gate's or up's rows: x float32 [N, H], out float32 [N, I]."""
    inputs = rounded_rows(x, offsets[0])
    for t in prange(threads):
        first, last = share(head.shape[0], t, threads)
        products_part(first, last, inputs, head, tail, offsets, of_up, out)


@lean()
def _pairs_of_row(inputs, home, tail, offsets, of_up, exact, rough):
    """All inputs' products with the gate's or up's row of a neuron, to exact [N], and their estimates, to rough [N]."""
    (codes, scale, sums), groups, high = inputs, offsets[0], offsets[1]
    at, scales, rest = (offsets[5], offsets[7], offsets[9]) if of_up else (offsets[4], offsets[6], offsets[8])
    n, rows = 0, codes.shape[0]
    while n + 4 <= rows:
        if high == 2:
            found = row_pairs(codes, scale, sums, n, 4, home, scales, at, tail, rest, groups, 2)
        else:
            found = row_pairs(codes, scale, sums, n, 4, home, scales, at, tail, rest, groups, 4)
        for k in range(4):
            exact[n + k], rough[n + k] = found[k], found[4 + k]
        n += 4
    while n < rows:
        if high == 2:
            pair = row_pairs(codes, scale, sums, n, 1, home, scales, at, tail, rest, groups, 2)
        else:
            pair = row_pairs(codes, scale, sums, n, 1, home, scales, at, tail, rest, groups, 4)
        exact[n], rough[n] = pair
        n += 1


@kernel(parallel=True)
def pairs(x, head, tail, offsets, threads, exact, rough):
    """All neurons' dot products with nested rows, and what their high codes estimate: x float32 [N, H].

    exact and rough: of gate (only where there is one) and up, float32 [N, I] each.
    """
    inputs = rounded_rows(x, offsets[0])
    for t in prange(threads):
        first, last = share(head.shape[0], t, threads)
        for i in range(first, last):
            if offsets[3]:
                _pairs_of_row(inputs, head[i], tail[i], offsets, False, exact[0][:, i], rough[0][:, i])
            _pairs_of_row(inputs, head[i], tail[i], offsets, True, exact[1][:, i], rough[1][:, i])


@lean()
def _down_part(first, last, a, tail, offsets, room, partial):
    """Add the down rows of the neurons first:last, each by its value a [N, I], to partial [N, width + groups]."""
    rows, reals, shares = room
    width = offsets[0] * GROUP
    for i in range(first, last, MANY):
        for r in range(MANY):
            rows[0, r], rows[1, r] = min(i + r, last - 1), min(i + MANY + r, last - 1)
        for n in range(a.shape[0]):
            for r in range(MANY):
                reals[1, r] = a[n, i + r] if i + r < last else ZERO
            add(partial[n, :width], partial[n, width:], shares, reals, tail, offsets, rows)


@kernel(parallel=True)
def down_rows(a, tail, offsets, threads, out):
    """All neurons' down rows, each by its value: a float32 [N, I], out float32 [N, H]."""
    rows, groups, neurons = a.shape[0], offsets[0], tail.shape[0]
    partial = np.zeros((threads, rows, groups * (GROUP + 1)), np.float32)
    for t in prange(threads):
        first, last = share(neurons, t, threads)
        _down_part(first, last, a, tail, offsets, room_for_rows(groups), partial[t])
    for n in range(rows):
        gather(partial, n, out[n])
