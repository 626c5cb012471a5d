"""The operators of `selector_ops` as custom operators: the form that every backend without kernels of its own uses."""

from __future__ import annotations

import torch
from torch import Tensor

from dartprune.ffn import selector_ops as selector_ops
from dartprune.ffn.backend import activation, exactly
from dartprune.ffn.selector_ops import FFNSketch, SketchPlanes, TokenRows
from dartprune.ffn.weights import FFNWeights

_Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # of a TokenRows


def gated_rows(
    x: Tensor,
    weights: FFNWeights,
    index: Tensor,
    count: Tensor,
    slots: Tensor,
    wanted: Tensor,
    threshold: Tensor | None = None,
    importance: Tensor | None = None,
) -> TokenRows:
    """See `selector_ops.gated_rows`."""
    parts: _Parts = _gated(
        x, *weights.tensors(), index, count, slots, wanted, threshold, importance, weights.activation
    )
    return TokenRows(*parts)


def sketched_rows(
    x: Tensor,
    weights: FFNWeights,
    sketch: FFNSketch,
    slots: Tensor,
    wanted: Tensor,
    importance: Tensor,
    width: int,
    threshold: Tensor | None = None,
) -> TokenRows:
    """See `selector_ops.sketched_rows`."""
    gate = sketch.gate
    parts: _Parts = _sketched(
        x,
        *weights.tensors(),
        None if gate is None else gate.planes,
        None if gate is None else gate.scale,
        sketch.up.planes,
        sketch.up.scale,
        sketch.activation_bits,
        sketch.outliers,
        slots,
        wanted,
        threshold,
        importance,
        width,
        weights.activation,
    )
    return TokenRows(*parts)


def estimated(x: Tensor, planes: SketchPlanes, activation_bits: int, outliers: int) -> Tensor:
    """Products of x [N, H] with a sketched matrix, float32 [N, I]; see `selector_ops.sketch_dots`."""
    dots: Tensor = _estimated(x, planes.planes, planes.scale, activation_bits, outliers)
    return dots


def _weights(parts: tuple[Tensor | None, ...], act: str) -> FFNWeights:
    gate, up, down, gate_bias, up_bias, down_bias = parts
    assert up is not None and down is not None
    return FFNWeights(
        gate, up, down, gate_bias, up_bias, down_bias, activation=act, act=lambda value: activation(act, value)
    )


def _fresh(rows: TokenRows) -> _Parts:
    return rows.out, rows.index, rows.count, rows.cut


@torch.library.custom_op("dartprune::gated_rows_reference", mutates_args=())
@exactly
def _gated(
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
    wanted: Tensor,
    threshold: Tensor | None,
    importance: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = _weights((gate, up, down, gate_bias, up_bias, down_bias), act)
    return _fresh(selector_ops.gated_rows(x, weights, index, count, slots, wanted, threshold, importance))


@_gated.register_fake
def _(x: Tensor, *others: object) -> _Parts:
    lists = others[6]
    assert isinstance(lists, Tensor)
    return like(x, lists.shape[1])


@torch.library.custom_op("dartprune::sketched_rows_reference", mutates_args=())
@exactly
def _sketched(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_planes: Tensor | None,
    gate_scale: Tensor | None,
    up_planes: Tensor,
    up_scale: Tensor,
    activation_bits: int,
    outliers: int,
    slots: Tensor,
    wanted: Tensor,
    threshold: Tensor | None,
    importance: Tensor,
    width: int,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = _weights((gate, up, down, gate_bias, up_bias, down_bias), act)
    hidden = x.shape[1]
    first = None if gate_planes is None or gate_scale is None else SketchPlanes(gate_planes, gate_scale, hidden)
    sketch = FFNSketch(first, SketchPlanes(up_planes, up_scale, hidden), activation_bits, outliers)
    return _fresh(selector_ops.sketched_rows(x, weights, sketch, slots, wanted, importance, width, threshold))


@_sketched.register_fake
def _(x: Tensor, *others: object) -> _Parts:
    width = others[16]
    assert isinstance(width, (int, torch.SymInt))
    return like(x, width)


@torch.library.custom_op("dartprune::estimated", mutates_args=())
@exactly
def _estimated(x: Tensor, planes: Tensor, scale: Tensor, activation_bits: int, outliers: int) -> Tensor:
    rounded = selector_ops.quantise_input(x, activation_bits, outliers)
    return selector_ops.sketch_dots(rounded, SketchPlanes(planes, scale, x.shape[1]))


@_estimated.register_fake
def _(x: Tensor, planes: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape[0], planes.shape[0], dtype=torch.float32)


def like(x: Tensor, width: int | torch.SymInt) -> _Parts:
    """What the operators of every backend give for x [N, H], not filled; for torch.compile, and as room for results."""
    rows = x.shape[0]
    index, count = x.new_empty(rows, width, dtype=torch.int32), x.new_empty(rows, dtype=torch.int32)
    return x.new_empty(x.shape), index, count, x.new_empty(rows, dtype=torch.float32)
