"""The modules of a quantised model: rows of 4 or 8 bits, or bytes with one scale a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dartprune.errors import UserError
from dartprune.ffn.backend import outside_graphs
from dartprune.ffn.quantised import QuantisedRows, put_parts
from dartprune.ffn.row_format import RowFormat, pack_fields
from dartprune.model.layer import Layer

FEW = 16  # inputs of one call that the row kernels serve; more are multiplied with unpacked blocks
FEW_BYTES = 8  # the same for layers of bytes; more are torch's kernel's
WHOLE = 16  # torch's kernel of bytes ends the process where rows of bf16 weights are no multiple of this
BLOCK = 1 << 22  # weights that are unpacked at a time
ALONE = 4  # bits of a linear layer in rows that is no part of an FFN


class Packed(nn.Module, ABC):
    """Base: weights that are computed on the CPU only, kept out of state dicts.

    role: which of the weights that its tensors stand for are its own.  weights: how many these are.
    """

    role: str = "up"
    weights: int

    def keep(self, **tensors: Tensor) -> None:
        """Register packed tensors."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What `restored` must know beside the tensors, in plain values."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if fn(torch.empty(0, dtype=torch.uint8, device="cpu")).device.type != "cpu":
            raise UserError("a quantised model computes on the CPU: move the original elsewhere and do not quantise it")
        moved: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved


class PackedRows(QuantisedRows):
    """Rows of a quantised model: unpacked by a kernel where there is one."""

    def unpacked(self, role: str, first: int = 0, last: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """See `QuantisedRows.unpacked`."""
        return _unpacked(self, role, first, last, dtype or self.original)


def _bare(head: Tensor, tail: Tensor, layout: RowFormat, dtype: torch.dtype) -> PackedRows:
    """Rows of no FFN in particular: without biases, with an activation that nobody calls."""
    return PackedRows(head, tail, layout, (None, None, None), "other", F.silu, dtype)


def _wants_gradient(x: Tensor) -> bool:
    """Whether a gradient is to pass to an input: neither our kernels nor torch's have one."""
    return torch.is_grad_enabled() and x.requires_grad


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
        self.is_alone = not rows.tail.shape[1]
        wide = rows.neurons * (2 if role == "gate_up" else 1)
        self.in_features, self.out_features = (wide, rows.hidden) if role == "down" else (rows.hidden, wide)
        self.weights = wide * rows.hidden
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @staticmethod
    def alone(weight: Tensor, bias: Tensor | None) -> RowProjection:
        """A linear layer of a weight [O, K], rounded to 4 bits in groups of 32 along its inputs."""
        from dartprune.ffn.cpu.rounding import rounded

        layout = RowFormat(weight.shape[1], False, ALONE, 0)
        codes, scales = rounded(weight, layout, ALONE)
        head = torch.zeros(weight.shape[0], layout.head, dtype=torch.uint8, device="cpu")
        put_parts(head, [pack_fields(codes, ALONE, layout), scales])
        tail = torch.empty(weight.shape[0], 0, dtype=torch.uint8, device="cpu")
        return RowProjection(_bare(head, tail, layout, weight.dtype), "up", bias)

    def rows(self) -> PackedRows:
        """The rows, without biases."""
        return _bare(self.head, self.tail, self.layout, self.dtype)

    def description(self) -> dict[str, Any]:
        """See `Packed.description`."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"kind": "rows", "role": self.role, "layout": list(astuple(self.layout)), "dtype": dtype}

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x [..., in_features]."""
        flat = x.reshape(-1, x.shape[-1])
        with_gradient = _wants_gradient(x)
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
        kind = f"{self.layout.bits} bits{', nested' if self.layout.low else ''}"
        return f"in_features={self.in_features}, out_features={self.out_features}, role={self.role}, {kind}"


def has_kernels() -> bool:
    """Whether the row kernels can be used: they need Numba."""
    import importlib.util

    return importlib.util.find_spec("numba") is not None


@outside_graphs
def _few(x: Tensor, rows: QuantisedRows, role: str) -> Tensor:
    """Some inputs [N, ...] by the row kernels."""
    from dartprune.ffn.cpu import quantised

    return quantised.down_product(x, rows) if role == "down" else quantised.products(x, rows, role)


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
def _unpacked(rows: PackedRows, role: str, first: int, last: int | None, dtype: torch.dtype) -> Tensor:
    if has_kernels():
        from dartprune.ffn.cpu import quantised
        from dartprune.ffn.cpu.arrays import WORDS

        if dtype in WORDS:
            return quantised.unpacked(rows, role, first, last, dtype)
    return QuantisedRows.unpacked(rows, role, first, last, dtype)


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
        with_gradient = _wants_gradient(x)
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
        out = self.weight8[ids].to(self.scale.dtype) * self.scale[ids][..., None]
        return out if self.factor == 1.0 else out * torch.tensor(self.factor, dtype=out.dtype, device="cpu")

    def description(self) -> dict[str, Any]:
        """See `Packed.description`."""
        return {"kind": "embedding", "factor": self.factor}

    def extra_repr(self) -> str:
        """What torch prints."""
        return f"{self.num_embeddings}, {self.embedding_dim}, 8 bits"


def bytes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [O, K] as int8, and its scales [O] in its own dtype."""
    scale = (weight.detach().float().abs().amax(1) / 127).clamp_min(1e-30).to(weight.dtype)
    weight8 = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
    step = max(1, BLOCK // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        part = slice(first, first + step)
        weight8[part] = (weight[part].float() / scale[part].float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return weight8, scale


def restored(description: dict[str, Any], tensors: dict[str, Tensor]) -> Packed:
    """The module whose `description` and tensors, by name, were kept."""
    kind, bias = description["kind"], tensors.get("bias")
    if kind == "rows":
        layout, dtype = RowFormat(*description["layout"]), getattr(torch, description["dtype"])
        module: Packed = RowProjection(
            _bare(tensors["head"], tensors["tail"], layout, dtype), description["role"], bias
        )
    elif kind == "bytes":
        module = ByteLinear(tensors["weight8"], tensors["scale"], bias)
    elif kind == "embedding":
        module = ByteEmbedding(tensors["weight8"], tensors["scale"], description["factor"])
    else:
        raise ValueError(f"unknown kind of packed module {kind!r}")
    return module


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
