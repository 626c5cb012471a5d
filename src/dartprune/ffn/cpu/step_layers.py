"""All layers of a decode step in one call, their weights in rows: nothing of Python lies between two of them.

The layers' arrays are handed over as a table of addresses, one line for each layer, since they are many and change
seldom. Whoever calls holds the arrays.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from dartprune.ffn.cpu.blocks import float_of, word_of
from dartprune.ffn.cpu.cache import kernel
from dartprune.ffn.cpu.group_kernels import chosen, nested_rows
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.step_kernels import norm, widened
from dartprune.ffn.cpu.step_rows import attention_of_rows

# the columns of a table: addresses, 0 for none, and how many tokens and neurons there is room for
NORM, QUERY, KEY, VALUE, OUT = 0, 1, 2, 3, 4
QUERY_BIAS, KEY_BIAS, VALUE_BIAS, OUT_BIAS, QUERY_NORM, KEY_NORM = 5, 6, 7, 8, 9, 10
FFN_NORM, HEAD, TAIL = 11, 12, 13
KEYS, VALUES, ROOM = 14, 15, 16
INDEX, COUNT, WIDTH, COMPENSATION = 17, 18, 19, 20  # of lists
WANTED, IMPORTANCE, ERRORS, MEANS = 17, 18, 19, 21  # of nested rows, which compensate in the same column
COLUMNS = 22


@intrinsic
def _pointer(typingctx, address):
    """An address as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit(nogil=True)
def _words(address, shape, like):
    """What lies at an address, in words of the kind of `like`; nothing where the address is 0."""
    return carray(_pointer(address), shape, like.dtype)


@lean()
def _add(x, y):
    """X [N, H] += y, both in words."""
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[n, j] = word_of(float_of(x[n, j]) + float_of(y[n, j]), x[n, j])


@njit(nogil=True)
def _vector(address, size, like):
    """A vector in words, empty where there is none."""
    return _words(address, (size if address else 0,), like)


@njit(nogil=True)
def _attended(at, sizes, formats, epsilons, place, threads, x, normed, out):
    """The attention module of one layer, its norm before it: see `attention_of_rows`; out words [N, H]."""
    queries, keys, row, out_row, groups, size = sizes
    hidden, byte = x.shape[1], np.empty(0, np.uint8)
    norm(x, _vector(at[NORM], hidden, x), epsilons[0], normed)
    rows = (
        _words(at[QUERY], (queries, row), byte),
        _words(at[KEY], (keys, row), byte),
        _words(at[VALUE], (keys, row), byte),
        _words(at[OUT], (hidden, out_row), byte),
    )
    biases = (
        _vector(at[QUERY_BIAS], queries, x),
        _vector(at[KEY_BIAS], keys, x),
        _vector(at[VALUE_BIAS], keys, x),
        _vector(at[OUT_BIAS], hidden, x),
    )
    norms = _vector(at[QUERY_NORM], size, x), _vector(at[KEY_NORM], size, x), epsilons[1]
    cos, sin, length, mask, scale = place
    shape = x.shape[0], groups, at[ROOM], size
    cached = _words(at[KEYS], shape, x), _words(at[VALUES], shape, x)
    attention_of_rows(
        normed, rows, (formats[0], formats[1]), biases, norms, cos, sin, cached[0], cached[1], length, mask, scale,
        threads, out,
    )  # fmt: skip


@njit(nogil=True)
def _begun(number, table, sizes, formats, epsilons, place, threads, x, room, inputs, attention):
    """A layer up to its FFN: x words [N, H] goes on, room[1] float32 [N, H] is the FFN's input."""
    normed, wide = room
    at = table[number]
    _attended(at, sizes, formats, epsilons, place, threads, x, normed, attention)
    _add(x, attention)
    norm(x, _vector(at[FFN_NORM], x.shape[1], x), epsilons[0], inputs[number])
    for n in range(x.shape[0]):
        widened(inputs[number, n], wide[n])


@lean()
def _ended(x, result, added, slots):
    """X words [N, H] += result float32 [N, H], after what is added to it: float32 [S, H] of each slot, or [0, H]."""
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            made = float_of(word_of(result[n, j], x[n, j]))
            if added.shape[0]:
                made = float_of(word_of(made + float_of(word_of(added[slots[n], j], x[n, j])), x[n, j]))
            x[n, j] = word_of(float_of(x[n, j]) + made, x[n, j])


