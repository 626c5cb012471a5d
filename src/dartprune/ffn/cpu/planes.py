"""Rounding weight rows to bit planes, in Numba: a row stays in the nearest cache for all the passes of its fit."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import HALF, ONE, ZERO
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.lean import lean

# the order of a sum may change, so that it vectorises; NaN and infinity stay what they are
_LOOSE = {"reassoc", "contract", "nsz"}


@njit(inline="always")
def _level(value, inverse, top):
    """The nearest of the odd numbers -top .. top, for value in units of the scale."""
    code = np.floor((value * inverse + (top + ONE)) * HALF)
    return min(max(code, ZERO), top)


@lean(fastmath=_LOOSE)
def _moments(row, scale, top):
    """Products of a row with its levels, and of those with themselves."""
    inverse = ONE / scale if scale > ZERO else ZERO
    mixed, own = ZERO, ZERO
    for j in range(row.shape[0]):
        level = np.float32(2) * _level(row[j], inverse, top) - top
        mixed += row[j] * level
        own += level * level
    return mixed, own


@lean(fastmath=_LOOSE)
def _error(row, scale, top):
    inverse = ONE / scale if scale > ZERO else ZERO
    total = ZERO
    for j in range(row.shape[0]):
        rest = row[j] - scale * (np.float32(2) * _level(row[j], inverse, top) - top)
        total += rest * rest
    return total


@lean(fastmath=_LOOSE)
def _mean_size(row):
    total = ZERO
    for j in range(row.shape[0]):
        total += abs(row[j])
    return total / np.float32(row.shape[0])


@lean()
def _fitted(row, scale, top, starts):
    best, least = scale, np.float32(np.inf)
    for start in starts:
        s = scale * start
        for _ in range(3):
            mixed, own = _moments(row, s, top)
            s = mixed / own
        error = _error(row, s, top)
        if error < least:
            best, least = s, error
    return best


@lean()
def _pack(row, scale, top, code, planes):
    """Planes int64 [b, words]; code uint8 [words * 64], beyond the row 0."""
    inverse = ONE / scale if scale > ZERO else ZERO
    for j in range(row.shape[0]):
        code[j] = np.uint8(_level(row[j], inverse, top))
    for k in range(planes.shape[0]):
        for w in range(planes.shape[1]):
            word = np.uint64(0)
            for j in range(64):
                word |= np.uint64((code[w * 64 + j] >> np.uint8(k)) & np.uint8(1)) << np.uint64(j)
            planes[k, w] = np.int64(word)


@kernel(parallel=True)
def round_matrix(weight, bits, first_scale, starts, threads, planes, scale):
    """Rows to planes and scales: see `sketch.build_planes`.

    weight float32 [I, H], first_scale float32: the scale that a row's fit starts from, in mean absolute values.
    starts float32 [n], times that. planes int64 [I, bits, words] and scale float32 [I] are filled.
    """
    rows = weight.shape[0]
    top = np.float32(2**bits - 1)
    for t in prange(threads):
        code = np.zeros(planes.shape[2] * 64, np.uint8)
        for i in range(rows * t // threads, rows * (t + 1) // threads):
            s = _mean_size(weight[i]) * first_scale
            if bits > 1:
                s = _fitted(weight[i], s, top, starts)
            _pack(weight[i], s, top, code, planes[i])
            scale[i] = s
