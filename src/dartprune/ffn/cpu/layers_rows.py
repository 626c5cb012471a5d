"""All layers of a decode step in one call, their weights in rows of few bits: nothing of Python lies between two."""

from __future__ import annotations

import numpy as np
from numba import njit

from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.group_kernels import chosen, nested_rows
from dartprune.ffn.cpu.step_bytes import attention_of_bytes
from dartprune.ffn.cpu.step_kernels import norm
from dartprune.ffn.cpu.step_rows import attention_of_rows
from dartprune.ffn.cpu.step_table import (
    HEAD,
    KEY,
    KEY_SCALE,
    NORM,
    OUT,
    OUT_SCALE,
    QUERY,
    QUERY_SCALE,
    TAIL,
    VALUE,
    VALUE_SCALE,
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
def _attended(at, sizes, formats, epsilons, place, threads, x, normed, out):
    """The attention of one layer, its norm before it; out words [N, H].

    formats: the offsets of the rows of queries and of the output, see `attention_of_rows`; None: `attention_of_bytes`.
    """
    queries, keys, hidden = sizes[0], sizes[1], x.shape[1]
    norm(x, vector_at(at[NORM], hidden, x), epsilons[0], normed)
    biases, query_norm, key_norm = small_arrays(at, sizes, x)
    norms = query_norm, key_norm, epsilons[1]
    cos, sin, length, mask, scale = place
    known_keys, known_values = cached(at, sizes, x)
    if formats is None:
        byte = np.empty(0, np.int8)
        weights = (
            array_at(at[QUERY], (queries, hidden), byte),
            array_at(at[KEY], (keys, hidden), byte),
            array_at(at[VALUE], (keys, hidden), byte),
            array_at(at[OUT], (hidden, queries), byte),
        )
        scales = (
            vector_at(at[QUERY_SCALE], queries, x),
            vector_at(at[KEY_SCALE], keys, x),
            vector_at(at[VALUE_SCALE], keys, x),
            vector_at(at[OUT_SCALE], hidden, x),
        )
        attention_of_bytes(
            normed, weights, scales, biases, norms, cos, sin, known_keys, known_values, length, mask, scale, threads,
            out,
        )  # fmt: skip
    else:
        row, out_row, code = sizes[7], sizes[8], np.empty(0, np.uint8)
        rows = (
            array_at(at[QUERY], (queries, row), code),
            array_at(at[KEY], (keys, row), code),
            array_at(at[VALUE], (keys, row), code),
            array_at(at[OUT], (hidden, out_row), code),
        )
        attention_of_rows(
            normed, rows, formats, biases, norms, cos, sin, known_keys, known_values, length, mask, scale, threads, out
        )


@njit(nogil=True)
def _ffn_rows(at, sizes):
    byte = np.empty(0, np.uint8)
    return array_at(at[HEAD], (sizes[4], sizes[5]), byte), array_at(at[TAIL], (sizes[4], sizes[6]), byte)


@kernel()
def listed_layers(
    x, table, sizes, offsets, formats, epsilons, kind, place, slots, capacity, threads, inputs, attention
):
    """All layers, each FFN over its slot's neurons: see `group_kernels.chosen`.

    x: the residual stream [N, H] in words, which goes on in place.  table: int64 [L, COLUMNS], see `step_table`.
    sizes: outputs of queries, of keys, key heads, size of a head, neurons; bytes of heads and of tails, of the rows of
    queries and keys and of the output's.  offsets: of the FFN's rows, see `RowFormat`.  formats: see `_attended`.
    epsilons: of the layers' norms and of those of heads.  kind: of activation.
    place: cos, sin, length, mask and scale, see `step_kernels.attend`.  slots: int64 [N], of `capacity`.
    inputs: [L, N, H] in words, filled with the inputs of the FFNs.  attention: [N, H], with the last layer's output.
    """
    (normed, wide, result), real = room_for(x), np.empty(0, np.float32)
    for number in range(table.shape[0]):
        at = table[number]
        _attended(at, sizes, formats, epsilons, place, threads, x, normed, attention)
        to_ffn(at, epsilons[0], x, attention, inputs[number], wide)
        head, tail = _ffn_rows(at, sizes)
        index, count = lists_at(at, capacity)
        chosen(wide, head, tail, offsets, (real, real, 0), kind, index, count, slots, threads, result)
        from_ffn(x, result, added_at(at, capacity, x.shape[1]), slots)


@kernel()
def nested_layers(
    x, table, sizes, offsets, formats, epsilons, kind, place, slots, capacity, moments, threads,
    inputs, attention, counts, unions,
):  # fmt: skip
    """All layers, each token choosing its neurons by the high codes: see `group_kernels.nested_rows`.

    As `listed_layers`; moments: of the errors of a neuron's estimates that are known, 0 for none.  counts: int32
    [L, N], filled with how many neurons each token chose, and unions int32 [L], with how many all did together.
    """
    lines, neurons = x.shape[0], sizes[4]
    (normed, wide, result), real = room_for(x), np.empty(0, np.float32)
    key, index = np.empty((lines, neurons), np.float32), np.empty((lines, neurons), np.int32)
    cut, seen = np.empty(lines, np.uint32), np.zeros(neurons, np.uint8)
    least, nothing = np.empty(0, np.uint32), np.empty((0, 0), np.float32)
    for number in range(table.shape[0]):
        at = table[number]
        _attended(at, sizes, formats, epsilons, place, threads, x, normed, attention)
        to_ffn(at, epsilons[0], x, attention, inputs[number], wide)
        head, tail = _ffn_rows(at, sizes)
        wanted, importance, errors, others = choice_at(at, capacity, moments, neurons, x.shape[1])
        nested_rows(
            wide, head, tail, offsets, (real, real, 0), kind, slots, (wanted, least), importance, errors, others,
            threads, key, index, counts[number], cut, result,
        )  # fmt: skip
        unions[number] = union_size(index, counts[number], seen)
        from_ffn(x, result, nothing, slots)
