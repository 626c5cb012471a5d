"""Modules of a quantised model whose weights are rows of few bits: an FFN's projections, linear layers, embeddings."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dartprune.ffn.backend import outside_graphs
from dartprune.ffn.quantised import QuantisedRows, put_parts
from dartprune.ffn.row_format import RowFormat, lines, pack_fields
from dartprune.model.layer import Layer
from dartprune.model.packed import BLOCK, Packed, has_kernels, scaled, wants_gradient

FEW = 64  # inputs of one call that the row kernels serve; more are multiplied with unpacked blocks
ALONE = 4  # bits of a linear layer in rows that is no part of an FFN
VOCABULARY = 6  # and of those of an embedding and a head, where that is fewer bytes by a tenth than 8 bits


class PackedRows(QuantisedRows):
    """Rows of a quantised model: unpacked by a kernel where there is one."""

    def unpacked(self, role: str, first: int = 0, last: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """See `QuantisedRows.unpacked`."""
        return _unpacked(self, role, first, last, dtype or self.original)


def bare_rows(head: Tensor, tail: Tensor, layout: RowFormat, dtype: torch.dtype) -> PackedRows:
    """Rows of no FFN in particular: without biases, with an activation that nobody calls."""
    return PackedRows(head, tail, layout, (None, None, None), "other", F.silu, dtype)


def saves_vocabulary(hidden: int) -> bool:
    """Whether an embedding and a head of that width are smaller in rows than in bytes, what fills rows up counted."""
    layout = RowFormat(hidden, False, ALONE, VOCABULARY - ALONE)
    return layout.head + lines(layout.codes(layout.low)) < 0.9 * hidden


def lone_rows(weight: Tensor, bits: int = ALONE) -> PackedRows:
    """A matrix [O, K] that is no FFN's, rounded to 4 or 6 bits in groups of 32 along K, a row for each output."""
    from dartprune.ffn.cpu.rounding import rounded

    layout = RowFormat(weight.shape[1], False, ALONE, bits - ALONE)
    head = torch.zeros(weight.shape[0], layout.head, dtype=torch.uint8, device="cpu")
    tail = torch.zeros(weight.shape[0], lines(layout.codes(layout.low)), dtype=torch.uint8, device="cpu")
    step = max(1, BLOCK // layout.width)
    for first in range(0, weight.shape[0], step):
        part = slice(first, first + step)
        codes, scales = rounded(weight[part], layout, bits)
        put_parts(head[part], [pack_fields(codes >> layout.low, ALONE, layout), scales])
        if layout.low:
            put_parts(tail[part], [pack_fields(codes & ((1 << layout.low) - 1), layout.low, layout)])
    return bare_rows(head, tail, layout, weight.dtype)


class RowProjection(Packed):
    """A linear layer in rows: a projection of an FFN, whose projections all hold the same two tensors, or one alone.

    role: gate, up, gate_up (both in one, gate first) or down; up for a layer that is alone, whose rows are its outputs.
    """

    head: Tensor
    tail: Tensor

    def __init__(self, rows: QuantisedRows, role: str, bias: Tensor | None) -> None:
        super().__init__()
        self.keep(head=rows.head, tail=rows.tail)
        self.layout, self.role, self.dtype = rows.layout, role, rows.dtype
        self.is_alone = rows.tail.shape[1] < rows.layout.tail
        wide = rows.neurons * (2 if role == "gate_up" else 1)
        self.in_features, self.out_features = (wide, rows.hidden) if role == "down" else (rows.hidden, wide)
        self.weights = wide * rows.hidden
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def rows(self) -> PackedRows:
        """The rows, without biases."""
        return bare_rows(self.head, self.tail, self.layout, self.dtype)

    def description(self) -> dict[str, Any]:
        """See `Packed.description`."""
        return {"kind": "rows", "role": self.role, **_form_of(self)}

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x [..., in_features]."""
        flat = x.reshape(-1, x.shape[-1])
        with_gradient = wants_gradient(x)
        if self.role == "gate_up":
            out = torch.cat([self._product(flat, role, with_gradient) for role in ("gate", "up")], dim=-1)
        else:
            out = self._product(flat, self.role, with_gradient)
        if self.bias is not None:
            out = out + self.bias
        shaped: Tensor = out.reshape(*x.shape[:-1], self.out_features)
        return shaped

    def _product(self, x: Tensor, role: str, with_gradient: bool) -> Tensor:
        if has_kernels() and x.shape[0] <= FEW and not with_gradient:
            return _few(x, self.rows(), role)
        return _many(x, self.rows(), role)

    def extra_repr(self) -> str:
        """What torch prints."""
        kind = f"{self.layout.bits} bits{', nested' if self.layout.low and not self.is_alone else ''}"
        return f"in_features={self.in_features}, out_features={self.out_features}, role={self.role}, {kind}"


class RowEmbedding(Packed):
    """An embedding in rows; shares them with a tied head.

    factor: what every vector is multiplied with (Gemma), 1 otherwise.
    """

    head: Tensor
    tail: Tensor

    def __init__(self, rows: QuantisedRows, factor: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows.neurons, rows.hidden
        self.weights = rows.neurons * rows.hidden
        self.layout, self.dtype, self.factor = rows.layout, rows.dtype, factor
        self.keep(head=rows.head, tail=rows.tail)

    def rows(self, ids: Tensor | None = None) -> PackedRows:
        """The rows, or those of token ids [N]."""
        parts = (self.head, self.tail) if ids is None else (self.head[ids], self.tail[ids])
        return bare_rows(*parts, self.layout, self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors of token ids, [..., embedding_dim]."""
        flat = ids.reshape(-1)
        found = _picked(self, flat) if len(flat) <= FEW else self.rows(flat).unpacked("up")
        return scaled(found.view(*ids.shape, self.embedding_dim), self.factor)

    def description(self) -> dict[str, Any]:
        """See `Packed.description`."""
        return {"kind": "row embedding", **_form_of(self), "factor": self.factor}

    def extra_repr(self) -> str:
        """What torch prints."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.layout.bits} bits"


def _form_of(module: RowProjection | RowEmbedding) -> dict[str, Any]:
    return {"layout": list(astuple(module.layout)), "dtype": str(module.dtype).removeprefix("torch.")}


@outside_graphs
def _few(x: Tensor, rows: QuantisedRows, role: str) -> Tensor:
    """Some inputs [N, ...] by the row kernels."""
    from dartprune.ffn.cpu import quantised

    return quantised.down_product(x, rows) if role == "down" else quantised.products(x, rows, role)


def _many(x: Tensor, rows: QuantisedRows, role: str) -> Tensor:
    """Any number of inputs by matrix products with one unpacked block after another."""
    step = max(1, BLOCK // rows.layout.width)
    blocks = [(first, min(rows.neurons, first + step)) for first in range(0, rows.neurons, step)]
    if role != "down":
        return torch.cat([F.linear(x, rows.unpacked(role, *block, x.dtype)) for block in blocks], dim=-1)
    out = x.new_zeros(x.shape[0], rows.hidden, dtype=torch.float32)
    for first, last in blocks:
        out = out + x[:, first:last] @ rows.unpacked(role, first, last, x.dtype)
    return out.to(x.dtype)


@outside_graphs
def _picked(embedding: RowEmbedding, ids: Tensor) -> Tensor:
    """The vectors of a few token ids: without taking their rows together first."""
    if has_kernels():
        from dartprune.ffn.cpu import quantised
        from dartprune.ffn.cpu.arrays import WORDS

        if embedding.dtype in WORDS:
            return quantised.picked(embedding.rows(), ids.long().contiguous(), embedding.dtype)
    return embedding.rows(ids).unpacked("up")


@outside_graphs
def _unpacked(rows: PackedRows, role: str, first: int, last: int | None, dtype: torch.dtype) -> Tensor:
    if has_kernels():
        from dartprune.ffn.cpu import quantised
        from dartprune.ffn.cpu.arrays import WORDS

        if dtype in WORDS:
            return quantised.unpacked(rows, role, first, last, dtype)
    return QuantisedRows.unpacked(rows, role, first, last, dtype)


def packed_rows(layer: Layer) -> QuantisedRows | None:
    """The rows of a layer whose projections `dartprune.quantise` packed together; None for any other."""
    up, down, gate = layer.up, layer.down, layer.gate
    if not (isinstance(up, RowProjection) and isinstance(down, RowProjection)):
        return None
    if not (gate is None or isinstance(gate, RowProjection)):
        return None
    parts = [part for part in (gate, up, down) if part is not None]
    if len({(part.head.data_ptr(), part.tail.data_ptr()) for part in parts}) != 1:
        return None
    gate_bias, up_bias = None if gate is None else _detached(gate.bias), _detached(up.bias)
    if layer.fused and up_bias is not None:
        gate_bias, up_bias = up_bias.chunk(2)
    biases = gate_bias, up_bias, _detached(down.bias)
    return PackedRows(up.head, up.tail, up.layout, biases, layer.activation, layer.act, up.dtype)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
