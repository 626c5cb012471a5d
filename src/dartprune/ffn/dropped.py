"""What neurons give when a token drops them: the mean that stands in their place (docs/token-selection.md).

A token that drops neuron i adds nothing of it, although the neuron's mean over such tokens is not 0. With `c_i`, that
mean over tokens of the context, in the place of every dropped neuron, the output is

    sum_chosen a_i W_i + sum_dropped c_i W_i = sum_chosen (a_i - c_i) W_i + sum_all c_i W_i,    W_i = W_down[:, i],

and the second sum is the same for all tokens of a sequence, so that no row is read for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLED = 256  # neurons, at least, that tell where a token's cut lies: to sort thousands takes as long as the estimates


@dataclass(frozen=True)
class Drops:
    """Which neurons tokens drop: importance float32 [1, I] of their scores, kept int32 [B] neurons of each line."""

    importance: Tensor
    kept: Tensor


def dropped_sums(a: Tensor, scores: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
    """What neurons gave in the tokens that drop them, and in how many: float32 [B, 2, I].

    Args:
        a: exact activations, [B, m, I].
        scores: what each token ranks the neurons by, float32 [B, m, I], not negative.
        kept: neurons that a token of each line keeps, [B].
        weight: float32 [B, m] of 0 and 1; what weighs 0 may hold anything.
    """
    some = scores[..., :: max(1, scores.shape[-1] // SAMPLED)]
    place = (kept * (some.shape[-1] / scores.shape[-1])).round().long().clamp(1, some.shape[-1]) - 1
    cut = some.sort(dim=-1, descending=True).values.gather(-1, place[:, None, None].expand(-1, some.shape[1], 1))
    # a neuron that scores 0 is never chosen, and a token that does not count drops nothing
    dropped = scores < torch.where(weight[..., None] > 0, cut.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    sums = torch.where(dropped, a.float(), 0.0).sum(1)
    return torch.stack((sums, dropped.sum(1).float()), dim=1)
