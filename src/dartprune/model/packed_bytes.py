"""Modules of a quantised model whose weights are bytes with one scale a row: linear layers, embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dartprune.ffn.backend import outside_graphs
from dartprune.model.packed import BLOCK, Packed, has_kernels, scaled, wants_gradient

FEW_BYTES = 8  # inputs of one call that our kernel serves; more are torch's kernel's
WHOLE = 16  # torch's kernel of bytes ends the process where rows of bf16 weights are no multiple of this


def bytes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [O, K] as int8, and its scales [O] in its own dtype."""
    scale = (weight.detach().float().abs().amax(1) / 127).clamp_min(1e-30).to(weight.dtype)
    weight8 = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
    step = max(1, BLOCK // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        part = slice(first, first + step)
        weight8[part] = (weight[part].float() / scale[part].float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return weight8, scale


@outside_graphs
def _few_bytes(x: Tensor, weight8: Tensor, scale: Tensor) -> Tensor:
    """Some inputs [N, K] times bytes [O, K] with one scale a row: as torch's kernel, and nearer to the bandwidth."""
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import floats
    from dartprune.ffn.cpu.threads import use_threads

    out = torch.empty(x.shape[0], weight8.shape[0], dtype=torch.float32, device="cpu")
    wide = x.detach().float().contiguous().numpy()
    kernels.linear(wide, weight8.numpy(), floats(None), use_threads(), out.numpy())
    return out.mul_(scale)


_int8 = torch.ops.aten._weight_int8pack_mm


def _shaped(out: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A layer's output [N, O] as it belongs to its input x [..., K]."""
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])


class ByteLinear(Packed):
    """A linear layer of 8 bits with one scale a row, as torch's own CPU kernel takes it."""

    weight8: Tensor
    scale: Tensor

    def __init__(self, weight8: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight8.shape
        self.weights = weight8.numel()
        self.keep(weight8=weight8, scale=scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output of x [..., in_features]."""
        flat, scale = x.reshape(-1, self.in_features), self.scale
        with_gradient = wants_gradient(x)
        if has_kernels() and flat.shape[0] <= FEW_BYTES and not with_gradient:
            return _shaped(_few_bytes(flat, self.weight8, scale), self.bias, x)
        given = flat.to(scale.dtype)
        if with_gradient or self.in_features % WHOLE:
            return _shaped(F.linear(given, self.weight8.to(scale.dtype)) * scale, self.bias, x)
        out: Tensor = _int8(given, self.weight8, scale)
        return _shaped(out, self.bias, x)

    def description(self) -> dict[str, Any]:
        """See `Packed.description`."""
        return {"kind": "bytes"}

    def extra_repr(self) -> str:
        """What torch prints."""
        return f"in_features={self.in_features}, out_features={self.out_features}, 8 bits"


class ByteEmbedding(Packed):
    """An embedding of 8 bits with one scale a row; shares its rows with a tied head.

    factor: what every vector is multiplied with (Gemma), 1 otherwise.
    """

    weight8: Tensor
    scale: Tensor

    def __init__(self, weight8: Tensor, scale: Tensor, factor: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight8.shape
        self.weights = weight8.numel()
        self.factor = factor
        self.keep(weight8=weight8, scale=scale)

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors of token ids, [..., embedding_dim]."""
        return scaled(self.weight8[ids].to(self.scale.dtype) * self.scale[ids][..., None], self.factor)

    def description(self) -> dict[str, Any]:
        """See `Packed.description`."""
        return {"kind": "embedding", "factor": self.factor}

    def extra_repr(self) -> str:
        """What torch prints."""
        return f"{self.num_embeddings}, {self.embedding_dim}, 8 bits"
