"""The highest scores of one row for Numba: an exact cut by a radix search over the bits of the scores."""

from __future__ import annotations

import numpy as np
from numba import njit

from dartprune.ffn.cpu.lean import lean

BINS = 2048
INFINITE = np.uint32(0x7F800000)  # the bits of float32 infinity


@lean()
def _bin_of(tally, need):
    """The highest bin with `need` entries in it and above, and how many of its own are needed."""
    b = tally.shape[0] - 1
    while tally[b] < need:
        need -= tally[b]
        b -= 1
    return b, need


@lean()
def cut_of(key, wanted, tally, pool):
    """The wanted-th highest key, and how many keys equal to it are taken; wanted is 1 .. the number of keys over 0.

    key uint32 [I], bits of floats that are not negative, searched 11 + 11 + 9 bits at a time. pool uint32 [I].
    """
    tally[:] = 0
    for i in range(key.shape[0]):
        tally[key[i] >> np.uint32(20)] += 1
    b, need = _bin_of(tally, wanted)
    found = np.uint32(0)
    for i in range(key.shape[0]):
        pool[found] = key[i]
        found += np.uint32(key[i] >> np.uint32(20) == b)
    cut = np.uint32(b) << np.uint32(20)
    tally[:] = 0
    for i in range(found):
        tally[(pool[i] >> np.uint32(9)) & np.uint32(2047)] += 1
    b, need = _bin_of(tally, need)
    cut |= np.uint32(b) << np.uint32(9)
    tally[:512] = 0
    for i in range(found):
        if pool[i] >> np.uint32(9) == cut >> np.uint32(9):
            tally[pool[i] & np.uint32(511)] += 1
    b, need = _bin_of(tally[:512], need)
    return cut | np.uint32(b), need


@lean()
def _choose(key, wanted, least, threshold, tally, pool, index):
    """The highest keys of one row: see `selector_ops.chosen_rows`.

    key uint32 [I], threshold: whether `least`, the bits of one, holds in place of `wanted`. index int32 [W] is filled,
    ascending. Returns their number and the bits of the row's own cut.
    """
    neurons = key.shape[0]
    positive = 0
    reached = 0
    for i in range(neurons):
        positive += np.int64(key[i] > 0)
        reached += np.int64((key[i] >= least) & (key[i] > 0))
    own = min(max(wanted, 0), positive)
    lowest, ties, bits = np.uint32(0), 0, INFINITE
    if own > 0:
        lowest, ties = cut_of(key, own, tally, pool)
        bits = lowest
    take = min(reached if threshold else own, index.shape[0])
    if take == 0:
        return 0, bits
    if threshold and take == reached:
        lowest, ties = max(least, np.uint32(1)), neurons
    elif take != own:
        lowest, ties = cut_of(key, take, tally, pool)
    equals = 0
    for i in range(neurons):
        equals += np.int64(key[i] == lowest)
    # the pool is free again: every neuron is written and kept only where it is chosen, without a branch
    k = np.uint32(0)
    if ties >= equals:
        for i in range(neurons):
            pool[k] = i
            k += np.uint32(key[i] >= lowest)
    else:
        for i in range(neurons):
            equal = key[i] == lowest
            pool[k] = i
            k += np.uint32((key[i] > lowest) | (equal & (ties > 0)))
            ties -= np.int64(equal)
    for i in range(k):
        index[i] = pool[i]
    return k, bits


@njit(nogil=True)
def choose_part(first, last, key, slots, wanted, least, index, count, cut):
    """Choose for the rows first:last; `least` is empty or has the threshold's bits for each slot."""
    tally = np.empty(BINS, np.int32)
    pool = np.empty(key.shape[1] + 1, np.uint32)
    for n in range(first, last):
        slot = slots[n]
        bits = least[slot] if least.shape[0] else np.uint32(0)
        count[n], cut[n] = _choose(key[n], wanted[slot], bits, least.shape[0] > 0, tally, pool, index[n])
