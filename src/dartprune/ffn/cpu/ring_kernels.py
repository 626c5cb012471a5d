"""Inputs put into a ring as 8-bit floats, in Numba: what `runtime.ring.Rings.store` does, in one call."""

from __future__ import annotations

import numpy as np

from dartprune.ffn.cpu.activations import ZERO
from dartprune.ffn.cpu.blocks import float_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.lean import lean

# of float8_e4m3fn: four bits of exponent, three of mantissa, no infinity
LARGEST, TINY = np.float32(448.0), np.finfo(np.float32).tiny
NAN, SIGN = np.uint32(0x7F), np.uint32(0x80)
NORMAL, STEPS = np.uint32(0x3C800000), np.float32(2.0**9)  # below 2**-6, these bits, floats are multiples of 2**-9


@lean()
def _scale_of(row):
    """What a row is divided by; NaN where it holds one."""
    largest = ZERO
    for j in range(row.shape[0]):
        value = abs(float_of(row[j]))
        largest = value if value > largest or value != value else largest
        if value != value:
            break
    return largest if largest != largest else max(largest / LARGEST, TINY)


@lean()
def _round(values, bits, codes):
    """Codes uint8 [H] of values float32 [H], whose bits are uint32 [H]: the nearest, the even one of two."""
    for j in range(values.shape[0]):
        size = bits[j] & np.uint32(0x7FFFFFFF)
        small = np.uint32(np.rint(min(abs(values[j]), np.float32(1.0)) * STEPS))
        # seven bits are left of the mantissa's 23 and the exponent, whose bias is smaller by 120
        whole = ((size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(
            960
        )
        code = small if size < NORMAL else min(whole, NAN)
        codes[j] = np.uint8(code | ((bits[j] >> np.uint32(24)) & SIGN))


@kernel()
def store_rows(x, layers, slots, places, codes, scales):
    """Round inputs x [L, M, H], float32 or words, to the layers int64 [L], and slots and places int64 [M], of a ring.

    codes uint8 [S, L', R, H] and scales float32 [S, L', R] are filled there.
    """
    values = np.empty(x.shape[2], np.float32)
    bits = values.view(np.uint32)
    for n in range(x.shape[0]):
        for m in range(x.shape[1]):
            row, scale = x[n, m], _scale_of(x[n, m])
            for j in range(row.shape[0]):
                values[j] = float_of(row[j]) / scale
            _round(values, bits, codes[slots[m], layers[n], places[m]])
            scales[slots[m], layers[n], places[m]] = scale
