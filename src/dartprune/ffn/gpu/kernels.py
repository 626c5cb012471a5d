"""Pruned FFN in Triton: the kept rows are read from the original weights where they lie, nothing else is.

Three launches, one after another on the current stream:

1. `up_kernel`: dot products of x with the kept rows of gate and up, bias, activation: one number per kept neuron;
2. `down_kernel`: those numbers times the kept rows of down; the kept neurons are split into parts, each a partial sum;
3. `sum_kernel`: the partial sums, added in a fixed order, and the bias.

No atomics: the same input gives the same bits. All products and sums are float32, on any weights (tensor cores would
round float32 to TF32). Counts and lists are read on the device, and the number of programs depends on shapes only, so a
captured CUDA graph stays right while lists change in place; programs beyond a count leave at once.

Bytes that must move for one row: `k * (3 or 2) * H * size(dtype)` of weights. The rest stays in the L2 cache and is
about one per cent: the list and the k activations (4 bytes each), x, and the partial sums (`splits * H * 4`). A weight
serves one multiplication, so memory bandwidth is the limit: the time to aim at is those bytes divided by it, and two
gaps between launches.

Rows of a batch are the fastest axis of each grid, so programs that read the same place of several rows' lists run next
to each other. Rows of one slot (a block of candidates) then find each other's weights in the L2 cache, and memory need
be read only once for all of them, without another kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dartprune.ffn.weights import FFNWeights

# the tile of the last sum: small columns, for one row's output is all that the device has to work on
SUM_PARTS, SUM_COLUMNS = 32, 64


@dataclass(frozen=True)
class Blocks:
    """How one program works: neurons and columns it holds at a time (powers of two), and its warps."""

    neurons: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Config:
    """Blocks of both products; into how many parts the kept neurons of one row are split for the second."""

    up: Blocks
    down: Blocks
    splits: int

    def parts(self, rows: int) -> int:
        """Parts of each row in a call of so many rows: together they should fill the device, not each on its own."""
        return max(1, self.splits // max(1, rows))


@triton.jit
def _sigmoid(v):
    # of -|v|: the exponential cannot overflow
    e = tl.exp(-tl.abs(v))
    return tl.where(v >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def activate(v, ACT: tl.constexpr):
    """An activation by its canonical name, float32."""
    if ACT == "silu":
        return v * _sigmoid(v)
    elif ACT == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z), with z = sqrt(2 / pi) (v + 0.044715 v^3)
        return v * _sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACT == "relu":
        return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu2":
        r = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return r * r
    else:
        tl.static_assert(ACT == "quick_gelu")
        return v * _sigmoid(1.702 * v)


@triton.jit(do_not_specialize=["width"])
def up_kernel(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    index,
    count,
    slots,
    acts,
    means,
    owners,
    width,
    HIDDEN: tl.constexpr,
    MEANS: tl.constexpr,
    GATED: tl.constexpr,
    GATE_BIASED: tl.constexpr,
    UP_BIASED: tl.constexpr,
    ACT: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Activations of the kept neurons: grid (N, blocks of W), acts float32 [N, W]; nothing is written past a count.

    Where MEANS is the number of neurons, each is given less its mean: bf16 [S, MEANS], by the slots `owners`.
    """
    n = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * NEURONS
    slot = tl.load(slots + n)
    kept = tl.load(count + slot)
    if first < kept:
        lane = first + tl.arange(0, NEURONS)
        live = lane < kept
        # 64-bit: the matrices of large models have more than 2^31 elements
        rows = tl.load(index + slot * width + lane, mask=live, other=0).to(tl.int64)
        g = tl.zeros([NEURONS, COLUMNS], tl.float32)
        u = tl.zeros([NEURONS, COLUMNS], tl.float32)
        # unrolled, so that a row's loads are under way together
        for start in tl.static_range(0, HIDDEN, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < HIDDEN
            v = tl.load(x + n * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            places = rows[:, None] * HIDDEN + columns[None, :]
            wanted = live[:, None] & inside[None, :]
            u += tl.load(up + places, mask=wanted, other=0.0).to(tl.float32) * v
            if GATED:
                g += tl.load(gate + places, mask=wanted, other=0.0).to(tl.float32) * v
        a = tl.sum(u, axis=1)
        if UP_BIASED:
            a += tl.load(up_bias + rows, mask=live, other=0.0).to(tl.float32)
        if GATED:
            s = tl.sum(g, axis=1)
            if GATE_BIASED:
                s += tl.load(gate_bias + rows, mask=live, other=0.0).to(tl.float32)
            a = activate(s, ACT) * a
        else:
            a = activate(a, ACT)
        if MEANS:
            places = tl.load(owners + n) * MEANS + rows
            a -= tl.load(means + places, mask=live, other=0.0).to(tl.float32)
        tl.store(acts + n * width + lane, a, mask=live)


@triton.jit(do_not_specialize=["width"])
def down_kernel(
    acts,
    down,
    index,
    count,
    slots,
    partial,
    width,
    HIDDEN: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Partial sums of each row's output: grid (N, blocks of H, parts), partial float32 [parts, N, H], all written."""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    inside = columns < HIDDEN
    slot = tl.load(slots + n)
    kept = tl.load(count + slot)
    # whole blocks of neurons for every part but the last ones
    share = tl.cdiv(tl.cdiv(kept, tl.num_programs(2)), NEURONS) * NEURONS
    first = part * share
    last = tl.minimum(first + share, kept)
    sums = tl.zeros([NEURONS, COLUMNS], tl.float32)
    for start in range(first, last, NEURONS):
        lane = start + tl.arange(0, NEURONS)
        live = lane < last
        rows = tl.load(index + slot * width + lane, mask=live, other=0).to(tl.int64)
        a = tl.load(acts + n * width + lane, mask=live, other=0.0)
        wanted = live[:, None] & inside[None, :]
        w = tl.load(down + rows[:, None] * HIDDEN + columns[None, :], mask=wanted, other=0.0)
        sums += w.to(tl.float32) * a[:, None]
    row = part * tl.num_programs(0) + n
    tl.store(partial + row * HIDDEN + columns, tl.sum(sums, axis=0), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def sum_kernel(
    partial,
    down_bias,
    compensation,
    owners,
    out,
    parts,
    HIDDEN: tl.constexpr,
    DOWN_BIASED: tl.constexpr,
    COMPENSATED: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds the parts, in an order that their number fixes, and the bias: grid (N, blocks of H), out [N, H].

    And compensation float32 [S, H], by the slots `owners`, where there is one.
    """
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        rows = part * tl.num_programs(0) + n
        wanted = (part < parts)[:, None] & inside[None, :]
        sums += tl.load(partial + rows[:, None] * HIDDEN + columns[None, :], mask=wanted, other=0.0)
    total = tl.sum(sums, axis=0)
    if DOWN_BIASED:
        total += tl.load(down_bias + columns, mask=inside, other=0.0).to(tl.float32)
    if COMPENSATED:
        total += tl.load(compensation + tl.load(owners + n) * HIDDEN + columns, mask=inside, other=0.0)
    tl.store(out + n * HIDDEN + columns, total, mask=inside)


def launch_up(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    slots: Tensor,
    acts: Tensor,
    act: str,
    blocks: Blocks,
    means: Tensor | None = None,
    owners: Tensor | None = None,
) -> None:
    """Launch `up_kernel`: x [N, H], index int32 [S, W], count int32 [S], slots int64 [N], acts float32 [N, W].

    means bf16 [S, I] of the slots owners int64 [N], or neither.
    """
    rows, hidden = x.shape
    width = index.shape[1]
    up_kernel[(rows, triton.cdiv(width, blocks.neurons))](
        x,
        up if gate is None else gate,
        up,
        up if gate_bias is None else gate_bias,
        up if up_bias is None else up_bias,
        index,
        count,
        slots,
        acts,
        up if means is None else means,
        slots if owners is None else owners,
        width,
        HIDDEN=hidden,
        MEANS=0 if means is None else means.shape[1],
        GATED=gate is not None,
        GATE_BIASED=gate_bias is not None,
        UP_BIASED=up_bias is not None,
        ACT=act,
        NEURONS=blocks.neurons,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
        enable_fp_fusion=True,
    )


def launch_down(
    acts: Tensor, down: Tensor, index: Tensor, count: Tensor, slots: Tensor, partial: Tensor, blocks: Blocks
) -> None:
    """Launch `down_kernel`: acts float32 [N, W], partial float32 [parts, N, H]."""
    parts, rows, hidden = partial.shape
    down_kernel[(rows, triton.cdiv(hidden, blocks.columns), parts)](
        acts,
        down,
        index,
        count,
        slots,
        partial,
        index.shape[1],
        HIDDEN=hidden,
        NEURONS=blocks.neurons,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
        enable_fp_fusion=True,
    )


def launch_sum(
    partial: Tensor,
    down_bias: Tensor | None,
    out: Tensor,
    compensation: Tensor | None = None,
    owners: Tensor | None = None,
) -> None:
    """Launch `sum_kernel`: partial float32 [parts, N, H], out [N, H].

    compensation float32 [S, H] of the slots owners int64 [N], or neither.
    """
    parts, rows, hidden = partial.shape
    sum_kernel[(rows, triton.cdiv(hidden, SUM_COLUMNS))](
        partial,
        partial if down_bias is None else down_bias,
        partial if compensation is None else compensation,
        partial if owners is None else owners,
        out,
        parts,
        HIDDEN=hidden,
        DOWN_BIASED=down_bias is not None,
        COMPENSATED=compensation is not None,
        PARTS=SUM_PARTS,
        COLUMNS=SUM_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )


def pruned_ffn(x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor, config: Config) -> Tensor:
    """The pruned FFN of x [N, H], all tensors contiguous; see `Backend.ffn`."""
    rows, hidden = x.shape
    acts = torch.empty(rows, index.shape[1], dtype=torch.float32, device=x.device)
    partial = torch.empty(config.parts(rows), rows, hidden, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    gate, up, down, gate_bias, up_bias, down_bias = weights.tensors()
    launch_up(x, gate, up, gate_bias, up_bias, index, count, slots, acts, weights.activation, config.up)
    launch_down(acts, down, index, count, slots, partial, config.down)
    launch_sum(partial, down_bias, out)
    return out
