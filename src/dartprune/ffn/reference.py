"""The oracle: gather the kept rows, multiply. Correct for everything, fast for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.ffn.backend import activation, exactly, row_bytes, same_shape
from dartprune.ffn.weights import FFNWeights


@torch.library.custom_op("dartprune::ffn_reference", mutates_args=())
@exactly
def _ffn_reference(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    slots: Tensor,
    act: str,
) -> Tensor:
    out = x.new_empty(x.shape)
    wide = x.to(up.dtype)
    for slot in slots.unique().tolist():
        rows = (slots == slot).nonzero()[:, 0]
        kept = index[slot, : int(count[slot])].long()
        part = wide[rows]

        def project(weight: Tensor, bias: Tensor | None, part: Tensor = part, kept: Tensor = kept) -> Tensor:
            return torch.nn.functional.linear(part, weight[kept], None if bias is None else bias[kept])

        a = project(up, up_bias)
        a = activation(act, a) if gate is None else activation(act, project(gate, gate_bias)) * a
        y = a @ down[kept]
        out[rows] = (y if down_bias is None else y + down_bias).to(x.dtype)
    return out


_ffn_reference.register_fake(same_shape)


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
        out: Tensor = _ffn_reference(x, *weights.tensors(), index, count, slots, weights.activation)
        return out

    def bytes_read(self, weights: FFNWeights, kept: Sequence[Tensor]) -> int:
        """Every sequence gathers its own rows."""
        return sum(rows.shape[0] for rows in kept) * row_bytes(weights)
