"""Per-token selectors on the CPU: the operators of `selector_ops` with Numba kernels behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from dartprune.ffn.cpu import quantised
from dartprune.ffn.cpu.arrays import error_array, others_arrays, weight_arrays
from dartprune.ffn.cpu.threads import use_threads
from dartprune.ffn.operators import gated_operator, sketched_operator
from dartprune.ffn.quantised import NestedSketch, QuantisedRows
from dartprune.ffn.selector_ops import TokenRows
from dartprune.ffn.sketch import GAUSSIAN_STEP, AnySketch, FFNSketch, InputPlanes, Products, SketchPlanes
from dartprune.ffn.weights import FFNWeights

_NO_BITS, _NO_IMPORTANCE = numpy.empty(0, numpy.uint32), numpy.empty((0, 0), numpy.float32)


def quantise_input(x: Tensor, activation_bits: int = 4, outliers: int = 4) -> InputPlanes:
    """See `sketch.quantise_input`."""
    from dartprune.ffn.cpu import selector_kernels as kernels

    arrays = kernels.round_rows(x.detach().float().contiguous().numpy(), *_rounding(activation_bits, outliers))
    return InputPlanes(*(torch.from_numpy(array) for array in arrays))


def _rounding(activation_bits: int, outliers: int) -> tuple[Any, ...]:
    return activation_bits, numpy.float32(GAUSSIAN_STEP[activation_bits]), outliers


def estimates(x: Tensor, sketch: FFNSketch) -> Products:
    """Rows x [N, H] rounded, and their products as `sketch.estimated_products` gives them."""
    from dartprune.ffn.cpu import selector_kernels as kernels

    gated = sketch.gate is not None
    ups = torch.empty(x.shape[0], sketch.up.neurons, dtype=torch.float32, device="cpu")
    gates = torch.empty_like(ups) if gated else ups.new_empty(0, 0)
    rows, rounding = x.detach().float().contiguous().numpy(), _rounding(sketch.activation_bits, sketch.outliers)
    kernels.estimates(rows, rounding, gated, _planes(sketch), use_threads(), gates.numpy(), ups.numpy())
    return (gates if gated else None), ups


def sketch_integers(x: InputPlanes, sketch: SketchPlanes) -> Tensor:
    """See `sketch.sketch_integers`."""
    from dartprune.ffn.cpu import selector_kernels as kernels

    out = torch.empty(x.planes.shape[0], sketch.neurons, dtype=torch.int32, device="cpu")
    kernels.integers(sketch.planes.numpy(), x.planes.numpy(), x.total.numpy(), out.numpy())
    return out


def chosen_rows(
    scores: Tensor, wanted: Tensor, width: int, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `selector_ops.chosen_rows`."""
    from dartprune.ffn.cpu import selector_kernels as kernels

    rows = scores.shape[0]
    lists = _lists(rows, width)
    key = scores.float().abs().contiguous().numpy().view(numpy.uint32)
    kernels.choose(key, numpy.arange(rows), wanted.numpy(), _bits(threshold), *lists)
    return _tensors(*lists)


class _Call:
    """The arrays that both kernels take, and those that they fill."""

    def __init__(self, x: Tensor, weights: FFNWeights, wanted: Tensor, threshold: Tensor | None, width: int) -> None:
        self.weights = weight_arrays(weights)
        self.threads = use_threads()
        self.dtype, self.neurons, self.down_bias = x.dtype, weights.neurons, weights.down_bias
        self.x = x.detach().float().contiguous().numpy()
        self.choice = wanted.numpy(), _bits(threshold)
        self.index, self.count, self.cut = _lists(self.x.shape[0], width)
        self.out = numpy.empty_like(self.x)

    def parts(self) -> Iterator[tuple[slice, Any, tuple[Any, ...]]]:
        """Rows that fit one call of a kernel: which, their x, and the arrays that it fills for them."""
        from dartprune.ffn.cpu import selector_kernels as kernels

        for first in range(0, self.x.shape[0], kernels.MOST_ROWS):
            part = slice(first, first + kernels.MOST_ROWS)
            x = self.x[part]
            key = numpy.zeros((x.shape[0], self.neurons), numpy.float32)  # a neuron that is no candidate scores 0
            lists = self.index[part], self.count[part], self.cut[part]
            yield part, x, (key, numpy.empty_like(key), *lists, self.out[part])

    def finish(self) -> TokenRows:
        """The results as tensors."""
        out = torch.from_numpy(self.out)
        if self.down_bias is not None:
            out += self.down_bias.detach().float()
        return TokenRows(out.to(self.dtype), *_tensors(self.index, self.count, self.cut))


