"""The sketch in Triton: every neuron's score from bit planes of its weights and of the inputs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dartprune.ffn.gpu.cut import TALLY, store_keys
from dartprune.ffn.gpu.kernels import Blocks, activate
from dartprune.ffn.sketch import FFNSketch, InputPlanes, SketchPlanes


@triton.jit
def _ones(v):
    """Population count of uint64, int32; in this form the compiler finds the instruction for it."""
    v = v - ((v >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    # the limit changes nothing: without it the shift by 56 and one that follows become one, and it is not found
    return tl.minimum(((v * 0x0101010101010101) >> 56).to(tl.int32), 64)


@triton.jit
def integers(
    planes,
    x,
    total,
    i,
    live,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`selector_ops.sketch_integers` of the neurons i int64 [NEURONS] with one rounded row; COLUMNS words at a time."""
    sums = tl.zeros([NEURONS, COLUMNS], tl.int32)
    for start in range(0, WORDS, COLUMNS):
        w = start + tl.arange(0, COLUMNS)
        inside = w < WORDS
        wanted = live[:, None] & inside[None, :]
        for k in tl.static_range(BITS):
            plane = tl.load(planes + (i[:, None] * BITS + k) * WORDS + w[None, :], mask=wanted, other=0)
            plane = plane.to(tl.uint64, bitcast=True)
            for p in tl.static_range(INPUT_BITS):
                q = tl.load(x + p * WORDS + w, mask=inside, other=0).to(tl.uint64, bitcast=True)
                found = _ones(plane & q[None, :]) << (p + k + 1)
                if p == INPUT_BITS - 1:
                    sums -= found
                else:
                    sums += found
    return tl.sum(sums, axis=1) - (2**BITS - 1) * total


@triton.jit
def _estimate(
    planes,
    scale,
    x,
    step,
    total,
    place,
    exact,
    i,
    live,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`selector_ops.sketch_dots` of the neurons i with one rounded row, float32 [NEURONS]."""
    dots = integers(planes, x, total, i, live, WORDS, BITS, INPUT_BITS, NEURONS, COLUMNS).to(tl.float32) * step
    for o in range(0, OUTLIERS):
        j = tl.load(place + o)
        level = tl.zeros([NEURONS], tl.int32) - (2**BITS - 1)
        for k in tl.static_range(BITS):
            word = tl.load(planes + (i * BITS + k) * WORDS + (j >> 6), mask=live, other=0)
            level += ((word >> (j & 63)) & 1).to(tl.int32) << (k + 1)
        dots += level.to(tl.float32) * tl.load(exact + o)
    return dots * tl.load(scale + i, mask=live, other=0.0)


@triton.jit
def _mean_square(estimate, mean, variance, ACT: tl.constexpr):
    """E[act(z)^2] around a corrected estimate: see `expected.expected_sizes`."""
    middle = estimate + mean
    reach = tl.sqrt(3.0 * variance)
    a, low, high = activate(middle, ACT), activate(middle - reach, ACT), activate(middle + reach, ACT)
    return 2.0 / 3.0 * a * a + 1.0 / 6.0 * (low * low + high * high)


@triton.jit
def estimate_kernel(
    x,
    step,
    total,
    place,
    exact,
    matrix,
    scale,
    out,
    ALL: tl.constexpr,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`sketch.sketch_dots` to out float32 [N, I]: grid (N, blocks of I); matrix int64 [I, BITS, WORDS]."""
    n = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)).to(tl.int64)
    live = i < ALL
    x += n * INPUT_BITS * WORDS
    s, t = tl.load(step + n), tl.load(total + n)
    place += n * OUTLIERS
    exact += n * OUTLIERS
    a = _estimate(matrix, scale, x, s, t, place, exact, i, live, WORDS, BITS, INPUT_BITS, OUTLIERS, NEURONS, COLUMNS)
    tl.store(out + n * ALL + i, a, mask=live)


