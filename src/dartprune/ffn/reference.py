"""The oracle: gather the kept rows, multiply. Correct for everything, fast for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.ffn.operators import ffn_operator
from dartprune.ffn.weights import FFNWeights


@ffn_operator("ffn_reference")
def _pruned_ffn(x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    wide = x.to(weights.up.dtype)
    for slot in slots.unique().tolist():
        rows = (slots == slot).nonzero()[:, 0]
        kept = index[slot, : int(count[slot])].long()
        part = wide[rows]

        def project(weight: Tensor, bias: Tensor | None, part: Tensor = part, kept: Tensor = kept) -> Tensor:
            return torch.nn.functional.linear(part, weight[kept], None if bias is None else bias[kept])

        a = project(weights.up, weights.up_bias)
        a = weights.act(a) if weights.gate is None else weights.act(project(weights.gate, weights.gate_bias)) * a
        y = a @ weights.down[kept]
        out[rows] = (y if weights.down_bias is None else y + weights.down_bias).to(x.dtype)
    return out


class ReferenceBackend:
    """Gathers the kept rows of each sequence into new matrices and multiplies with these."""

    name = "reference"
    saves_time = False
    gathers = True
    wants_rows = False

    def reason_against(self, weights: FFNWeights | str, device: torch.device) -> str | None:
        """None for weights whose rows can be read and activations with a canonical name."""
        if isinstance(weights, str):
            return weights
        if weights.activation == "other":
            return "the activation has no canonical form"
        return None

    def prepare(self, weights: FFNWeights) -> None:
        """Nothing is compiled."""

    def ffn(self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
        """Compute the pruned FFN of x [N, H]; see `Backend.ffn`."""
        return _pruned_ffn(x, weights, index, count, slots)

    def bytes_read(self, weights: FFNWeights, kept: Sequence[Tensor]) -> int:
        """Every sequence gathers its own rows."""
        return sum(rows.shape[0] for rows in kept) * weights.row_bytes
