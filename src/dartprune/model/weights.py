"""The weights of a layer's FFN as one row per neuron, where they can be read so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dartprune.ffn.weights import FFNWeights
from dartprune.model.calls import between, replaced, watched_globally
from dartprune.model.layer import Layer
from dartprune.model.packed_rows import packed_rows

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Exact types: a subclass may keep or use its weight in another way. True: the weight is [inputs, outputs].
_LINEAR = {
    "torch.nn.modules.linear.Linear": False,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
    "transformers.pytorch_utils.Conv1D": True,
}


class _Unreadable(Exception):
    """Why the rows of a projection cannot be read."""


def row_weights(layer: Layer) -> FFNWeights | str:
    """Views of an FFN's weights, one row per neuron; nothing is copied.

    Returns:
        FFNWeights whose matrices share storage with the model's parameters, `QuantisedRows` of a model that
        `dartprune.quantise` packed, or one line that says why the rows cannot
        be read: adapters, quantised, sharded or offloaded weights, modules with hooks or of unknown types.
    """
    try:
        _only_weights(layer)
        rows = packed_rows(layer)
        if rows is not None:
            return rows
        up, up_bias = _projection("up", layer.up)
        down, down_bias = _projection("down", layer.down)
        gate, gate_bias = (None, None) if layer.gate is None else _projection("gate", layer.gate)
        if layer.fused:
            gate, up = up.chunk(2, dim=0)
            if up_bias is not None:
                gate_bias, up_bias = up_bias.chunk(2, dim=0)
        weights = FFNWeights(
            gate, up, down.t(), gate_bias, up_bias, down_bias, activation=layer.activation, act=layer.act
        )
        _agree(weights, layer)
    except _Unreadable as why:
        return str(why)
    return weights


def _only_weights(layer: Layer) -> None:
    """Whether the weights and the activation's name are all that the FFN computes with."""
    if not layer.inline and replaced(layer.entry):
        raise _Unreadable("the FFN has a forward of its own on the instance, which reading its rows would leave out")
    for role, part in layer.skipped().items():
        why = between(part)
        if why is not None:
            raise _Unreadable(f"the {role} {why}")
    if watched_globally():
        raise _Unreadable("forward hooks for all modules are in force, which reading rows would leave out")


def _projection(role: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [outputs, inputs] and bias of a linear layer, detached views."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        raise _Unreadable(f"the {role} projection carries an adapter ({name})")
    if name not in _LINEAR:
        raise _Unreadable(f"the {role} projection is a {name}, whose weight may be packed, not a plain linear layer")
    weight = _plain(role, module, "weight")
    bias = None if module.bias is None else _plain(role, module, "bias")
    return weight.t() if _LINEAR[name] else weight, bias


def _plain(role: str, module: nn.Module, name: str) -> Tensor:
    tensor: Any = getattr(module, name)
    if tensor.is_meta:
        raise _Unreadable(f"the {name} of the {role} projection is offloaded or on the meta device")
    if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise _Unreadable(f"the {name} of the {role} projection is a {kind}: quantised or sharded, not a plain tensor")
    if tensor.layout is not torch.strided or tensor.dtype not in FLOATS:
        raise _Unreadable(f"the {name} of the {role} projection is {tensor.dtype} ({tensor.layout}), not a plain float")
    plain: Tensor = tensor.detach()
    return plain


def _agree(weights: FFNWeights, layer: Layer) -> None:
    matrices = {"gate": weights.gate, "up": weights.up, "down": weights.down}
    biases = {"gate": weights.gate_bias, "up": weights.up_bias, "down": weights.down_bias}
    present = [part for part in (*matrices.values(), *biases.values()) if part is not None]
    kinds = {(part.dtype, part.device) for part in present}
    if len(kinds) > 1:
        said = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise _Unreadable(f"the FFN's weights differ in dtype or device: {said}")
    for name, part in matrices.items():
        if part is not None and tuple(part.shape) != (layer.neurons, layer.hidden):
            raise _Unreadable(
                f"the {name} projection holds {tuple(part.shape)} weights, not {(layer.neurons, layer.hidden)}: sharded"
            )
