"""Inputs as bit planes, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dartprune.ffn.gpu.cut import TALLY
from dartprune.ffn.sketch import GAUSSIAN_STEP, InputPlanes

_LOW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def round_kernel(
    x,
    planes,
    step,
    total,
    place,
    exact,
    tally,
    gaussian_step,
    HIDDEN: tl.constexpr,
    WORDS: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """`selector_ops.quantise_input`, and the row's counts set to 0: grid (N,), tally int32 [N, COUNTS].

    planes int64 [N, A, WORDS], step float32 [N], total int32 [N], place int64 [N, K], exact float32 [N, K].
    """
    n = tl.program_id(0).to(tl.int64)
    for start in range(0, COUNTS, 1024):
        tl.store(tally + n * COUNTS + start + tl.arange(0, 1024), tl.zeros([1024], tl.int32))
    j = tl.arange(0, PADDED * 64)
    v = tl.load(x + n * HIDDEN + j, mask=j < HIDDEN, other=0.0).to(tl.float32)
    size = v.to(tl.int32, bitcast=True) & _LOW
    # the larger first, and among equals the lower place; what is out has none
    rank = tl.where(j < HIDDEN, (size.to(tl.int64) << 32) | (_LOW - j), -1)
    for o in range(0, OUTLIERS):
        best = tl.max(rank, axis=0)
        at = _LOW - (best & _LOW)
        tl.store(place + n * OUTLIERS + o, at)
        tl.store(exact + n * OUTLIERS + o, tl.load(x + n * HIDDEN + at).to(tl.float32))
        rank = tl.where(rank == best, -1, rank)
    v = tl.where(rank < 0, 0.0, v)
    top: tl.constexpr = 2 ** (BITS - 1) - 1
    largest = tl.max(v.to(tl.int32, bitcast=True) & _LOW, axis=0).to(tl.float32, bitcast=True)
    spread = tl.sqrt_rn(tl.div_rn(tl.sum(v * v, axis=0), HIDDEN * 1.0)) * gaussian_step
    width = tl.minimum(tl.div_rn(largest, top * 1.0), spread)
    inverse = tl.where(width > 0, tl.div_rn(1.0, tl.where(width > 0, width, 1.0)), 0.0)
    scaled = v * inverse
    # not a number: 0, for the step shows it
    near = tl.where(
        tl.abs(scaled) <= top, scaled, tl.where(scaled > 0, top * 1.0, tl.where(scaled < 0, -top * 1.0, 0.0))
    )
    # to the nearest integer, halves to the even one: the sum has no room for a fraction
    q = ((near + 12582912.0) - 12582912.0).to(tl.int32)
    tl.store(step + n, width)
    tl.store(total + n, tl.sum(q, axis=0))
    bits = tl.reshape(q, [PADDED, 64])
    w = tl.arange(0, PADDED)
    shift = tl.arange(0, 64).to(tl.int64)[None, :]
    for p in tl.static_range(BITS):
        plane = tl.sum(((bits >> p) & 1).to(tl.int64) << shift, axis=1)
        tl.store(planes + (n * BITS + p) * WORDS + w, plane, mask=w < WORDS)


def launch_round(x: Tensor, rounded: InputPlanes, tally: Tensor) -> None:
    """Launch `round_kernel`: x [N, H], `rounded` is filled."""
    rows, hidden = x.shape
    _, bits, words = rounded.planes.shape
    padded = triton.next_power_of_2(words)
    round_kernel[(rows,)](
        x,
        rounded.planes,
        rounded.step,
        rounded.total,
        rounded.outlier_index,
        rounded.outlier_value,
        tally,
        GAUSSIAN_STEP[bits],
        HIDDEN=hidden,
        WORDS=words,
        PADDED=padded,
        BITS=bits,
        OUTLIERS=rounded.outlier_index.shape[1],
        COUNTS=TALLY,
        num_warps=max(4, min(16, padded // 8)),
        enable_fp_fusion=False,  # a product rounded once would find other integers than the reference
    )
