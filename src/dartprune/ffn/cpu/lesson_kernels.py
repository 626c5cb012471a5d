"""Sums of what tokens teach a sketch: its errors, and what the neurons gave in the tokens that drop them."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import ACTIVATIONS as ACTIVATIONS
from dartprune.ffn.cpu.activations import ONE, ZERO
from dartprune.ffn.cpu.blocks import float_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.cut import BINS, cut_of
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.sketch import BLOCK, activate_block

TINY = np.finfo(np.float32).tiny


@lean()
def _size(kind, gated, gate, up, importance):
    """Make up [B] the scores of neurons, not negative, from estimated products; gate [B] is used up."""
    activate_block(kind, gated, gate, up)
    for i in range(up.shape[0]):
        up[i] = abs(up[i] * importance[i])


@njit(nogil=True)
def _cut_of_row(kind, gated, gate, up, importance, stride, kept):
    """The score of the last neuron that a token keeps, told by every stride-th of them."""
    neurons = up.shape[0]
    some = up[::stride].copy()
    _size(kind, gated, gate[::stride].copy(), some, importance[::stride].copy())
    place = round(kept * (some.shape[0] / neurons))
    place = min(max(place, 1), some.shape[0])
    tally, pool = np.empty(BINS, np.int32), np.empty(some.shape[0] + 1, np.uint32)
    bits = np.empty(1, np.uint32)
    bits[0], _ = cut_of(some.view(np.uint32), place, tally, pool)
    return max(bits.view(np.float32)[0], TINY)


@lean(fastmath={"contract"})
def _add_errors(rows, weight, first, exact, estimate, sums, squares):
    """Add the errors of the rows that count to sums and squares [B], of the neurons from `first` on; weight [m]."""
    # places without a sign: where one might count from the end, a loop is not vectorised
    start, size = np.uint64(first), np.uint64(sums.shape[0])
    for m in range(weight.shape[0]):
        if weight[m] != ZERO:
            n = np.uint64(rows + m)
            for i in range(size):
                error = float_of(exact[n, start + i]) - estimate[n, start + i]
                sums[i] += error
                squares[i] += error * error


@lean()
def _add_dropped(rows, weight, first, gated, exact, estimates, importance, cuts, kind, rooms, sums, tokens):
    """Add what neurons gave in the rows in which they score less than the cut to sums [B], and those to tokens [B].

    Neurons from `first` on; exact, estimates: of gate and up [N, I]; importance [B]; rooms [4, B or more].
    """
    (exact_gate, exact_up), (gate, up), many = exact, estimates, sums.shape[0]
    g, u, b, a = rooms[0, :many], rooms[1, :many], rooms[2, :many], rooms[3, :many]
    start, size = np.uint64(first), np.uint64(many)
    for m in range(weight.shape[0]):
        if weight[m] == ZERO:
            continue
        n, cut = np.uint64(rows + m), cuts[m]
        for i in range(size):
            u[i], a[i] = up[n, start + i], float_of(exact_up[n, start + i])
        if gated:
            for i in range(size):
                g[i], b[i] = gate[n, start + i], float_of(exact_gate[n, start + i])
        activate_block(kind, gated, b, a)
        _size(kind, gated, g, u, importance)
        for i in range(size):
            is_dropped = u[i] < cut
            sums[i] += a[i] if is_dropped else ZERO
            tokens[i] += ONE if is_dropped else ZERO


@kernel(parallel=True)
def lesson_sums(gated, exact, estimates, weight, importance, kept, stride, kind, threads, errors, dropped):
    """`lessons.lesson_sums`.

    exact (gate, up) [N, I] in words or float32, estimates (gate, up) float32 [N, I]: up twice where there is no gate.
    weight float32 [B, m]; importance float32 [I] and kept int32 [B], or both empty; stride: between the neurons that
    tell a token's cut. errors float32 [B, 4 or 2, I] and dropped float32 [B or 0, 2, I] are filled.
    """
    (lines, tokens), (gate, up) = weight.shape, estimates
    cuts = np.empty((lines, tokens if kept.shape[0] else 0), np.float32)
    for t in prange(threads):
        for n in range(t, cuts.size, threads):
            line, m = n // tokens, n % tokens
            if weight[line, m] != ZERO:
                cuts[line, m] = _cut_of_row(kind, gated, gate[n], up[n], importance, stride, kept[line])
    neurons = up.shape[1]
    blocks = -(-neurons // BLOCK)
    for t in prange(threads):
        rooms = np.empty((4, BLOCK), np.float32)
        for block in range(blocks * t // threads, blocks * (t + 1) // threads):
            first, last = block * BLOCK, min(block * BLOCK + BLOCK, neurons)
            errors[:, :, first:last] = ZERO
            dropped[:, :, first:last] = ZERO
            for line in range(lines):
                place = line * tokens, weight[line], first
                if gated:
                    _add_errors(*place, exact[0], gate, errors[line, 0, first:last], errors[line, 1, first:last])
                _add_errors(*place, exact[1], up, errors[line, -2, first:last], errors[line, -1, first:last])
                if kept.shape[0]:
                    choice = importance[first:last], cuts[line], kind, rooms
                    sums, many = dropped[line, 0, first:last], dropped[line, 1, first:last]
                    _add_dropped(*place, gated, exact, estimates, *choice, sums, many)
