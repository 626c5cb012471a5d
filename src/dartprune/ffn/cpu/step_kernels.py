"""The rest of a decode step in Numba: a linear layer of one token a line, and its attention over what a cache holds."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import ZERO
from dartprune.ffn.cpu.blocks import LINE, add_rows, dots, float_of, word_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.lean import lean

FOUR = 4  # rows of a weight, or tokens of a cache, that are taken at a time


@lean()
def linear_part(first, last, x, weight, bias, out):
    """Outputs first:last of x float32 [N, K]; weight [O, K] in words, bias float32 [O] or empty.

    A row of x gives the same bits whatever the others are.
    """
    i = first
    while i < last:
        many = FOUR if i + FOUR <= last else 1
        j = min(i + many, last - many)
        n = 0
        while n < x.shape[0]:
            two = n + 2 <= x.shape[0]
            if many == FOUR:
                rows = (weight[i], weight[i + 1], weight[i + 2], weight[i + 3])
                ahead = (weight[j], weight[j + 1], weight[j + 2], weight[j + 3])
                if two:
                    a, b, c, d, e, f, g, h = dots((x[n], x[n + 1]), rows, ahead)
                    out[n, i], out[n, i + 1], out[n, i + 2], out[n, i + 3] = a, c, e, g
                    out[n + 1, i], out[n + 1, i + 1], out[n + 1, i + 2], out[n + 1, i + 3] = b, d, f, h
                else:
                    out[n, i], out[n, i + 1], out[n, i + 2], out[n, i + 3] = dots((x[n],), rows, ahead)
            elif two:
                out[n, i], out[n + 1, i] = dots((x[n], x[n + 1]), (weight[i],), (weight[j],))
            else:
                (out[n, i],) = dots((x[n],), (weight[i],), (weight[j],))
            n += 2 if two else 1
        i += many
    if bias.shape[0]:
        for n in range(x.shape[0]):
            for o in range(first, last):
                out[n, o] += bias[o]


@lean()
def share_of_rows(rows, t, threads):
    """The rows of a thread, whole fours."""
    units = -(-rows // FOUR)
    return units * t // threads * FOUR, min(units * (t + 1) // threads * FOUR, rows)


@kernel(parallel=True)
def linear(x, weight, bias, threads, out):
    """Out float32 [N, O] = x float32 [N, K] times weight [O, K] in words or bytes, plus bias float32 [O] or empty."""
    for t in prange(threads):
        first, last = share_of_rows(weight.shape[0], t, threads)
        linear_part(first, last, x, weight, bias, out)


@kernel()
def linear_alone(x, weight, bias, out):
    """The same in the calling thread."""
    linear_part(0, weight.shape[0], x, weight, bias, out)


@lean()
def _by_inputs_part(first, last, x, rows, bias, out):
    """Outputs first:last of x float32 [N, K], where rows [K, O] hold an input's weights: added in their order."""
    for n in range(x.shape[0]):
        for o in range(first, last):
            out[n, o] = bias[o] if bias.shape[0] else ZERO
    k = 0
    while k < rows.shape[0]:
        many = FOUR if k + FOUR <= rows.shape[0] else 1
        j = min(k + many, rows.shape[0] - many)
        a, e = rows[k, first:last], rows[j, first:last]
        if many == FOUR:
            b, c, d = rows[k + 1, first:last], rows[k + 2, first:last], rows[k + 3, first:last]
            f, g, h = rows[j + 1, first:last], rows[j + 2, first:last], rows[j + 3, first:last]
            n = 0
            while n + 2 <= x.shape[0]:
                p, q = x[n], x[n + 1]
                scales = (p[k], q[k], p[k + 1], q[k + 1], p[k + 2], q[k + 2], p[k + 3], q[k + 3])
                add_rows((out[n, first:last], out[n + 1, first:last]), scales, (a, b, c, d), (e, f, g, h))
                n += 2
            if n < x.shape[0]:
                p = x[n]
                add_rows((out[n, first:last],), (p[k], p[k + 1], p[k + 2], p[k + 3]), (a, b, c, d), (e, f, g, h))
        else:
            for n in range(x.shape[0]):
                add_rows((out[n, first:last],), (x[n, k],), (a,), (e,))
        k += many


@kernel(parallel=True)
def linear_by_inputs(x, rows, bias, threads, out):
    """The same as `linear` of weights that lie the other way round, rows [K, O]."""
    for t in prange(threads):
        units = -(-rows.shape[1] // LINE)
        first, last = units * t // threads * LINE, min(units * (t + 1) // threads * LINE, rows.shape[1])
        _by_inputs_part(first, last, x, rows, bias, out)


@lean(fastmath={"reassoc", "contract"})
def _normed(x, weight, epsilon):
    """RMS norm of x float32 [D] in place; weight [D] in words, or empty: none."""
    if not weight.shape[0]:
        return
    total = ZERO
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[0]) + epsilon)
    for j in range(x.shape[0]):
        x[j] *= factor * float_of(weight[j])


@lean()
def widened(words, out):
    """Words [D] as float32 [D]."""
    for j in range(words.shape[0]):
        out[j] = float_of(words[j])


