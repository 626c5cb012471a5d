"""The FFN weights of a layer as one row per neuron, or the reason why rows cannot be read."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dartprune.ffn.weights import FFNWeights
from dartprune.model.families import Layer

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def row_weights(layer: Layer) -> FFNWeights | str:
    """Views of a layer's weights, nothing is copied; or one line that says why they cannot be read by rows."""
    modules = [layer.up, layer.down] + ([layer.gate] if layer.gate is not None else [])
    for module in modules:
        reason = _reason(module)
        if reason is not None:
            return reason
    up, up_bias = _rows(layer.up), _bias(layer.up)
    gate = _rows(layer.gate) if layer.gate is not None else None
    gate_bias = _bias(layer.gate) if layer.gate is not None else None
    if layer.fused:
        gate, up = up[: layer.neurons], up[layer.neurons :]
        if up_bias is not None:
            gate_bias, up_bias = up_bias[: layer.neurons], up_bias[layer.neurons :]
    return FFNWeights(
        gate=gate,
        up=up,
        down=_rows(layer.down).t(),
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=_bias(layer.down),
        activation=layer.activation,
        act=layer.act,
    )


def _reason(module: nn.Module) -> str | None:
    if hasattr(module, "base_layer"):
        return f"the FFN has adapters ({type(module).__module__.split('.')[0]} {type(module).__name__})"
    plain = (
        isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, _falcon_forward(module))
    ) or type(module) is Conv1D
    weight = getattr(module, "weight", None)
    if not plain or not isinstance(weight, Tensor):
        return f"the FFN's projections are {type(module).__name__}, not plain linear layers"
    if type(weight.data) is not Tensor:
        return f"the FFN's weights are {type(weight.data).__name__}, not plain tensors"
    if weight.is_meta:
        return "the FFN's weights are offloaded"
    if weight.dtype not in DTYPES:
        return f"the FFN's weights are {str(weight.dtype).removeprefix('torch.')}"
    return None


def _falcon_forward(module: nn.Module) -> object:
    # FalconLinear writes out the very same product
    return type(module).forward if type(module).__name__ == "FalconLinear" else None


def _rows(module: nn.Module) -> Tensor:
    """The weight as [out, in], without gradient."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.t() if type(module) is Conv1D else weight


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
