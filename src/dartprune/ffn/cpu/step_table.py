"""What a kernel for all layers of a decode step is handed, and what its layers have in common.

The layers' arrays come as a table of addresses, one line for each layer, since they are many and change seldom. Whoever
calls holds the arrays.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from dartprune.ffn.cpu.blocks import float_of, word_of
from dartprune.ffn.cpu.lean import lean
from dartprune.ffn.cpu.step_kernels import norm, widened

# The columns: addresses, 0 for none, and how many tokens and neurons there is room for.
NORM, QUERY, KEY, VALUE, OUT = 0, 1, 2, 3, 4
QUERY_BIAS, KEY_BIAS, VALUE_BIAS, OUT_BIAS, QUERY_NORM, KEY_NORM, FFN_NORM = 5, 6, 7, 8, 9, 10, 11
KEYS, VALUES, ROOM = 12, 13, 14
HEAD, TAIL = 15, 16  # an FFN in rows of few bits
GATE, UP, DOWN = 15, 16, 17  # or in words
COMPENSATION = 18
INDEX, COUNT, WIDTH = 19, 20, 21  # lists of neurons
WANTED, IMPORTANCE, ERRORS, MEANS = 19, 20, 21, 22  # or each token's own choice
GATE_PLANES, GATE_SCALE, UP_PLANES, UP_SCALE = 23, 24, 25, 26  # and its sketch, where that lies by itself
QUERY_SCALE, KEY_SCALE, VALUE_SCALE, OUT_SCALE = 27, 28, 29, 30  # of bytes
COLUMNS = 31


@intrinsic
def _pointer(typingctx, address):
    """An address as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit(nogil=True)
def array_at(address, shape, like):
    """The array that lies at an address, of the dtype of `like`."""
    return carray(_pointer(address), shape, like.dtype)


@njit(nogil=True)
def vector_at(address, size, like):
    """A vector, empty where there is none."""
    return array_at(address, (size if address else 0,), like)


@njit(nogil=True)
def room_for(x):
    """Room for a normed input in words [N, H], for one in float32, and for an FFN's output in float32."""
    return np.empty_like(x), np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)


@njit(nogil=True)
def small_arrays(at, sizes, x):
    """Biases of queries, keys, values and the output, then the norms of heads; see `step_kernels.attention`."""
    queries, keys, size = sizes[0], sizes[1], sizes[3]
    biases = (
        vector_at(at[QUERY_BIAS], queries, x),
        vector_at(at[KEY_BIAS], keys, x),
        vector_at(at[VALUE_BIAS], keys, x),
        vector_at(at[OUT_BIAS], x.shape[1], x),
    )
    return biases, vector_at(at[QUERY_NORM], size, x), vector_at(at[KEY_NORM], size, x)


@njit(nogil=True)
def cached(at, sizes, x):
    """Keys and values of a layer's cache, with room for one more token."""
    shape = x.shape[0], sizes[2], at[ROOM], sizes[3]
    return array_at(at[KEYS], shape, x), array_at(at[VALUES], shape, x)


@lean()
def _add(x, y):
    """X [N, H] += y, both in words."""
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[n, j] = word_of(float_of(x[n, j]) + float_of(y[n, j]), x[n, j])


@njit(nogil=True)
def to_ffn(at, epsilon, x, attention, inputs, wide):
    """Add the attention's output to x [N, H], norm that to the FFN's inputs [N, H], all in words, and widen these."""
    _add(x, attention)
    norm(x, vector_at(at[FFN_NORM], x.shape[1], x), epsilon, inputs)
    for n in range(x.shape[0]):
        widened(inputs[n], wide[n])


@lean()
def from_ffn(x, result, added, slots):
    """X words [N, H] += result float32 [N, H] and what is added to it: float32 [S, H] of each slot, or [0, H]."""
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            made = float_of(word_of(result[n, j], x[n, j]))
            if added.shape[0]:
                made = float_of(word_of(made + float_of(word_of(added[slots[n], j], x[n, j])), x[n, j]))
            x[n, j] = word_of(float_of(x[n, j]) + made, x[n, j])


@njit(nogil=True)
def lists_at(at, capacity):
    """The neurons of each slot: index int32 [S, W] and count int32 [S]."""
    integer = np.empty(0, np.int32)
    return array_at(at[INDEX], (capacity, at[WIDTH]), integer), array_at(at[COUNT], (capacity,), integer)


@njit(nogil=True)
def added_at(at, capacity, hidden):
    """What is added to each slot's output, float32 [S, H], or [0, H]."""
    return array_at(at[COMPENSATION], (capacity if at[COMPENSATION] else 0, hidden), np.empty(0, np.float32))


@njit(nogil=True)
def choice_at(at, capacity, moments, neurons, hidden):
    """What each token's own choice needs: `wanted`, importance, errors, means and compensation of each slot."""
    integer, real, half = np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.uint16)
    wanted, importance = array_at(at[WANTED], (capacity,), integer), array_at(at[IMPORTANCE], (1, neurons), real)
    errors = array_at(at[ERRORS], (capacity if at[ERRORS] else 0, moments, neurons), half)
    means = array_at(at[MEANS], (capacity if at[MEANS] else 0, neurons), half)
    return wanted, importance, errors, (means, added_at(at, capacity, hidden))


@njit(nogil=True)
def union_size(index, count, seen):
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
