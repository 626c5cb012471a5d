"""Operators of the per-token selectors, in plain torch: right on every device, the oracle of every kernel.

Two ways of finding the neurons that one token needs (method section 4a). The *gate* reads the gate rows of a slot's
candidates and goes on with the highest; the *sketch* estimates every neuron from bit planes of the weights. Both then
choose by `chosen_rows`: the `wanted` highest scores of this very token, so that a choice depends on nothing but the
token's own row: no state, the same alone and in a batch, at any phase of decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dartprune.ffn.backend import activation
from dartprune.ffn.weights import FFNWeights

WORD = 64  # bits of one word of a plane
SKETCH_BITS = (1, 2, 3, 4)
# step of the best uniform quantiser with 2^b - 1 levels for a Gaussian, in standard deviations, by bits
GAUSSIAN_STEP = {2: 1.224, 3: 0.651, 4: 0.353, 5: 0.194, 6: 0.106, 7: 0.0575, 8: 0.0311}
# half the step of the best uniform quantiser with 2^b levels for a Gaussian, in mean absolute values, by bits
GAUSSIAN_SCALE = {1: 1.0, 2: 0.624, 3: 0.367, 4: 0.210}
STARTS = (0.7, 0.85, 1.0, 1.2, 1.4, 1.7)  # where the fit of a row's scale starts, times that
_BLOCK = 1 << 18  # weights packed at a time: the caches hold their temporaries


@dataclass(frozen=True)
class TokenRows:
    """What a per-token FFN gives.

    out: [N, H] in x's dtype.
    index: int32 [N, W], the chosen neurons of each row; what lies beyond `count` is not defined.
    count: int32 [N], how many were chosen.
    cut: float32 [N], the lowest score that the token's own cut takes (inf where it takes none); what a threshold
        that follows the tokens is made from, whether or not a threshold was given.
    """

    out: Tensor
    index: Tensor
    count: Tensor
    cut: Tensor


@dataclass(frozen=True)
class SketchPlanes:
    """A weight matrix [I, H] in b bits: `W[i, j] ~ scale[i] * (2 q[i, j] - (2^b - 1))`, q = 0 .. 2^b - 1.

    planes: int64 [I, b, ceil(H / 64)], bit j % 64 of word j // 64 of plane k is bit k of q[i, j]; bits past H are 0.
    scale: float32 [I].
    hidden: H.
    """

    planes: Tensor
    scale: Tensor
    hidden: int

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return int(self.planes.shape[1])

    @property
    def neurons(self) -> int:
        """Number of rows, I."""
        return int(self.planes.shape[0])

    @property
    def bytes(self) -> int:
        """Memory held, and read for each token."""
        return self.planes.numel() * 8 + self.scale.numel() * 4


@dataclass(frozen=True)
class FFNSketch:
    """The sketch of one FFN and how inputs are rounded for it.

    gate: planes of the gate matrix, None for a plain FFN.  up: planes of the up matrix.
    activation_bits: 2 .. 8 bits of the rounded input.  outliers: entries of the input that are kept exact.
    """

    gate: SketchPlanes | None
    up: SketchPlanes
    activation_bits: int = 4
    outliers: int = 4

    @property
    def bytes(self) -> int:
        """Memory held, and read for each token."""
        return self.up.bytes + (0 if self.gate is None else self.gate.bytes)


class InputPlanes(NamedTuple):
    """Rows x [N, H] rounded: `x[n, j] ~ step[n] * X[n, j]`, X two's complement of A bits, 0 at the outliers.

    planes: int64 [N, A, ceil(H / 64)], laid out like `SketchPlanes.planes`.
    step: float32 [N].
    total: int32 [N], the sum of X over j.
    outlier_index: int64 [N, K].  outlier_value: float32 [N, K], the exact entries (where it is 0, the index is any).
    """

    planes: Tensor
    step: Tensor
    total: Tensor
    outlier_index: Tensor
    outlier_value: Tensor


def gated_rows(
    x: Tensor,
    weights: FFNWeights,
    index: Tensor,
    count: Tensor,
    slots: Tensor,
    wanted: Tensor,
    threshold: Tensor | None = None,
    importance: Tensor | None = None,
) -> TokenRows:
    """Token gate: score each slot's candidates by their gate rows, compute the highest exactly (method section 4a).

    Candidate i scores `|act(gate_i . x + bias)| * importance_i`; without a gate matrix `|act(up_i . x + bias)| *
    importance_i`, which is exact where importance is the norm of the down row. Chosen are the `wanted` highest,
    ties to the lower neuron; or, where a threshold is given, all that reach it. A score of 0 is never chosen.

    Args:
        x: [N, H], any float dtype; everything is computed in float32.
        weights: the FFN's weights; the activation must have a canonical name.
        index: int32 [S, W], candidates of each slot, in any order, no duplicates.
        count: int32 [S], how many of them count.
        slots: int64 [N], the slot of each row.
        wanted: int32 [S], neurons to choose for each token of a slot.
        threshold: float32 [S] or None, the least score that is chosen, in place of `wanted`.
        importance: float32 [S, I], or [1, I] for all slots alike, not negative; None counts every neuron alike.

    Returns:
        `TokenRows`, its index as wide as `index`, ascending.
    """
    wide = x.float()
    if weights.gate is None:
        first = activation(weights.activation, _linear(wide, weights.up, weights.up_bias))
    else:
        first = activation(weights.activation, _linear(wide, weights.gate, weights.gate_bias))
    score = first.abs() if importance is None else first.abs() * _by_row(importance, slots)
    score = score.masked_fill(~chosen_mask(index, count, weights.neurons)[slots], 0)
    return _finish(x, weights, score, wanted, slots, index.shape[1], threshold)


def sketched_rows(
    x: Tensor,
    weights: FFNWeights,
    sketch: FFNSketch,
    slots: Tensor,
    wanted: Tensor,
    importance: Tensor,
    width: int,
    threshold: Tensor | None = None,
) -> TokenRows:
    """Sketch: estimate every neuron from bit planes, compute the highest exactly (method section 4a).

    Args:
        x: [N, H], any float dtype.
        weights: the FFN's weights; the activation must have a canonical name.
        sketch: bit planes of these weights.
        slots: int64 [N], the slot of each row.
        wanted: int32 [S], neurons to choose for each token of a slot.
        importance: float32 [S, I], or [1, I] for all slots alike: the norms of the down rows (0: never chosen).
        width: the most neurons that a row may choose, W of the result.
        threshold: float32 [S] or None, the least score that is chosen, in place of `wanted`.

    Returns:
        `TokenRows`, its index ascending.
    """
    score = sketch_scores(x, weights, sketch, _by_row(importance, slots))
    return _finish(x, weights, score, wanted, slots, width, threshold)


def chosen_rows(
    scores: Tensor, wanted: Tensor, width: int, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The neurons with the highest scores, row by row: exact top-k, ties to the lower index, zeros never.

    Args:
        scores: float32 [N, I], not negative; NaN ranks highest, so that it shows in the result.
        wanted: int32 [N], how many to choose.
        width: the most that any row may choose.
        threshold: float32 [N] or None: choose all scores from here on instead (the `width` highest if there are
            more); `cut` is still the one of `wanted`.

    Returns:
        index int32 [N, width], ascending, 0 beyond count; count int32 [N]; cut float32 [N], the lowest of the
        `wanted` highest positive scores, inf where there is none.
    """
    neurons = scores.shape[1]
    # the bits of floats that are not negative are ordered as the floats are, NaN above all
    key = scores.float().contiguous().view(torch.int32) & 0x7FFFFFFF
    ranked, order = key.sort(dim=1, descending=True, stable=True)
    positive = (key > 0).sum(dim=1)
    own = torch.minimum(positive, wanted.clamp(0, neurons))
    last = ranked.gather(1, (own - 1).clamp(min=0)[:, None])[:, 0].contiguous().view(torch.float32)
    cut = torch.where(own > 0, last, torch.inf)
    take = own
    if threshold is not None:
        least = threshold.float().contiguous().view(torch.int32)
        # a threshold under 0 takes all that a threshold of 0 takes
        take = torch.minimum(positive, (key >= least.clamp(min=0)[:, None]).sum(dim=1))
    count = take.clamp(max=min(width, neurons))
    rank = torch.arange(neurons, device=scores.device)
    places = torch.where(rank < count[:, None], order, neurons).sort(dim=1).values
    places = F.pad(places, (0, max(0, width - neurons)), value=neurons)[:, :width]
    return torch.where(places < neurons, places, 0).int(), count.int(), cut