@njit(nogil=True)
def _floats(words):
    """Words [D] as a new float32 [D]."""
    out = np.empty(words.shape[0], np.float32)
    widened(words, out)
    return out


@lean()
def narrowed(x, out):
    """Float32 [D] as words [D]."""
    for j in range(x.shape[0]):
        out[j] = word_of(x[j], out[j])


@kernel()
def norm(x, weight, epsilon, out):
    """RMS norm of rows x [N, H] to out [N, H]; weight [H]; all in words."""
    row = np.empty(x.shape[1], np.float32)
    for n in range(x.shape[0]):
        widened(x[n], row)
        _normed(row, weight, epsilon)
        narrowed(row, out[n])


@lean()
def _turned(head, weight, epsilon, cos, sin):
    """Norm a head float32 [D] and turn it by its position, in place; cos and sin float32 [D]."""
    _normed(head, weight, epsilon)
    half = head.shape[0] // 2
    for j in range(half):
        a, b = head[j], head[half + j]
        head[j] = a * cos[j] - b * sin[j]
        head[half + j] = b * cos[half + j] + a * sin[half + j]


@lean()
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
    # one after another: masked tokens before a shorter text's own must not change how its own are summed
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


@njit(nogil=True)
def group_of_heads(n, g, query, key, value, norms, cos, sin, keys, values, length, mask, scale, out):
    """One group of heads of one line: its key and value go to the cache, its queries attend to what lies there."""
    size = cos.shape[1]
    many = query.shape[1] // key.shape[1]
    here = slice(g * size, (g + 1) * size)
    _turned(key[n, here], norms[1], norms[2], cos[n], sin[n])
    narrowed(key[n, here], keys[n, g, length])
    narrowed(value[n, here], values[n, g, length])
    weight = np.empty(length + 1, np.float32)
    for h in range(g * many, (g + 1) * many):
        part = slice(h * size, (h + 1) * size)
        _turned(query[n, part], norms[0], norms[2], cos[n], sin[n])
        _head(
            query[n, part], keys[n, g, : length + 1], values[n, g, : length + 1], mask[n], scale, weight, out[n, part]
        )


@kernel(parallel=True)
def attend(query, key, value, norms, cos, sin, keys, values, length, mask, scale, out):
    """Attention of one token a line over a cache, into which its key and value are written.

    query, key, value: [N, heads * D] in words.  norms: of queries and keys, [D] in words or empty, and their epsilon.
    cos, sin: float32 [N, D].  keys, values: [N, key heads, room, D] in words, of which `length` tokens are there.
    mask: float32 [N, length + 1], added, or [N, 0].  out: [N, heads * D] in words.
    """
    lines, groups = keys.shape[0], keys.shape[1]
    wide = np.empty(query.shape, np.float32), np.empty(key.shape, np.float32), np.empty(value.shape, np.float32)
    found = np.empty(query.shape, np.float32)
    for n in range(lines):
        widened(query[n], wide[0][n])
        widened(key[n], wide[1][n])
        widened(value[n], wide[2][n])
    for unit in prange(lines * groups):
        n, g = unit // groups, unit % groups
        group_of_heads(n, g, *wide, norms, cos, sin, keys, values, length, mask, scale, found)
    for n in range(lines):
        narrowed(found[n], out[n])


@kernel(parallel=True)
def attention(x, weights, biases, norms, cos, sin, keys, values, length, mask, scale, threads, out):
    """The whole of an attention module, its four products too.

    As `attend`, and x: [N, H] in words.  weights: of queries, keys, values and the output, [O, K] in words.
    biases: of the same, [O] in words or empty.  out: [N, H] in words.
    """
    lines, groups = keys.shape[0], keys.shape[1]
    query_weight, key_weight, value_weight, out_weight = weights
    query_bias, key_bias = _floats(biases[0]), _floats(biases[1])
    value_bias, out_bias = _floats(biases[2]), _floats(biases[3])
    wide = np.empty(x.shape, np.float32)
    for n in range(lines):
        widened(x[n], wide[n])
    query = np.empty((lines, query_weight.shape[0]), np.float32)
    key = np.empty((lines, key_weight.shape[0]), np.float32)
    value = np.empty((lines, value_weight.shape[0]), np.float32)
    for t in prange(threads):
        linear_part(*share_of_rows(query_weight.shape[0], t, threads), wide, query_weight, query_bias, query)
        linear_part(*share_of_rows(key_weight.shape[0], t, threads), wide, key_weight, key_bias, key)
        linear_part(*share_of_rows(value_weight.shape[0], t, threads), wide, value_weight, value_bias, value)
    found = np.empty(query.shape, np.float32)
    for unit in prange(lines * groups):
        n, g = unit // groups, unit % groups
        group_of_heads(n, g, query, key, value, norms, cos, sin, keys, values, length, mask, scale, found)
    result = np.empty((lines, out_weight.shape[0]), np.float32)
    for t in prange(threads):
        linear_part(*share_of_rows(out_weight.shape[0], t, threads), found, out_weight, out_bias, result)
    for n in range(lines):
        narrowed(result[n], out[n])
