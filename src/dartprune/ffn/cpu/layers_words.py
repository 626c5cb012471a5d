"""All layers of a decode step in one call, their weights in words: nothing of Python lies between two of them."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from dartprune.ffn.cpu.activations import activate_all
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.kernels import several, single
from dartprune.ffn.cpu.selector_kernels import sketch_rows
from dartprune.ffn.cpu.step_kernels import attention as attention_module
from dartprune.ffn.cpu.step_kernels import linear_part, norm, share_of_rows
from dartprune.ffn.cpu.step_table import (
    DOWN,
    GATE,
    GATE_PLANES,
    GATE_SCALE,
    KEY,
    NORM,
    OUT,
    QUERY,
    UP,
    UP_PLANES,
    UP_SCALE,
    VALUE,
    added_at,
    array_at,
    cached,
    choice_at,
    from_ffn,
    lists_at,
    room_for,
    small_arrays,
    to_ffn,
    union_size,
    vector_at,
)


@njit(nogil=True)
def _attended(at, sizes, epsilons, place, threads, x, normed, out):
    """The attention of one layer, its norm before it: see `step_kernels.attention`; out words [N, H]."""
    queries, keys, hidden = sizes[0], sizes[1], x.shape[1]
    norm(x, vector_at(at[NORM], hidden, x), epsilons[0], normed)
    weights = (
        array_at(at[QUERY], (queries, hidden), x),
        array_at(at[KEY], (keys, hidden), x),
        array_at(at[VALUE], (keys, hidden), x),
        array_at(at[OUT], (hidden, queries), x),
    )
    biases, query_norm, key_norm = small_arrays(at, sizes, x)
    cos, sin, length, mask, scale = place
    known_keys, known_values = cached(at, sizes, x)
    attention_module(
        normed, weights, biases, (query_norm, key_norm, epsilons[1]), cos, sin, known_keys, known_values, length, mask,
        scale, threads, out,
    )  # fmt: skip


@kernel(parallel=True)
def dense_ffn(x, gate, up, down, kind, threads, out):
    """The FFN of x float32 [N, H], all of it: gate and up [I, H], down [H, I] in words, out float32 [N, H]."""
    nothing = np.empty(0, np.float32)
    values, gates = np.empty((x.shape[0], up.shape[0]), np.float32), np.empty((x.shape[0], up.shape[0]), np.float32)
    for t in prange(threads):
        first, last = share_of_rows(up.shape[0], t, threads)
        linear_part(first, last, x, up, nothing, values)
        linear_part(first, last, x, gate, nothing, gates)
        for n in range(x.shape[0]):
            activate_all(kind, gates[n, first:last])
            for i in range(first, last):
                values[n, i] *= gates[n, i]
    for t in prange(threads):
        first, last = share_of_rows(down.shape[0], t, threads)
        linear_part(first, last, values, down, nothing, out)


@njit(nogil=True)
def _ffn_words(at, sizes, x, turned):
    """Gate and up [I, H]; down [H, I], or its rows by neurons [I, H]."""
    neurons, hidden = sizes[4], x.shape[1]
    down = array_at(at[DOWN], (neurons, hidden) if turned else (hidden, neurons), x)
    return array_at(at[GATE], (neurons, hidden), x), array_at(at[UP], (neurons, hidden), x), down


@kernel()
def dense_layers(x, table, sizes, epsilons, kind, place, threads, inputs, attention):
    """All layers, nothing left out.

    sizes: outputs of queries, of keys, key heads, size of a head, neurons; the rest as for `layers_rows`.
    """
    (normed, wide, result), nothing = room_for(x), np.empty((0, 0), np.float32)
    slots = np.empty(0, np.int64)
    for number in range(table.shape[0]):
        at = table[number]
        _attended(at, sizes, epsilons, place, threads, x, normed, attention)
        to_ffn(at, epsilons[0], x, attention, inputs[number], wide)
        gate, up, down = _ffn_words(at, sizes, x, False)
        dense_ffn(wide, gate, up, down, kind, threads, result)
        from_ffn(x, result, nothing, slots)


@kernel()
def listed_layers(x, table, sizes, epsilons, kind, place, slots, capacity, threads, inputs, attention):
    """All layers, each FFN over its slot's neurons: see `kernels.single` and `kernels.several`."""
    (normed, wide, result), real = room_for(x), np.empty(0, np.float32)
    alone = np.empty((threads, x.shape[1]), np.float32)
    partial = np.empty((threads, x.shape[0], x.shape[1]), np.float32)
    for number in range(table.shape[0]):
        at = table[number]
        _attended(at, sizes, epsilons, place, threads, x, normed, attention)
        to_ffn(at, epsilons[0], x, attention, inputs[number], wide)
        gate, up, down = _ffn_words(at, sizes, x, True)
        index, count = lists_at(at, capacity)
        if x.shape[0] == 1:
            one = slots[0]
            single(
                wide[0], True, gate, up, down, real, real, 0, index[one], count[one], kind, threads, alone, result[0]
            )  # fmt: skip
        else:
            several(
                wide, True, gate, up, down, real, real, 0, index, count, slots, kind, threads, partial, result
            )  # fmt: skip
        from_ffn(x, result, added_at(at, capacity, x.shape[1]), slots)


@kernel()
def sketched_layers(
    x, table, sizes, epsilons, kind, place, slots, capacity, moments, rounding, bits, threads,
    inputs, attention, counts, unions,
):  # fmt: skip
    """All layers, each token choosing its neurons by their sketch: see `selector_kernels.sketch_rows`.

    rounding: see there.  bits: of the sketch.  counts, unions: filled as by `layers_rows.nested_layers`.
    """
    lines, neurons, hidden = x.shape[0], sizes[4], x.shape[1]
    (normed, wide, result), real = room_for(x), np.empty(0, np.float32)
    key, value = np.empty((lines, neurons), np.float32), np.empty((lines, neurons), np.float32)
    index, cut, seen = np.empty((lines, neurons), np.int32), np.empty(lines, np.uint32), np.zeros(neurons, np.uint8)
    least, nothing, plane = np.empty(0, np.uint32), np.empty((0, 0), np.float32), np.empty(0, np.int64)
    shape = neurons, bits, -(-hidden // 64)
    for number in range(table.shape[0]):
        at = table[number]
        _attended(at, sizes, epsilons, place, threads, x, normed, attention)
        to_ffn(at, epsilons[0], x, attention, inputs[number], wide)
        gate, up, down = _ffn_words(at, sizes, x, True)
        wanted, importance, errors, others = choice_at(at, capacity, moments, neurons, hidden)
        sketches = (
            array_at(at[GATE_PLANES], shape, plane),
            array_at(at[GATE_SCALE], (neurons,), real),
            array_at(at[UP_PLANES], shape, plane),
            array_at(at[UP_SCALE], (neurons,), real),
        )
        sketch_rows(
            wide, (True, gate, up, down, real, real, 0), rounding, sketches, (wanted, least), slots, importance, errors,
            others, kind, threads, key, value, index, counts[number], cut, result,
        )  # fmt: skip
        unions[number] = union_size(index, counts[number], seen)
        from_ffn(x, result, nothing, slots)
