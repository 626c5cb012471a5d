"""The token gate in Triton: the candidates' scores from their first rows, then the chosen up rows alone."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dartprune.ffn.gpu.cut import TALLY, store_keys
from dartprune.ffn.gpu.kernels import Blocks, activate


@triton.jit
def _row_dots(x, matrix, rows, live, HIDDEN: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr):
    """Products of one x [H] with the rows int64 [NEURONS] of a matrix, float32."""
    sums = tl.zeros([NEURONS, COLUMNS], tl.float32)
    for start in tl.static_range(0, HIDDEN, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < HIDDEN
        v = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        wanted = live[:, None] & inside[None, :]
        sums += tl.load(matrix + rows[:, None] * HIDDEN + columns[None, :], mask=wanted, other=0.0).to(tl.float32) * v
    return tl.sum(sums, axis=1)


@triton.jit(do_not_specialize=["width", "importance_stride"])
def gate_kernel(
    x,
    matrix,
    bias,
    importance,
    index,
    count,
    slots,
    key,
    value,
    tally,
    width,
    importance_stride,
    ALL: tl.constexpr,
    COUNTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHED: tl.constexpr,
    ACT: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The candidates' activations and keys: grid (N, blocks of W), value float32 and key int32 [N, I] at their neurons.

    key and tally hold zeros before; index int32 [S, W], count int32 [S], slots int64 [N].
    """
    n = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * NEURONS
    slot = tl.load(slots + n)
    kept = tl.load(count + slot)
    if first < kept:
        lane = first + tl.arange(0, NEURONS)
        live = lane < kept
        rows = tl.load(index + slot * width + lane, mask=live, other=0).to(tl.int64)
        a = _row_dots(x + n * HIDDEN, matrix, rows, live, HIDDEN, NEURONS, COLUMNS)
        if BIASED:
            a += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)
        a = activate(a, ACT)
        tl.store(value + n * ALL + rows, a, mask=live)
        if WEIGHED:
            a *= tl.load(importance + slot * importance_stride + rows, mask=live, other=0.0)
        store_keys(a, key + n * ALL, tally + n * COUNTS, rows, live)


@triton.jit(do_not_specialize=["width"])
def chosen_up_kernel(
    x,
    up,
    up_bias,
    index,
    count,
    acts,
    width,
    HIDDEN: tl.constexpr,
    BIASED: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiplies acts float32 [N, W], gate activations, with the chosen up rows' products: grid (N, blocks of W).

    index int32 [N, W] and count int32 [N] are the rows' own lists.
    """
    n = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * NEURONS
    kept = tl.load(count + n)
    if first < kept:
        lane = first + tl.arange(0, NEURONS)
        live = lane < kept
        rows = tl.load(index + n * width + lane, mask=live, other=0).to(tl.int64)
        u = _row_dots(x + n * HIDDEN, up, rows, live, HIDDEN, NEURONS, COLUMNS)
        if BIASED:
            u += tl.load(up_bias + rows, mask=live, other=0.0).to(tl.float32)
        places = acts + n * width + lane
        tl.store(places, tl.load(places, mask=live, other=0.0) * u, mask=live)


def launch_gate(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    importance: Tensor | None,
    index: Tensor,
    count: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    tally: Tensor,
    act: str,
    blocks: Blocks,
) -> None:
    """Launch `gate_kernel`: x [N, H], matrix [I, H], index int32 [S, W], key and value [N, I]."""
    rows, hidden = x.shape
    neurons, width = key.shape[1], index.shape[1]
    gate_kernel[(rows, triton.cdiv(width, blocks.neurons))](
        x,
        matrix,
        matrix if bias is None else bias,
        value if importance is None else importance,
        index,
        count,
        slots,
        key,
        value,
        tally,
        width,
        0 if importance is None or importance.shape[0] == 1 else neurons,
        ALL=neurons,
        COUNTS=TALLY,
        HIDDEN=hidden,
        BIASED=bias is not None,
        WEIGHED=importance is not None,
        ACT=act,
        NEURONS=blocks.neurons,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
        enable_fp_fusion=True,
    )


def launch_chosen_up(
    x: Tensor, up: Tensor, up_bias: Tensor | None, index: Tensor, count: Tensor, acts: Tensor, blocks: Blocks
) -> None:
    """Launch `chosen_up_kernel`: x [N, H], up [I, H], index int32 [N, W], acts float32 [N, W]."""
    rows, hidden = x.shape
    width = index.shape[1]
    chosen_up_kernel[(rows, triton.cdiv(width, blocks.neurons))](
        x,
        up,
        up if up_bias is None else up_bias,
        index,
        count,
        acts,
        width,
        HIDDEN=hidden,
        BIASED=up_bias is not None,
        NEURONS=blocks.neurons,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
        enable_fp_fusion=True,
    )
