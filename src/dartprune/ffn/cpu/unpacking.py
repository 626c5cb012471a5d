"""Rows of 4 and 8 bits back to floats in Numba, in the dtype that is asked for: what prompts are multiplied with."""

from __future__ import annotations

import numpy as np
from numba import prange

from dartprune.ffn.cpu.blocks import word_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.group_blocks import float_at
from dartprune.ffn.cpu.group_parts import lanes_of
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.row_format import GROUP, LANES, QUAD, STEPS

WORD = 32  # bits


@kernel(parallel=True)
def unpack_rows(head, tail, offsets, role, threads, out):
    """Rows of gate (role 0), up (1) or down (2), as `row_format.unpack` gives them, rounded to the dtype of out.

    out: [I, H], float32 or words of 16 bits (`arrays.words`).
    """
    size = offsets[0] * GROUP
    for t in prange(threads):
        codes, fields = np.empty(size, np.uint8), np.empty(size, np.uint8)
        for i in range(out.shape[0] * t // threads, out.shape[0] * (t + 1) // threads):
            _row(head[i], tail[i], offsets, role, fields, codes, out[i])


@kernel()
def pick_rows(head, tail, offsets, index, out):
    """Up's rows of index int64 [N], as `unpack_rows` gives them; False where one of them is not there."""
    for i in index:
        if i < 0 or i >= head.shape[0]:
            return False
    codes, fields = np.empty(offsets[0] * GROUP, np.uint8), np.empty(offsets[0] * GROUP, np.uint8)
    for n in range(index.shape[0]):
        _row(head[index[n]], tail[index[n]], offsets, 1, fields, codes, out[n])
    return True


@lean()
def _row(head, tail, offsets, role, fields, codes, out):
    groups = offsets[0]
    if role == 2:
        row, scales = tail, offsets[11]
        _down_codes(row[offsets[10] : scales].view(np.uint32), offsets[1] + offsets[2], codes)
    else:
        row, scales = head, offsets[7] if role == 1 else offsets[6]
        _fields(row, tail, offsets, role == 1, fields)
        _in_order(fields.view(np.uint32), groups, codes.view(np.uint32))
    _values(codes, row[scales : scales + 2 * groups + 8], groups, out)


@lean()
def _fields(head, tail, offsets, of_up, fields):
    """The codes of a gate's or up's row as the kernels read them: step by step, four codes of each group."""
    groups, high, low = offsets[0], offsets[1], offsets[2]
    at, rest = (offsets[5], offsets[9]) if of_up else (offsets[4], offsets[8])
    first = 0
    while first < groups:
        lanes = lanes_of(groups - first)
        size, begin = QUAD * lanes, first * GROUP
        above, below = at + first * QUAD * high, rest + first * QUAD * low
        for step in range(STEPS):
            into = fields[begin + step * size : begin + (step + 1) * size]
            place = above + step % high * size
            _shifted(head[place : place + size], step // high * high, high, into)
            if low:
                place = below + step % low * size
                _joined(tail[place : place + size], step // low * low, low, into)
        first += lanes


@lean()
def _shifted(packed, shift, width, out):
    shift, mask = np.uint8(shift), np.uint8((1 << width) - 1)
    for k in range(out.shape[0]):
        out[k] = np.uint8(packed[k] >> shift) & mask


@lean()
def _joined(packed, shift, width, out):
    shift, mask, width = np.uint8(shift), np.uint8((1 << width) - 1), np.uint8(width)
    for k in range(out.shape[0]):
        out[k] = np.uint8(out[k] << width) | (np.uint8(packed[k] >> shift) & mask)


@lean()
def _in_order(fields, groups, codes):
    """Words of four codes, step by step of a segment, to the order of the weights."""
    first = 0
    while first < groups:
        lanes = lanes_of(groups - first)
        for lane in range(lanes):
            for step in range(STEPS):
                codes[(first + lane) * STEPS + step] = fields[first * STEPS + step * lanes + lane]
        first += lanes


@lean()
def _down_codes(packed, bits, codes):
    """Down's codes in the order of the weights from words uint32: see `row_format.pack_down`."""
    each, mask = WORD // bits, np.uint32((1 << bits) - 1)
    for chunk in range(packed.shape[0] // LANES):
        lanes = packed[chunk * LANES : (chunk + 1) * LANES]
        for k in range(each):
            place, shift = (chunk * each + k) * LANES, np.uint32(k * bits)
            for lane in range(LANES):
                codes[place + lane] = np.uint8((lanes[lane] >> shift) & mask)


@lean()
def _values(codes, scales, groups, out):
    """A row of weights from its codes and its scales, lows and two floats."""
    unit, low_unit = float_at(scales, 2 * groups), float_at(scales, 2 * groups + 4)
    lows = scales[groups : 2 * groups].view(np.int8)
    for g in range(-(-out.shape[0] // GROUP)):
        step, start = np.float32(scales[g]) * unit, np.float32(lows[g]) * low_unit
        begin = g * GROUP
        group, into = codes[begin : begin + GROUP], out[begin : begin + GROUP]
        for j in range(into.shape[0]):
            into[j] = word_of(np.float32(group[j]) * step + start, into[j])