@triton.jit(do_not_specialize=["importance_stride"])
def score_kernel(
    x,
    step,
    total,
    place,
    exact,
    gate,
    gate_scale,
    up,
    up_scale,
    gate_bias,
    up_bias,
    importance,
    errors,
    slots,
    key,
    tally,
    importance_stride,
    ALL: tl.constexpr,
    COUNTS: tl.constexpr,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    GATED: tl.constexpr,
    GATE_BIASED: tl.constexpr,
    UP_BIASED: tl.constexpr,
    CALIBRATED: tl.constexpr,
    ACT: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`sketch.sketch_scores` as keys int32 [N, I]: grid (N, blocks of I); gate and up int64 [I, BITS, WORDS].

    errors bf16 [S, 4, I], or [S, 2, I] without a gate; read where CALIBRATED.
    """
    n = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)).to(tl.int64)
    live = i < ALL
    x += n * INPUT_BITS * WORDS
    s, t = tl.load(step + n), tl.load(total + n)
    place += n * OUTLIERS
    exact += n * OUTLIERS
    a = _estimate(up, up_scale, x, s, t, place, exact, i, live, WORDS, BITS, INPUT_BITS, OUTLIERS, NEURONS, COLUMNS)
    if UP_BIASED:
        a += tl.load(up_bias + i, mask=live, other=0.0).to(tl.float32)
    if GATED:
        g = _estimate(
            gate, gate_scale, x, s, t, place, exact, i, live, WORDS, BITS, INPUT_BITS, OUTLIERS, NEURONS, COLUMNS
        )
        if GATE_BIASED:
            g += tl.load(gate_bias + i, mask=live, other=0.0).to(tl.float32)
    slot = tl.load(slots + n)
    if CALIBRATED:
        known = errors + slot * ((4 if GATED else 2) * ALL) + i
        mean = tl.load(known, mask=live, other=0.0).to(tl.float32)
        variance = tl.load(known + ALL, mask=live, other=0.0).to(tl.float32)
        if GATED:
            a += tl.load(known + 2 * ALL, mask=live, other=0.0).to(tl.float32)
            up_variance = tl.load(known + 3 * ALL, mask=live, other=0.0).to(tl.float32)
            a = _mean_square(g, mean, variance, ACT) * (a * a + up_variance)
        else:
            a = _mean_square(a, mean, variance, ACT)
        a = tl.sqrt(a)
    elif GATED:
        a = activate(g, ACT) * a
    else:
        a = activate(a, ACT)
    a *= tl.load(importance + slot * importance_stride + i, mask=live, other=0.0)
    store_keys(a, key + n * ALL, tally + n * COUNTS, i, live)


def sketch_blocks(words: int) -> Blocks:
    """Neurons and words of their planes that one program holds at a time: 8 KB of each matrix."""
    columns = min(64, triton.next_power_of_2(words))
    return Blocks(min(64, 1024 // columns), columns, 8)


def launch_score(
    rounded: InputPlanes,
    sketch: FFNSketch,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    importance: Tensor,
    errors: Tensor | None,
    slots: Tensor,
    key: Tensor,
    tally: Tensor,
    act: str,
) -> None:
    """Launch `score_kernel`: importance float32 [S, I] or [1, I], slots int64 [N], key int32 [N, I]; errors above."""
    rows, neurons = key.shape
    up, gate = sketch.up, sketch.gate or sketch.up
    words = up.planes.shape[2]
    blocks = sketch_blocks(words)
    score_kernel[(rows, triton.cdiv(neurons, blocks.neurons))](
        *rounded,
        gate.planes,
        gate.scale,
        up.planes,
        up.scale,
        up.scale if gate_bias is None else gate_bias,
        up.scale if up_bias is None else up_bias,
        importance,
        up.scale if errors is None else errors,
        slots,
        key,
        tally,
        0 if importance.shape[0] == 1 else neurons,
        ALL=neurons,
        COUNTS=TALLY,
        WORDS=words,
        BITS=up.bits,
        INPUT_BITS=rounded.planes.shape[1],
        OUTLIERS=rounded.outlier_index.shape[1],
        GATED=sketch.gate is not None,
        GATE_BIASED=gate_bias is not None,
        UP_BIASED=up_bias is not None,
        CALIBRATED=errors is not None,
        ACT=act,
        NEURONS=blocks.neurons,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
        enable_fp_fusion=True,
    )


def launch_estimate(rounded: InputPlanes, matrix: SketchPlanes, out: Tensor) -> None:
    """Launch `estimate_kernel`: out float32 [N, I] is filled."""
    rows, neurons = out.shape
    words = matrix.planes.shape[2]
    blocks = sketch_blocks(words)
    estimate_kernel[(rows, triton.cdiv(neurons, blocks.neurons))](
        *rounded,
        matrix.planes,
        matrix.scale,
        out,
        ALL=neurons,
        WORDS=words,
        BITS=matrix.bits,
        INPUT_BITS=rounded.planes.shape[1],
        OUTLIERS=rounded.outlier_index.shape[1],
        NEURONS=blocks.neurons,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
    )
