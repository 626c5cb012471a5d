"""The highest scores of each row in Triton: an exact search over the bits of the scores, and the chosen in order.

Scores are keys: the bits of float32 without their sign, int32, ordered as the floats are and NaN above all. Whatever
makes the keys counts them by their first 11 bits, all over the device. Then one program for each row finds the key of
the wanted rank in three steps, 11 + 10 + 10 bits: which bin of the last count holds it, and a count of that bin's keys
by their next bits. So the number of steps is fixed, and only the keys of one bin are counted again. A last pass places
the chosen by prefix sums, ascending.

Counts are integers, added atomically: their order changes nothing, the same keys give the same lists.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# a row's counts: by the first bits; by the next and the last ones; and those two again for a second search
FIRST_BINS = 2048
NEXT_BINS = 1024
TALLY = FIRST_BINS + 4 * NEXT_BINS
_FIRST_SHIFT = tl.constexpr(20)
_FIRST, _NEXT = tl.constexpr(FIRST_BINS), tl.constexpr(NEXT_BINS)
_NEXT_SHIFT = tl.constexpr(10)
_LOW = tl.constexpr(0x7FFFFFFF)
_INFINITE = tl.constexpr(0x7F800000)  # the bits of float32 infinity

MOST_KEYS = 8192  # keys that one program holds at a time


@triton.jit
def store_keys(score, key, tally, i, live):
    """Scores float32 as keys of the neurons i, counted by their first bits."""
    bits = score.to(tl.int32, bitcast=True) & _LOW
    tl.store(key + i, bits, mask=live)
    tl.atomic_add(tally + (bits >> _FIRST_SHIFT), 1, mask=live & (bits > 0), sem="relaxed")


@triton.jit
def _bin_of(tally, need, BINS: tl.constexpr):
    """The highest bin with `need` entries in it and above, and how many of its own are needed."""
    # tensors first: Triton 3.7's interpreter makes a constant of a constant minus a tensor
    bins = -tl.arange(0, BINS) + (BINS - 1)
    found = tl.load(tally + bins)
    short = tl.cumsum(found, axis=0) < need
    passed = tl.sum(tl.where(short, 1, 0), axis=0)
    return -passed + (BINS - 1), need - tl.sum(tl.where(short, found, 0), axis=0)


@triton.jit
def _next_bits(key, tally, known, need, SHIFT: tl.constexpr, BINS: tl.constexpr, ALL: tl.constexpr, KEYS: tl.constexpr):
    """Ten more bits of the key that is searched, whose bits above them are `known`: those bits and the need left."""
    for start in range(0, ALL, KEYS):
        i = start + tl.arange(0, KEYS)
        k = tl.load(key + i, mask=i < ALL, other=0)
        same = (k > 0) & ((k >> (SHIFT + 10)) == known)
        tl.atomic_add(tally + ((k >> SHIFT) & (BINS - 1)), 1, mask=same, sem="relaxed")
    # every thread's counts are there before any is read
    tl.debug_barrier()
    bits, need = _bin_of(tally, need, BINS)
    return known << 10 | bits, need


@triton.jit
def _search(key, tally, again, rank, ALL: tl.constexpr, KEYS: tl.constexpr):
    """The key of this rank and how many keys equal to it are taken; rank 0: a key above all, none of it.

    key int32 [I]; tally: counts by the first bits; again: zeros for the two other counts.
    """
    known, need = _bin_of(tally, rank, _FIRST)
    known, need = _next_bits(key, again, known, need, _NEXT_SHIFT, _NEXT, ALL, KEYS)
    return _next_bits(key, again + _NEXT, known, need, 0, _NEXT, ALL, KEYS)


@triton.jit(do_not_specialize=["width"])
def cut_kernel(
    key,
    tally,
    value,
    slots,
    wanted,
    threshold,
    index,
    count,
    cut,
    owners,
    acts,
    width,
    ALL: tl.constexpr,
    COUNTS: tl.constexpr,
    KEYS: tl.constexpr,
    THRESHOLDED: tl.constexpr,
    VALUED: tl.constexpr,
):
    """`selector_ops.chosen_rows`: grid (N,), index int32 [N, W] (nothing is written past a count), count, cut [N].

    key int32 [N, I]; tally int32 [N, COUNTS], first bits counted, the rest 0; owners int64 [N] becomes 0 .. N - 1, the
    slots of the lists just made. With VALUED the chosen neurons' value float32 [N, I] goes to acts float32 [N, W].
    """
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + n)
    key += n * ALL
    tally += n * COUNTS
    again = tally + _FIRST
    positive = tl.sum(tl.load(tally + tl.arange(0, _FIRST)), axis=0)
    own = tl.minimum(tl.maximum(tl.load(wanted + slot), 0), positive)
    lowest, ties = _search(key, tally, again, own, ALL, KEYS)
    tl.store(cut + n, tl.where(own > 0, lowest, _INFINITE).to(tl.float32, bitcast=True))
    take = own
    if THRESHOLDED:
        # a threshold under 0 takes all that a threshold of 0 takes: what is above 0
        least = tl.maximum(tl.load(threshold + slot).to(tl.int32, bitcast=True), 1)
        take = tl.zeros([], tl.int32)
        for start in range(0, ALL, KEYS):
            i = start + tl.arange(0, KEYS)
            k = tl.load(key + i, mask=i < ALL, other=0)
            take += tl.sum(tl.where(k >= least, 1, 0), axis=0)
        lowest, ties = least, tl.full([], ALL, tl.int32)
    if take > width:
        take = tl.minimum(take, width)
        lowest, ties = _search(key, tally, again + 2 * _NEXT, take, ALL, KEYS)
    tl.store(count + n, take)
    tl.store(owners + n, n)
    # one prefix sum for both counts: of the keys above the lowest in the low half, of its equals in the high half
    before = tl.zeros([], tl.int64)
    for start in range(0, ALL, KEYS):
        i = start + tl.arange(0, KEYS)
        inside = i < ALL
        k = tl.load(key + i, mask=inside, other=0)
        mine = tl.where(k > lowest, 1, 0).to(tl.int64) + (tl.where(inside & (k == lowest), 1, 0).to(tl.int64) << 32)
        until = before + tl.cumsum(mine, axis=0) - mine
        equals = until >> 32
        chosen = (k > lowest) | (inside & (k == lowest) & (equals < ties))
        place = (until & _LOW) + tl.minimum(equals, ties)
        tl.store(index + n * width + place, i, mask=chosen)
        if VALUED:
            tl.store(acts + n * width + place, tl.load(value + n * ALL + i, mask=chosen, other=0.0), mask=chosen)
        before += tl.sum(mine, axis=0)


def cut_warps(keys: int) -> int:
    """Warps of one program that holds so many keys: 16 keys a thread."""
    return max(4, min(16, keys // 512))


def launch_cut(
    key: Tensor,
    tally: Tensor,
    value: Tensor | None,
    slots: Tensor,
    wanted: Tensor,
    threshold: Tensor | None,
    index: Tensor,
    count: Tensor,
    cut: Tensor,
    owners: Tensor,
    acts: Tensor,
) -> None:
    """Launch `cut_kernel`: key int32 [N, I], tally int32 [N, TALLY], wanted int32 [S], threshold float32 [S]."""
    rows, neurons = key.shape
    keys = min(MOST_KEYS, triton.next_power_of_2(neurons))
    cut_kernel[(rows,)](
        key,
        tally,
        key if value is None else value,
        slots,
        wanted,
        cut if threshold is None else threshold,
        index,
        count,
        cut,
        owners,
        acts,
        index.shape[1],
        ALL=neurons,
        COUNTS=TALLY,
        KEYS=keys,
        THRESHOLDED=threshold is not None,
        VALUED=value is not None,
        num_warps=cut_warps(keys),
        enable_fp_fusion=True,
    )
