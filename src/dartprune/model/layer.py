"""A model taken apart: its decoder layers and, in each, the modules of the FFN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Layer:
    """The FFN of one decoder layer, by its modules.

    entry: receives x, the FFN's input: the FFN module, or its first projection where there is no module (inline).
    gate: None for a plain FFN and for a fused one, in which `up` gives gate and up, gate first.
    norm: its input is the residual stream y before the FFN; None where y is the entry's own input.
    contribution: its output, times `scale`, is what the FFN adds to the residual stream.
    attention_output: the output projection of the layer's attention.
    """

    index: int
    entry: nn.Module
    inline: bool
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    fused: bool
    activation: str
    act: Callable[[Tensor], Tensor]
    norm: nn.Module | None
    contribution: nn.Module
    scale: float
    attention_output: nn.Module
    hidden: int
    neurons: int

    @property
    def gated(self) -> bool:
        """Whether a gate multiplies the up projection."""
        return self.gate is not None or self.fused

    @property
    def matrices(self) -> int:
        """Rows of weights that one neuron owns: 3 with a gate, else 2."""
        return 3 if self.gated else 2

    @property
    def weights(self) -> int:
        """Weights of the FFN, biases left out."""
        return self.matrices * self.neurons * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of the projections' weights, whatever they are kept in; biases left out."""
        modules = [self.up, self.down] if self.gate is None else [self.gate, self.up, self.down]
        parameters = {id(p): p for module in modules for p in module.parameters() if p.dim() > 1}
        return sum(p.numel() * p.element_size() for p in parameters.values())

    def gate_activations(self, x: Tensor) -> Tensor:
        """`act(W_gate x)`, [..., I], of an FFN that has a gate."""
        if self.gate is not None:
            return self.act(self.gate(x))
        return self.act(self.up(x).chunk(2, dim=-1)[0])

    def activations(self, x: Tensor) -> Tensor:
        """The input of the down projection, [..., I], for FFN inputs [..., H]; runs the modules, whatever they are."""
        up: Tensor = self.up(x)
        if self.fused:
            gate, up = up.chunk(2, dim=-1)
            return up * self.act(gate)
        if self.gate is not None:
            return self.act(self.gate(x)) * up
        return self.act(up)


@dataclass(frozen=True)
class Decoder:
    """A model taken apart: family row, how it was found (`table` or `structure`), layers, width H."""

    family: str
    recognised: str
    layers: tuple[Layer, ...]
    hidden: int


def sizes(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, an adapter around one or a quantised one; None if it is none of these."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return sizes(module._orig_mod)
    for names in (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures")):
        pair = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in pair):
            return pair  # type: ignore[return-value]
    return None


# Exact types: a subclass may compute anything.
_BY_TYPE = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.ReLUSquaredActivation": "relu2",
}
_BY_FUNCTION: tuple[tuple[Any, str], ...] = (
    (F.silu, "silu"),
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
)


def activation_name(act: Any) -> str:
    """The canonical name of an activation, from the callable itself; "other" for what has none."""
    for function, name in _BY_FUNCTION:
        if act is function:
            return name
    if isinstance(act, functools.partial) and act.func is F.gelu and not act.args:
        return _gelu(act.keywords.get("approximate", "none"))
    if type(act) is nn.GELU:
        return _gelu(act.approximate)
    return _BY_TYPE.get(f"{type(act).__module__}.{type(act).__qualname__}", "other")


def _gelu(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"
