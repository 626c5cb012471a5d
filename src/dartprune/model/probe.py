"""What a linear layer's weights are, found by sending inputs through it: for quantised, adapted or offloaded layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dartprune.ffn.weights import FFNWeights
from dartprune.model.calls import quietly
from dartprune.model.layer import Layer

_ROWS = 256  # unit vectors of one call
_SIGNS = 64  # random inputs that the size of a layer is estimated from


@torch.no_grad()
def probed_bias(module: nn.Module, inputs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a linear layer gives for zero, float32 [outputs]."""
    out: Tensor = quietly(module, torch.zeros(1, inputs, dtype=dtype, device=device))
    return out[0].float()


@torch.no_grad()
def probed_columns(
    module: nn.Module, inputs: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The columns of a linear layer's weight, a block at a time, rounded as the layer rounds its output.

    Args:
        module: any layer that is linear but for its bias.
        inputs: its width.
        device: where it computes.
        dtype: of its inputs.

    Yields:
        which inputs, and float32 [block, outputs] of their weights.
    """
    bias = probed_bias(module, inputs, device, dtype)
    for first in range(0, inputs, _ROWS):
        part = slice(first, min(inputs, first + _ROWS))
        unit = torch.zeros(part.stop - first, inputs, dtype=dtype, device=device)
        unit.diagonal(first).fill_(1)
        yield part, quietly(module, unit).float() - bias


def row_norms(matrix: Tensor) -> Tensor:
    """The norm of each row of a matrix of any float dtype, float32."""
    wide = torch.promote_types(matrix.dtype, torch.float32)  # torch narrows nothing while it sums
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=wide)
    return norms.float()


@torch.no_grad()
def down_norms(layer: Layer, weights: FFNWeights | str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The norm of each neuron's column of the down projection, float32 [I]; probed where rows cannot be read."""
    if not isinstance(weights, str):
        return row_norms(weights.down)
    norms = torch.empty(layer.neurons, dtype=torch.float32, device=device)
    for part, columns in probed_columns(layer.down, layer.neurons, device, dtype):
        norms[part] = torch.linalg.vector_norm(columns, dim=1)
    return norms


@torch.no_grad()
def down_square(layer: Layer, weights: FFNWeights | str, device: torch.device, dtype: torch.dtype) -> float:
    """Mean squared norm of the down projection's columns; waits for the device.

    Where rows cannot be read it is estimated from what the layer gives for 64 rows of random signs, always the same:
    `E |W s|^2` is the sum of the squares of all weights. A matrix of rank over 100 comes out within a few percent.
    """
    if not isinstance(weights, str):
        stored = weights.down if weights.down.stride(1) == 1 else weights.down.t()  # as it lies in memory
        total = torch.zeros((), dtype=torch.float32, device=stored.device)
        for block in stored.split(_ROWS):
            values = block.float().reshape(-1)
            total += values @ values  # eight times as quick as a norm that converts as it goes
        return float(total) / layer.neurons
    generator = torch.Generator("cpu").manual_seed(0)
    signs = torch.randint(0, 2, (_SIGNS, layer.neurons), generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
    bias = probed_bias(layer.down, layer.neurons, device, dtype)
    out = layer.projected(signs.to(device, dtype)).float() - bias
    return float(out.square().sum(1).mean()) / layer.neurons