@njit(nogil=True)
def _room(x):
    """Room for a normed input in words and for one in float32."""
    return np.empty_like(x), np.empty(x.shape, np.float32)


@kernel()
def layers_by_lists(x, table, sizes, formats, epsilons, kind, place, slots, capacity, threads, inputs, attention):
    """All layers, each FFN over its slot's neurons: see `group_kernels.chosen`.

    x: the residual stream [N, H] in words, which goes on in place.  table: int64 [L, COLUMNS].
    sizes: outputs of queries, of keys, bytes of their rows and of the output's, key heads, size of a head; neurons,
    bytes of heads and of tails.  formats: the offsets of the rows of queries, of the output and of the FFN's, see
    `RowFormat`.  epsilons: of the layers' norms and of those of heads.  kind: of activation.
    place: cos, sin, length, mask and scale, see `step_kernels.attend`.  slots: int64 [N], of `capacity`.
    inputs: [L, N, H] in words, filled with the inputs of the FFNs.  attention: [N, H], with the last layer's output.
    """
    room, result = _room(x), np.empty(x.shape, np.float32)
    byte, integer, real = np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0, np.float32)
    for number in range(table.shape[0]):
        _begun(number, table, sizes[:6], formats, epsilons, place, threads, x, room, inputs, attention)
        at = table[number]
        head, tail = _words(at[HEAD], (sizes[6], sizes[7]), byte), _words(at[TAIL], (sizes[6], sizes[8]), byte)
        index, count = _words(at[INDEX], (capacity, at[WIDTH]), integer), _words(at[COUNT], (capacity,), integer)
        chosen(room[1], head, tail, formats[2], (real, real, 0), kind, index, count, slots, threads, result)
        added = _words(at[COMPENSATION], (capacity if at[COMPENSATION] else 0, x.shape[1]), real)
        _ended(x, result, added, slots)


@njit(nogil=True)
def _union(index, count, seen):
    """How many neurons the rows index[n, :count[n]] name together; seen uint8 [I], zeros and zeros again."""
    if index.shape[0] == 1:
        return count[0]
    total = np.int32(0)
    for n in range(index.shape[0]):
        for i in index[n, : count[n]]:
            total += np.int32(1 - seen[i])
            seen[i] = 1
    seen[:] = 0
    return total


@kernel()
def layers_nested(
    x, table, sizes, formats, epsilons, kind, place, slots, capacity, moments, threads,
    inputs, attention, counts, unions,
):  # fmt: skip
    """All layers, each token choosing its neurons by the high codes: see `group_kernels.nested_rows`.

    As `layers_by_lists`; moments: of the errors of a neuron's estimates that are known, 0 for none.  counts: int32
    [L, N], filled with how many neurons each token chose, and unions int32 [L], with how many all did together.
    """
    lines, neurons = x.shape[0], sizes[6]
    room, result = _room(x), np.empty(x.shape, np.float32)
    byte, integer, real = np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0, np.float32)
    half, least = np.empty(0, np.uint16), np.empty(0, np.uint32)
    key, index = np.empty((lines, neurons), np.float32), np.empty((lines, neurons), np.int32)
    cut, seen = np.empty(lines, np.uint32), np.zeros(neurons, np.uint8)
    for number in range(table.shape[0]):
        _begun(number, table, sizes[:6], formats, epsilons, place, threads, x, room, inputs, attention)
        at = table[number]
        head, tail = _words(at[HEAD], (neurons, sizes[7]), byte), _words(at[TAIL], (neurons, sizes[8]), byte)
        wanted, importance = _words(at[WANTED], (capacity,), integer), _words(at[IMPORTANCE], (1, neurons), real)
        errors = _words(at[ERRORS], (capacity if at[ERRORS] else 0, moments, neurons), half)
        others = (
            _words(at[MEANS], (capacity if at[MEANS] else 0, neurons), half),
            _words(at[COMPENSATION], (capacity if at[MEANS] else 0, x.shape[1]), real),
        )
        nested_rows(
            room[1], head, tail, formats[2], (real, real, 0), kind, slots, (wanted, least), importance, errors, others,
            threads, key, index, counts[number], cut, result,
        )  # fmt: skip
        unions[number] = _union(index, counts[number], seen)
        _ended(x, result, real.reshape(0, 0), slots)
