"""Rounding rows to codes with a scale and a low for each group of 32, in Numba: a group is read once for all ranges."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dartprune.ffn.cpu.activations import ONE, ZERO
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.threads import use_threads
from dartprune.ffn.row_format import GROUP, SHRINK, SHRINKS, SHRUNK, TINY, RowFormat

# the order of a sum may change, so that it vectorises
_LOOSE = {"reassoc", "contract", "nsz"}
_TINY, _TOP, _LOWEST = np.float32(TINY), np.float32(255), np.float32(127)
_HALF = np.float32(0.5)


def rounded(matrix: Tensor, layout: RowFormat, bits: int) -> tuple[Tensor, Tensor]:
    """What `row_format.rounded` gives, on a CPU: up to rounding where two ranges are equally good."""
    filled = torch.nn.functional.pad(matrix.detach().to("cpu", torch.float32), (0, layout.width - layout.hidden))
    codes = torch.empty(filled.shape, dtype=torch.uint8, device="cpu")
    scales = torch.empty(filled.shape[0], layout.scales, dtype=torch.uint8, device="cpu")
    floats = torch.empty(filled.shape[0], 2, dtype=torch.float32, device="cpu")
    factors = [1 - SHRINK * narrower for narrower in range(SHRINKS if bits <= SHRUNK else 1)]
    most = np.float32((1 << bits) - 1)
    out = codes.numpy(), scales.numpy(), floats.numpy()
    round_rows(filled.numpy(), layout.groups, most, np.array(factors, np.float32), use_threads(), *out)
    scales[:, 2 * layout.groups :] = floats.view(torch.uint8)
    return codes, scales


@kernel(parallel=True)
def round_rows(weight, groups, most, factors, threads, codes, scales, floats):
    """Codes, scales and lows of weights float32 [I, groups * 32].

    most: the largest code.  factors float32 [n]: shares of a group's range that are tried; the first is the whole.
    Filled are codes uint8 [I, groups * 32], scales uint8 [I, >= 2 groups]: scales, then lows; floats float32 [I, 2].
    """
    rows = weight.shape[0]
    for t in prange(threads):
        middles, reaches = np.empty(groups, np.float32), np.empty(groups, np.float32)
        for i in range(rows * t // threads, rows * (t + 1) // threads):
            row = weight[i]
            unit, low_unit = _ranges(row, groups, most, middles, reaches)
            floats[i, 0], floats[i, 1] = unit, low_unit
            for g in range(groups):
                group = row[g * GROUP : (g + 1) * GROUP]
                scale, low = _chosen(group, middles[g], reaches[g], unit, low_unit, most, factors)
                scales[i, g] = np.uint8(scale)
                scales[i, groups + g] = np.uint8(np.int8(low))
                _encode(group, scale * unit, low * low_unit, most, codes[i, g * GROUP : (g + 1) * GROUP])


@lean()
def _ranges(row, groups, most, middles, reaches):
    """The middle and the reach of each group; the units in which the row's widest group and farthest low fit."""
    widest, farthest = ZERO, ZERO
    for g in range(groups):
        least, largest = row[g * GROUP], row[g * GROUP]
        for j in range(1, GROUP):
            value = row[g * GROUP + j]
            least, largest = min(least, value), max(largest, value)
        middles[g], reaches[g] = (least + largest) * _HALF, (largest - least) * _HALF
        widest = max(widest, np.float32(2) * reaches[g] / most)
        farthest = max(farthest, abs(middles[g] - reaches[g]))
    return max(widest, _TINY) / _TOP, max(farthest, _TINY) / _LOWEST


@lean()
def _chosen(group, middle, reach, unit, low_unit, most, factors):
    """The scale and the low with the least squared error, in units."""
    best_scale, best_low, least = ZERO, ZERO, np.float32(np.inf)
    for k in range(factors.shape[0]):
        span = reach * factors[k]
        scale = np.float32(2) * span / most / unit
        scale = min(max(np.ceil(scale) if k == 0 else np.rint(scale), ZERO), _TOP)
        low = min(max(np.rint((middle - span) / low_unit), -_LOWEST), _LOWEST)
        error = _error(group, scale * unit, low * low_unit, most)
        if k == 0 or error < least:
            best_scale, best_low, least = scale, low, error
    return best_scale, best_low


@lean(fastmath=_LOOSE)
def _error(group, step, start, most):
    inverse = ONE / max(step, _TINY)
    total = ZERO
    for j in range(GROUP):
        code = min(max(np.rint((group[j] - start) * inverse), ZERO), most)
        rest = code * step + start - group[j]
        total += rest * rest
    return total


@lean()
def _encode(group, step, start, most, codes):
    inverse = ONE / max(step, _TINY)
    for j in range(GROUP):
        codes[j] = np.uint8(min(max(np.rint((group[j] - start) * inverse), ZERO), most))
