"""Zero the neurons that are not kept at the input of the down projection: right for any layer, saves no time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.ffn.weights import FFNWeights


class MaskedBackend:
    """The model's own FFN runs whole, whatever its layers are; the run zeroes the input of the down projection."""

    name = "masked"
    saves_time = False
    gathers = False
    wants_rows = False

    def reason_against(self, weights: FFNWeights | str, device: torch.device) -> str | None:
        """It can always be used."""
        return None

    def prepare(self, weights: FFNWeights) -> None:
        """Nothing is compiled."""

    def ffn(self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
        """Never called: the model computes, see `apply_mask`."""
        raise RuntimeError("the masked backend computes inside the model's own FFN")

    def bytes_read(self, weights: FFNWeights, kept: Sequence[Tensor]) -> int:
        """All of them."""
        return weights.neurons * weights.row_bytes


def apply_mask(a: Tensor, mask: Tensor) -> Tensor:
    """Zero the neurons outside the mask: a [B, T, I], mask bool [B, I]."""
    return a.masked_fill(~mask[:, None], 0)
