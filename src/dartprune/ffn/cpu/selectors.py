"""Per-token selectors on the CPU: the operators of `selector_ops` with Numba kernels behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from dartprune.ffn.cpu.backend import _array, _use_threads
from dartprune.ffn.selector_ops import TokenRows
from dartprune.ffn.selector_reference import like
from dartprune.ffn.sketch import GAUSSIAN_STEP, FFNSketch, InputPlanes, SketchPlanes
from dartprune.ffn.weights import FFNWeights

_Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # of a TokenRows
_NONE, _NO_BITS = numpy.empty(0, numpy.float32), numpy.empty(0, numpy.uint32)
_NO_IMPORTANCE = numpy.empty((0, 0), numpy.float32)


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
    """Token gate, fused: see `selector_ops.gated_rows`. Rows of the weights must be contiguous."""
    operator = _gated_operator if torch.compiler.is_compiling() else _gated
    parts: _Parts = operator(
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
    """Sketch, fused: see `selector_ops.sketched_rows`. Rows of the weights must be contiguous."""
    gate = sketch.gate
    operator = _sketched_operator if torch.compiler.is_compiling() else _sketched
    parts: _Parts = operator(
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


def quantise_input(x: Tensor, activation_bits: int = 4, outliers: int = 4) -> InputPlanes:
    """See `sketch.quantise_input`."""
    from dartprune.ffn.cpu import selector_kernels as kernels

    arrays = kernels.round_rows(x.detach().float().contiguous().numpy(), *_rounding(activation_bits, outliers))
    return InputPlanes(*(torch.from_numpy(array) for array in arrays))


def _rounding(activation_bits: int, outliers: int) -> tuple[Any, ...]:
    return activation_bits, numpy.float32(GAUSSIAN_STEP[activation_bits]), outliers


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

    def __init__(
        self,
        x: Tensor,
        weights: tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None],
        wanted: Tensor,
        threshold: Tensor | None,
        width: int,
    ) -> None:
        gate, up, down, gate_bias, up_bias = weights
        for name, matrix in (("gate", gate), ("up", up), ("down", down)):
            if matrix is not None and matrix.stride(1) != 1 and matrix.shape[1] > 1:
                raise ValueError(f"the rows of the {name} matrix are not contiguous: the cpu kernels read whole rows")
        self.threads = torch.get_num_threads()
        _use_threads(self.threads)
        self.dtype = x.dtype
        self.x = x.detach().float().contiguous().numpy()
        biases = [_NONE if bias is None else bias.detach().float().numpy() for bias in (gate_bias, up_bias)]
        biased = (gate_bias is not None) + 2 * (up_bias is not None)
        up_words = _array(up)
        gate_words = up_words if gate is None else _array(gate)
        self.weights = gate is not None, gate_words, up_words, _array(down), *biases, biased
        self.choice = wanted.numpy(), _bits(threshold)
        rows, self.neurons = self.x.shape[0], up.shape[0]
        self.index, self.count, self.cut = _lists(rows, width)
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

    def finish(self, down_bias: Tensor | None) -> _Parts:
        """The results as tensors."""
        out = torch.from_numpy(self.out)
        if down_bias is not None:
            out += down_bias.detach().float()
        return out.to(self.dtype), *_tensors(self.index, self.count, self.cut)


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
    from dartprune.ffn.cpu import selector_kernels as kernels

    call = _Call(x, (gate, up, down, gate_bias, up_bias), wanted, threshold, index.shape[1])
    weight = _NO_IMPORTANCE if importance is None else importance.float().numpy()
    lists, counts, owners, kind = index.numpy(), count.numpy(), slots.numpy(), kernels.ACTIVATIONS[act]
    for part, rows, results in call.parts():
        given = rows, call.weights, (lists, counts, owners[part]), call.choice, weight
        if call.threads == 1:
            kernels.gate_rows_alone(*given, kind, *results)
        else:
            kernels.gate_rows(*given, kind, call.threads, *results)
    return call.finish(down_bias)


# plain calls leave out the operator's dispatch, 50 us; torch.compile needs it
_gated_operator = torch.library.custom_op("dartprune::gated_rows_cpu", _gated, mutates_args=())


@_gated_operator.register_fake
def _(x: Tensor, *others: Any) -> _Parts:
    return like(x, others[6].shape[1])


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
    from dartprune.ffn.cpu import selector_kernels as kernels

    call = _Call(x, (gate, up, down, gate_bias, up_bias), wanted, threshold, width)
    up_sketch = up_planes.numpy(), up_scale.numpy()
    first = up_sketch if gate_planes is None or gate_scale is None else (gate_planes.numpy(), gate_scale.numpy())
    weight, owners, kind = importance.float().numpy(), slots.numpy(), kernels.ACTIVATIONS[act]
    rounding = _rounding(activation_bits, outliers)
    for part, rows, results in call.parts():
        given = rows, call.weights, rounding, (*first, *up_sketch), call.choice, owners[part], weight, kind
        if call.threads == 1:
            kernels.sketch_rows_alone(*given, *results)
        else:
            kernels.sketch_rows(*given, call.threads, *results)
    return call.finish(down_bias)


_sketched_operator = torch.library.custom_op("dartprune::sketched_rows_cpu", _sketched, mutates_args=())


@_sketched_operator.register_fake
def _(x: Tensor, *others: Any) -> _Parts:
    return like(x, others[-2])


def _lists(rows: int, width: int) -> tuple[Any, Any, Any]:
    """Room for the chosen neurons, their number, and the bits of the cut."""
    index = numpy.zeros((rows, width), numpy.int32)
    return index, numpy.empty(rows, numpy.int32), numpy.empty(rows, numpy.uint32)


def _tensors(index: Any, count: Any, cut: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.from_numpy(index), torch.from_numpy(count), torch.from_numpy(cut.view(numpy.float32))


def _bits(threshold: Tensor | None) -> Any:
    """Thresholds as bits, ordered as the floats are; none is empty, and one under 0 counts as 0."""
    return _NO_BITS if threshold is None else threshold.float().clamp(min=0).numpy().view(numpy.uint32)
