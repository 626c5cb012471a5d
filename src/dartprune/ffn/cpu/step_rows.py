"""Attention of a decode step in Numba, its four products by rows of 4 bits."""

from __future__ import annotations

import numpy as np
from numba import prange

from dartprune.ffn.cpu.blocks import float_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.group_parts import rounded_rows, share
from dartprune.ffn.cpu.group_products import products_part
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.step_kernels import group_of_heads, narrowed, widened


@lean()
def _part(t, threads, inputs, rows, offsets, bias, out):
    """A thread's part of a product: inputs as `rounded_rows` gives them, rows uint8 [O, bytes], out float32 [N, O]."""
    first, last = share(rows.shape[0], t, threads)
    products_part(first, last, inputs, rows, rows, offsets, True, out)
    if bias.shape[0]:
        for n in range(out.shape[0]):
            for o in range(first, last):
                out[n, o] += float_of(bias[o])


@kernel(parallel=True)
def attention_of_rows(x, rows, formats, biases, norms, cos, sin, keys, values, length, mask, scale, threads, out):
    """The whole of an attention module, as `step_kernels.attention`, with weights of 4 bits.

    x: [N, H] in words.  rows: of queries, keys, values and the output, uint8 [O, bytes].  formats: the offsets of the
    first three's format and of the last's, see `RowFormat`.  biases: of the four, [O] in words or empty.
    """
    lines, groups = keys.shape[0], keys.shape[1]
    query_rows, key_rows, value_rows, out_rows = rows
    query_bias, key_bias, value_bias, out_bias = biases
    offsets, out_offsets = formats
    wide = np.empty(x.shape, np.float32)
    for n in range(lines):
        widened(x[n], wide[n])
    inputs = rounded_rows(wide, offsets[0])
    query = np.empty((lines, query_rows.shape[0]), np.float32)
    key = np.empty((lines, key_rows.shape[0]), np.float32)
    value = np.empty((lines, value_rows.shape[0]), np.float32)
    for t in prange(threads):
        _part(t, threads, inputs, query_rows, offsets, query_bias, query)
        _part(t, threads, inputs, key_rows, offsets, key_bias, key)
        _part(t, threads, inputs, value_rows, offsets, value_bias, value)
    found = np.empty(query.shape, np.float32)
    for unit in prange(lines * groups):
        n, g = unit // groups, unit % groups
        group_of_heads(n, g, query, key, value, norms, cos, sin, keys, values, length, mask, scale, found)
    given = rounded_rows(found, out_offsets[0])
    result = np.empty((lines, out_rows.shape[0]), np.float32)
    for t in prange(threads):
        _part(t, threads, given, out_rows, out_offsets, out_bias, result)
    for n in range(lines):
        narrowed(result[n], out[n])