@gated_operator("gated_rows_cpu", direct=True)
def gated_rows(
    x: Tensor,
    weights: FFNWeights,
    index: Tensor,
    count: Tensor,
    slots: Tensor,
    wanted: Tensor,
    threshold: Tensor | None,
    importance: Tensor | None,
) -> TokenRows:
    """Token gate, fused: see `selector_ops.gated_rows`. Rows of the weights must be contiguous."""
    from dartprune.ffn.cpu import selector_kernels as kernels

    if isinstance(weights, QuantisedRows):
        return quantised.gated_rows(x, weights, index, count, slots, wanted, threshold, importance)
    call = _Call(x, weights, wanted, threshold, index.shape[1])
    weight = _NO_IMPORTANCE if importance is None else importance.float().numpy()
    lists, counts, owners = index.numpy(), count.numpy(), slots.numpy()
    kind = kernels.ACTIVATIONS[weights.activation]
    for part, rows, results in call.parts():
        given = rows, call.weights, (lists, counts, owners[part]), call.choice, weight
        if call.threads == 1:
            kernels.gate_rows_alone(*given, kind, *results)
        else:
            kernels.gate_rows(*given, kind, call.threads, *results)
    return call.finish()


@sketched_operator("sketched_rows_cpu", direct=True)
def sketched_rows(
    x: Tensor,
    weights: FFNWeights,
    sketch: AnySketch,
    slots: Tensor,
    wanted: Tensor,
    importance: Tensor,
    width: int,
    threshold: Tensor | None,
    errors: Tensor | None,
    means: Tensor | None = None,
    compensation: Tensor | None = None,
) -> TokenRows:
    """Sketch, fused: see `selector_ops.sketched_rows`. Rows of the weights must be contiguous."""
    from dartprune.ffn.cpu import selector_kernels as kernels

    if isinstance(sketch, NestedSketch):
        choice = slots, wanted, importance, width, threshold, errors, means, compensation
        return quantised.nested_rows(x, sketch.rows, *choice)
    call = _Call(x, weights, wanted, threshold, width)
    planes = _planes(sketch)
    weight, owners, kind = importance.float().numpy(), slots.numpy(), kernels.ACTIVATIONS[weights.activation]
    rounding = _rounding(sketch.activation_bits, sketch.outliers)
    known, others = error_array(errors), others_arrays(means, compensation)
    for part, rows, results in call.parts():
        given = rows, call.weights, rounding, planes, call.choice, owners[part], weight, known, others, kind
        if call.threads == 1:
            kernels.sketch_rows_alone(*given, *results)
        else:
            kernels.sketch_rows(*given, call.threads, *results)
    return call.finish()


def _planes(sketch: FFNSketch) -> tuple[Any, Any, Any, Any]:
    """Planes and scale of gate and of up; the latter twice where there is no gate."""
    gate = sketch.up if sketch.gate is None else sketch.gate
    return gate.planes.numpy(), gate.scale.numpy(), sketch.up.planes.numpy(), sketch.up.scale.numpy()


def _lists(rows: int, width: int) -> tuple[Any, Any, Any]:
    """Room for the chosen neurons, their number, and the bits of the cut."""
    index = numpy.zeros((rows, width), numpy.int32)
    return index, numpy.empty(rows, numpy.int32), numpy.empty(rows, numpy.uint32)


def _tensors(index: Any, count: Any, cut: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.from_numpy(index), torch.from_numpy(count), torch.from_numpy(cut.view(numpy.float32))


def _bits(threshold: Tensor | None) -> Any:
    """Thresholds as bits, ordered as the floats are; none is empty, and one under 0 counts as 0."""
    return _NO_BITS if threshold is None else threshold.float().clamp(min=0).numpy().view(numpy.uint32)