def build_planes(weight: Tensor, bits: int) -> SketchPlanes:
    """Round a weight matrix to b bits a weight, each row with the scale of the least squared error.

    The levels are the odd multiples of the scale, `+-1, +-3, .. +-(2^b - 1)`; with one bit that is the sign times
    the row's mean absolute value. With more, levels and scale are fitted in turn, from several starts.

    Args:
        weight: [I, H], any float dtype and layout.
        bits: 1 to 4.

    Raises:
        ValueError: bits outside 1 to 4.
    """
    out = empty_planes(weight, bits)
    top = 2**bits - 1
    step = max(1, _BLOCK // out.hidden)
    for first in range(0, out.neurons, step):
        part = weight[first : first + step].detach().float()
        s = part.abs().mean(dim=1, keepdim=True) * GAUSSIAN_SCALE[bits]
        if bits > 1:
            s = _fitted(part, s, top)
        out.planes[first : first + step] = _pack(_code(part, s, top).to(torch.int64), bits)
        out.scale[first : first + step] = s[:, 0]
    return out


def empty_planes(weight: Tensor, bits: int) -> SketchPlanes:
    """Planes for a weight matrix [I, H], on its device, to be filled.

    Raises:
        ValueError: bits outside 1 to 4.
    """
    if bits not in SKETCH_BITS:
        raise ValueError(f"bits={bits} is not one of {SKETCH_BITS}")
    neurons, hidden = weight.shape
    planes = torch.empty(neurons, bits, -(-hidden // WORD), dtype=torch.int64, device=weight.device)
    return SketchPlanes(planes, torch.empty(neurons, dtype=torch.float32, device=weight.device), hidden)


def build_sketch(weights: FFNWeights, bits: int, activation_bits: int = 4, outliers: int = 4) -> FFNSketch:
    """The sketch of one FFN: planes of gate and up, or of up alone where there is no gate.

    Raises:
        ValueError: bits outside 1 to 4, activation_bits outside 2 to 8, or outliers outside 0 to H.
    """
    if activation_bits not in GAUSSIAN_STEP:
        raise ValueError(f"activation_bits={activation_bits} is outside 2 to 8")
    if not 0 <= outliers <= weights.hidden:
        raise ValueError(f"outliers={outliers} is outside 0 to {weights.hidden}, the width of the input")
    gate = None if weights.gate is None else build_planes(weights.gate, bits)
    return FFNSketch(gate, build_planes(weights.up, bits), activation_bits, outliers)


def quantise_input(x: Tensor, activation_bits: int = 4, outliers: int = 4) -> InputPlanes:
    """Round each row of x [N, H] to `activation_bits` bits; its `outliers` largest entries are taken out, exact.

    The step is the best one for a Gaussian of the remaining entries' root mean square, or smaller where their
    largest needs less; what lies beyond the last level is clipped to it.
    """
    wide = x.float()
    top = 2 ** (activation_bits - 1) - 1
    # ties to the lower index, as the kernels have it
    place = wide.abs().sort(dim=1, descending=True, stable=True).indices[:, :outliers]
    value = wide.gather(1, place)
    rest = wide.scatter(1, place, 0.0)
    spread = rest.square().mean(dim=1).sqrt() * GAUSSIAN_STEP[activation_bits]
    step = torch.minimum(rest.abs().amax(dim=1) / top, spread)
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    rounded = (rest * inverse[:, None]).round().clamp(-top, top).to(torch.int64)
    return InputPlanes(_pack(rounded, activation_bits), step, rounded.sum(dim=1).int(), place, value)


def sketch_integers(x: InputPlanes, sketch: SketchPlanes) -> Tensor:
    """The integer part of the dot products: `D[n, i] = sum_j (2 q[i, j] - (2^b - 1)) X[n, j]`, int32 [N, I].

    With P = popcount this is `sum_k 2^(k+1) sum_p w_p P(q_k AND X_p) - (2^b - 1) sum_j X_j`, w_p = 2^p but
    -2^(A-1) for the last plane.
    """
    top = 2**sketch.bits - 1
    level = 2 * _unpack(sketch.planes, sketch.hidden, signed=False) - top
    rounded = _unpack(x.planes, sketch.hidden, signed=True)
    bound = top * sketch.hidden << (x.planes.shape[1] - 1)
    exact = torch.float32 if bound < 2**24 else torch.float64
    product: Tensor = rounded.to(exact) @ level.to(exact).T
    return product.int()


def sketch_dots(x: InputPlanes, sketch: SketchPlanes) -> Tensor:
    """Estimated products `W x`, float32 [N, I]: the integer part times its scales, and the outliers' part."""
    level = (2 * _unpack(sketch.planes, sketch.hidden, signed=False) - (2**sketch.bits - 1)).float()
    dots = sketch_integers(x, sketch).float() * x.step[:, None]
    for n in range(x.planes.shape[0]):
        dots[n] += level[:, x.outlier_index[n]] @ x.outlier_value[n]
    return dots * sketch.scale


def sketch_scores(x: Tensor, weights: FFNWeights, sketch: FFNSketch, importance: Tensor) -> Tensor:
    """Estimated weight of each neuron, float32 [N, I]: `|act(g^ + bias) (u^ + bias)| * importance` [N, I]."""
    rounded = quantise_input(x, sketch.activation_bits, sketch.outliers)
    a = sketch_dots(rounded, sketch.up)
    if weights.up_bias is not None:
        a = a + weights.up_bias.float()
    if sketch.gate is None:
        return activation(weights.activation, a).abs() * importance
    g = sketch_dots(rounded, sketch.gate)
    if weights.gate_bias is not None:
        g = g + weights.gate_bias.float()
    return (activation(weights.activation, g) * a).abs() * importance


def chosen_mask(index: Tensor, count: Tensor, neurons: int) -> Tensor:
    """Lists int32 [N, W], counts int32 [N] as a mask, bool [N, I]; `.any(0).sum()` is the size of the union."""
    valid = torch.arange(index.shape[1], device=index.device) < count[:, None]
    # what does not count goes to one more column
    places = torch.where(valid, index.long(), neurons)
    mask = torch.zeros(index.shape[0], neurons + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(1, places, True)[:, :neurons]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = F.linear(x, weight.float(), None if bias is None else bias.float())
    return out


def _by_row(importance: Tensor, slots: Tensor) -> Tensor:
    return importance if importance.shape[0] == 1 else importance[slots]


def _finish(
    x: Tensor,
    weights: FFNWeights,
    score: Tensor,
    wanted: Tensor,
    slots: Tensor,
    width: int,
    threshold: Tensor | None,
) -> TokenRows:
    """Choose by scores float32 [N, I] and compute the chosen exactly."""
    index, count, cut = chosen_rows(score, wanted[slots], width, None if threshold is None else threshold[slots])
    return TokenRows(_exact(x.float(), weights, index, count).to(x.dtype), index, count, cut)


def _exact(x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor) -> Tensor:
    """The FFN of x float32 [N, H] over each row's own neurons, in float32."""
    a = _linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        a = activation(weights.activation, a)
    else:
        a = activation(weights.activation, _linear(x, weights.gate, weights.gate_bias)) * a
    a = a.masked_fill(~chosen_mask(index, count, weights.neurons), 0)
    out = a @ weights.down.float()
    return out if weights.down_bias is None else out + weights.down_bias.float()


def _fitted(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """The scale [R, 1] of the least squared error that is found from multiples of `scale`."""
    best, least = scale, torch.full_like(scale, torch.inf)
    for start in STARTS:
        s = scale * start
        for _ in range(3):
            level = 2 * _code(weight, s, top) - top
            s = (weight * level).sum(dim=1, keepdim=True) / level.square().sum(dim=1, keepdim=True)
        error = (weight - s * (2 * _code(weight, s, top) - top)).square().sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    return best


def _code(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """The nearest level's number, 0 .. top, as floats; an all-zero row takes any."""
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return torch.floor((weight * inverse + (top + 1)) / 2).clamp(0, top)


def _pack(values: Tensor, bits: int) -> Tensor:
    """The lowest bits of int64 [R, H] as planes int64 [R, bits, ceil(H / 64)]."""
    hidden = values.shape[1]
    words = -(-hidden // WORD)
    values = F.pad(values, (0, words * WORD - hidden)).view(-1, words, WORD)
    place = torch.arange(WORD, device=values.device)
    return torch.stack([(((values >> k) & 1) << place).sum(dim=2) for k in range(bits)], dim=1)


def _unpack(planes: Tensor, hidden: int, *, signed: bool) -> Tensor:
    """Planes int64 [R, bits, words] as values int32 [R, H]; with `signed` the last plane counts negative."""
    rows, bits, words = planes.shape
    place = torch.arange(WORD, device=planes.device)
    values = torch.zeros(rows, hidden, dtype=torch.int32, device=planes.device)
    for k in range(bits):
        plane = ((planes[:, k, :, None] >> place) & 1).view(rows, words * WORD)[:, :hidden].int()
        values += plane * (-(2**k) if signed and k == bits - 1 else 2**k)
    return values
