"""The rest of a decode step in Numba: a linear layer of one token a line, and its attention over what a cache holds."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import ZERO
from dartprune.ffn.cpu.blocks import add_rows, dots
from dartprune.ffn.cpu.cache import kernel

FOUR = 4  # rows of a weight, or tokens of a cache, that are taken at a time


@njit(nogil=True)
def _linear_part(first, last, x, weight, bias, out):
    """Outputs first:last of x float32 [N, K]; weight [O, K] in words, bias float32 [O] or empty."""
    i = first
    while i < last:
        many = FOUR if i + FOUR <= last else 1
        j = min(i + many, last - many)
        for n in range(x.shape[0]):
            if many == FOUR:
                rows = (weight[i], weight[i + 1], weight[i + 2], weight[i + 3])
                ahead = (weight[j], weight[j + 1], weight[j + 2], weight[j + 3])
                out[n, i], out[n, i + 1], out[n, i + 2], out[n, i + 3] = dots((x[n],), rows, ahead)
            else:
                (out[n, i],) = dots((x[n],), (weight[i],), (weight[j],))
        i += many
    if bias.shape[0]:
        for n in range(x.shape[0]):
            for o in range(first, last):
                out[n, o] += bias[o]


@kernel(parallel=True)
def linear(x, weight, bias, threads, out):
    """Out float32 [N, O] = x float32 [N, K] times weight [O, K] in words, plus bias float32 [O] or empty."""
    units = -(-weight.shape[0] // FOUR)
    for t in prange(threads):
        first, last = units * t // threads * FOUR, min(units * (t + 1) // threads * FOUR, weight.shape[0])
        _linear_part(first, last, x, weight, bias, out)


@kernel()
def linear_alone(x, weight, bias, out):
    """The same in the calling thread."""
    _linear_part(0, weight.shape[0], x, weight, bias, out)


@njit(fastmath={"reassoc", "contract"}, nogil=True)
def _normed(x, weight, epsilon):
    """RMS norm of x float32 [D] in place; weight float32 [D], or empty: none."""
    if not weight.shape[0]:
        return
    total = ZERO
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[0]) + epsilon)
    for j in range(x.shape[0]):
        x[j] *= factor * weight[j]


@kernel()
def norm(x, weight, epsilon):
    """RMS norm of rows x float32 [N, H] in place; weight float32 [H]."""
    for n in range(x.shape[0]):
        _normed(x[n], weight, epsilon)


@kernel()
def turn(x, heads, weight, epsilon, cos, sin):
    """Norm and turn the heads of x float32 [N, heads * D] by their positions, in place; cos and sin float32 [N, D]."""
    size = cos.shape[1]
    half = size // 2
    for n in range(x.shape[0]):
        for h in range(heads):
            head = x[n, h * size : (h + 1) * size]
            _normed(head, weight, epsilon)
            for j in range(half):
                a, b = head[j], head[half + j]
                head[j] = a * cos[n, j] - b * sin[n, j]
                head[half + j] = b * cos[n, half + j] + a * sin[n, half + j]


@njit(nogil=True)
def _head(query, keys, values, mask, scale, weight, out):
    """One head's attention: query float32 [D], keys and values [T, D] in words, mask float32 [T] or empty, out [D]."""
    tokens = keys.shape[0]
    highest = np.float32(-np.inf)
    t = 0
    while t < tokens:
        if t + FOUR <= tokens:
            rows = (keys[t], keys[t + 1], keys[t + 2], keys[t + 3])
            weight[t], weight[t + 1], weight[t + 2], weight[t + 3] = dots((query,), rows, rows)
            t += FOUR
        else:
            (weight[t],) = dots((query,), (keys[t],), (keys[t],))
            t += 1
    for t in range(tokens):
        weight[t] *= scale
        if mask.shape[0]:
            weight[t] += mask[t]
        highest = max(highest, weight[t])
    total = ZERO
    for t in range(tokens):
        weight[t] = np.exp(weight[t] - highest)
        total += weight[t]
    inverse = np.float32(1.0) / total
    for t in range(tokens):
        weight[t] *= inverse
    out[:] = ZERO
    t = 0
    while t < tokens:
        if t + FOUR <= tokens:
            rows = (values[t], values[t + 1], values[t + 2], values[t + 3])
            add_rows((out,), (weight[t], weight[t + 1], weight[t + 2], weight[t + 3]), rows, rows)
            t += FOUR
        else:
            add_rows((out,), (weight[t],), (values[t],), (values[t],))
            t += 1


@kernel(parallel=True)
def attend(query, keys, values, mask, scale, out):
    """Attention of one token a line over a cache.

    query float32 [N, heads * D]; keys and values [N, key heads, T, D] in words; mask float32 [N, T], added, or [N, 0];
    out float32 [N, heads * D].
    """
    lines, groups, tokens, size = keys.shape
    many = query.shape[1] // (groups * size)
    for unit in prange(lines * groups):
        n, g = unit // groups, unit % groups
        weight = np.empty(tokens, np.float32)
        for h in range(g * many, (g + 1) * many):
            part = slice(h * size, (h + 1) * size)
            _head(query[n, part], keys[n, g], values[n, g], mask[n], scale, weight, out[n, part])
