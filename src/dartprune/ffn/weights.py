"""The weights of one FFN, seen as one row per neuron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FFNWeights:
    """Views of an FFN's weights in which row i of every matrix belongs to neuron i; nothing is copied.

    gate: [I, H], or None for a plain FFN.  up: [I, H].  down: [I, H], the down projection transposed.
    gate_bias, up_bias: [I] or None.  down_bias: [H] or None.
    activation: canonical name (silu, gelu, gelu_tanh, relu, relu2, quick_gelu, other); act: the function itself.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    act: Callable[[Tensor], Tensor]

    def tensors(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """gate, up, down and the three biases, in the order in which the operators take them."""
        return self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """A tensor that a gradient would reach."""
        return (self.up,)

    @property
    def row_bytes(self) -> int:
        """Bytes of all the rows that belong to one neuron."""
        return self.matrices * self.hidden * self.up.element_size()

    @property
    def kind(self) -> str:
        """What a weight is kept in."""
        return str(self.up.dtype).removeprefix("torch.")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.up.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.up.device

    @property
    def neurons(self) -> int:
        """Number of neurons, I."""
        return int(self.up.shape[0])

    @property
    def hidden(self) -> int:
        """Width of the residual stream, H."""
        return int(self.up.shape[1])

    @property
    def matrices(self) -> int:
        """Rows that one neuron owns: 3 with a gate, else 2."""
        return 3 if self.gate is not None else 2
