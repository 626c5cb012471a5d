"""Operators of the per-token selectors, in plain torch: right on every device, the oracle of every kernel.

Two ways of finding the neurons that one token needs (method section 4a). The *gate* reads the gate rows of a slot's
candidates and goes on with the highest; the *sketch* estimates every neuron from bit planes of the weights. Both then
choose by `chosen_rows`: the `wanted` highest scores of this very token, so that a choice depends on nothing but the
token's own row: no state, the same alone and in a batch, at any phase of decoding. What a sketch is stands in
`sketch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dartprune.ffn.backend import activation
from dartprune.ffn.sketch import AnySketch, sketch_scores
from dartprune.ffn.weights import FFNWeights


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
    sketch: AnySketch,
    slots: Tensor,
    wanted: Tensor,
    importance: Tensor,
    width: int,
    threshold: Tensor | None = None,
    errors: Tensor | None = None,
    means: Tensor | None = None,
    compensation: Tensor | None = None,
) -> TokenRows:
    """Sketch: estimate every neuron from bit planes, compute the highest exactly (method section 4a).

    Args:
        x: [N, H], any float dtype.
        weights: the FFN's weights; the activation must have a canonical name.
        sketch: of these weights: bit planes, or the high codes of nested rows.
        slots: int64 [N], the slot of each row.
        wanted: int32 [S], neurons to choose for each token of a slot.
        importance: float32 [S, I], or [1, I] for all slots alike: the norms of the down rows (0: never chosen).
        width: the most neurons that a row may choose, W of the result.
        threshold: float32 [S] or None, the least score that is chosen, in place of `wanted`.
        errors: bf16 [S, 4, I] (a plain FFN: [S, 2, I]) or None, mean and variance of each slot's errors of estimate,
            see `expected.expected_sizes`.
        means: bf16 [S, I] or None: what stands in the place of a dropped neuron's activation, for each slot.
        compensation: float32 [S, H], given with means: their product with the down matrix, without its bias. Kernels
            begin with it and give every chosen neuron its activation less its mean; here it is not needed.

    Returns:
        `TokenRows`, its index ascending.
    """
    known = None if errors is None else errors[slots]
    score = sketch_scores(x, weights, sketch, _by_row(importance, slots), known)
    return _finish(x, weights, score, wanted, slots, width, threshold, means)


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
    rank = torch.arange(neurons, dtype=torch.int64, device=scores.device)
    places = torch.where(rank < count[:, None], order, neurons).sort(dim=1).values
    places = F.pad(places, (0, max(0, width - neurons)), value=neurons)[:, :width]
    return torch.where(places < neurons, places, 0).int(), count.int(), cut


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
    means: Tensor | None = None,
) -> TokenRows:
    """Choose by scores float32 [N, I] and compute the chosen exactly; means [S, I] stand for the others."""
    index, count, cut = chosen_rows(score, wanted[slots], width, None if threshold is None else threshold[slots])
    others = 0.0 if means is None else means[slots].float()
    return TokenRows(_exact(x.float(), weights, index, count, others).to(x.dtype), index, count, cut)


def _exact(x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, others: Tensor | float) -> Tensor:
    """The FFN of x float32 [N, H] over each row's own neurons, in float32; `others` [N, I] stands for the rest."""
    a = _linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        a = activation(weights.activation, a)
    else:
        a = activation(weights.activation, _linear(x, weights.gate, weights.gate_bias)) * a
    a = torch.where(chosen_mask(index, count, weights.neurons), a, others)
    out = a @ weights.down.float()
    return out if weights.down_bias is None else out + weights.down_bias.float()
