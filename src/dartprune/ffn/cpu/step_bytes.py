"""Attention of a decode step in Numba, its four products by bytes with one scale a row."""

from __future__ import annotations

import numpy as np
from numba import prange

from dartprune.ffn.cpu.blocks import float_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.step_kernels import group_of_heads, linear_part, narrowed, share_of_rows, widened


@lean()
def _part(t, threads, x, weight, scale, bias, nothing, out):
    """A thread's part of a product: x float32 [N, K], weight int8 [O, K], scale and bias [O] in words, out [N, O]."""
    first, last = share_of_rows(weight.shape[0], t, threads)
    linear_part(first, last, x, weight, nothing, out)
    for n in range(out.shape[0]):
        for o in range(first, last):
            out[n, o] *= float_of(scale[o])
            if bias.shape[0]:
                out[n, o] += float_of(bias[o])


@kernel(parallel=True)
def attention_of_bytes(
    x, weights, scales, biases, norms, cos, sin, keys, values, length, mask, scale, threads, out
):  # fmt: skip
    """The whole of an attention module, as `step_kernels.attention`, with weights of 8 bits.

    x: [N, H] in words.  weights: of queries, keys, values and the output, int8 [O, K].  scales: of their rows, [O] in
    words.  biases: of the four, [O] in words or empty.
    """
    lines, groups = keys.shape[0], keys.shape[1]
    query_weight, key_weight, value_weight, out_weight = weights
    query_scale, key_scale, value_scale, out_scale = scales
    query_bias, key_bias, value_bias, out_bias = biases
    wide, nothing = np.empty(x.shape, np.float32), np.empty(0, np.float32)
    for n in range(lines):
        widened(x[n], wide[n])
    query = np.empty((lines, query_weight.shape[0]), np.float32)
    key = np.empty((lines, key_weight.shape[0]), np.float32)
    value = np.empty((lines, value_weight.shape[0]), np.float32)
    for t in prange(threads):
        _part(t, threads, wide, query_weight, query_scale, query_bias, nothing, query)
        _part(t, threads, wide, key_weight, key_scale, key_bias, nothing, key)
        _part(t, threads, wide, value_weight, value_scale, value_bias, nothing, value)
    found = np.empty(query.shape, np.float32)
    for unit in prange(lines * groups):
        n, g = unit // groups, unit % groups
        group_of_heads(n, g, query, key, value, norms, cos, sin, keys, values, length, mask, scale, found)
    result = np.empty((lines, out_weight.shape[0]), np.float32)
    for t in prange(threads):
        _part(t, threads, found, out_weight, out_scale, out_bias, nothing, result)
    for n in range(lines):
        narrowed(result[n], out[n])
