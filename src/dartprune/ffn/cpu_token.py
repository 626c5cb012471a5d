"""Per-token selectors on the CPU: the operators of `token_ops` with Numba kernels behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from dartprune.ffn.cpu import _array, _float, _use_threads
from dartprune.ffn.token_ops import GAUSSIAN_STEP, WORD, FFNSketch, InputPlanes, SketchPlanes, TokenRows
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
    """Token gate, fused: see `token_ops.gated_rows`. Rows of the weights must be contiguous."""
    parts: _Parts = _gated_cpu(
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
    """Sketch, fused: see `token_ops.sketched_rows`. Rows of the weights must be contiguous."""
    gate = sketch.gate
    parts: _Parts = _sketched_cpu(
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
    """See `token_ops.quantise_input`."""
    from dartprune.ffn import cpu_token_kernels as kernels

    rows, hidden = x.shape
    result = InputPlanes(
        torch.empty(rows, activation_bits, -(-hidden // WORD), dtype=torch.int64),
        torch.empty(rows),
        torch.empty(rows, dtype=torch.int32),
        torch.empty(rows, outliers, dtype=torch.int64),
        torch.empty(rows, outliers),
    )
    given = x.detach().float().contiguous().numpy(), activation_bits, numpy.float32(GAUSSIAN_STEP[activation_bits])
    kernels.round_rows(*given, *(array.numpy() for array in result))
    return result


def sketch_integers(x: InputPlanes, sketch: SketchPlanes) -> Tensor:
    """See `token_ops.sketch_integers`."""
    from dartprune.ffn import cpu_token_kernels as kernels

    out = torch.empty(x.planes.shape[0], sketch.neurons, dtype=torch.int32)
    kernels.integers(sketch.planes.numpy(), x.planes.numpy(), x.total.numpy(), out.numpy())
    return out


def chosen_rows(
    scores: Tensor, wanted: Tensor, width: int, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `token_ops.chosen_rows`."""
    from dartprune.ffn import cpu_token_kernels as kernels

    rows = scores.shape[0]
    index, count, cut = _lists(rows, width)
    key = scores.float().abs().contiguous().numpy().view(numpy.uint32)
    kernels.choose(key, numpy.arange(rows), wanted.numpy(), _bits(threshold), index.numpy(), count.numpy(), cut)
    return index, count, torch.from_numpy(cut.view("float32"))


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
        self.threads = torch.get_num_threads()
        _use_threads(self.threads)
        self.dtype = x.dtype
        self.rows, self.neurons = x.shape[0], up.shape[0]
        self.x = x.detach().float().contiguous()
        biased = (gate_bias is not None) + 2 * (up_bias is not None)
        biases = _float(gate_bias, x), _float(up_bias, x)
        up_words = _array(up)
        self.weights = (
            gate is not None,
            up_words if gate is None else _array(gate),
            up_words,
            _array(down),
            *biases,
            biased,
        )
        self.choice = wanted.numpy(), _bits(threshold)
        self.index, self.count, self.cut = _lists(self.rows, width)
        self.out = torch.empty_like(self.x)

    def parts(self) -> Iterator[tuple[slice, tuple[Any, ...]]]:
        """Rows that fit one call of a kernel, and the arrays that it fills for them."""
        from dartprune.ffn import cpu_token_kernels as kernels

        for first in range(0, self.rows, kernels.MOST_ROWS):
            part = slice(first, min(self.rows, first + kernels.MOST_ROWS))
            # a neuron that is no candidate scores 0
            key, value = torch.zeros(2, part.stop - first, self.neurons).numpy()
            index, count, out = self.index[part].numpy(), self.count[part].numpy(), self.out[part].numpy()
            yield part, (key, value, index, count, self.cut[part], out)

    def finish(self, down_bias: Tensor | None) -> _Parts:
        if down_bias is not None:
            self.out += down_bias.float()
        return self.out.to(self.dtype), self.index, self.count, torch.from_numpy(self.cut.view("float32"))


@torch.library.custom_op("dartprune::gated_rows_cpu", mutates_args=())
def _gated_cpu(
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
    from dartprune.ffn import cpu_token_kernels as kernels

    call = _Call(x, (gate, up, down, gate_bias, up_bias), wanted, threshold, index.shape[1])
    weight = (x.new_empty(0, 0) if importance is None else importance).float().numpy()
    lists, counts, owners = index.numpy(), count.numpy(), slots.numpy()
    for part, results in call.parts():
        given = call.x[part].numpy(), call.weights, (lists, counts, owners[part]), call.choice, weight
        kind = kernels.ACTIVATIONS[act]
        if call.threads == 1:
            kernels.gate_rows_alone(*given, kind, *results)
        else:
            kernels.gate_rows(*given, kind, call.threads, *results)
    return call.finish(down_bias)


@_gated_cpu.register_fake
def _(x: Tensor, *others: Any) -> _Parts:
    return _like(x, others[6].shape[1])


@torch.library.custom_op("dartprune::sketched_rows_cpu", mutates_args=())
def _sketched_cpu(
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
    from dartprune.ffn import cpu_token_kernels as kernels

    call = _Call(x, (gate, up, down, gate_bias, up_bias), wanted, threshold, width)
    up_sketch = up_planes.numpy(), up_scale.numpy()
    first = up_sketch if gate_planes is None or gate_scale is None else (gate_planes.numpy(), gate_scale.numpy())
    weight, owners, kind = importance.float().numpy(), slots.numpy(), kernels.ACTIVATIONS[act]
    for part, results in call.parts():
        rounded = tuple(array.numpy() for array in quantise_input(call.x[part], activation_bits, outliers))
        given = (
            call.x[part].numpy(),
            call.weights,
            rounded,
            (*first, *up_sketch),
            call.choice,
            owners[part],
            weight,
            kind,
        )
        if call.threads == 1:
            kernels.sketch_rows_alone(*given, *results)
        else:
            kernels.sketch_rows(*given, call.threads, *results)
    return call.finish(down_bias)


@_sketched_cpu.register_fake
def _(x: Tensor, *others: Any) -> _Parts:
    return _like(x, others[-2])


def _like(x: Tensor, width: int) -> _Parts:
    """What the operators give, to torch.compile."""
    rows = x.shape[0]
    index, count = x.new_empty(rows, width, dtype=torch.int32), x.new_empty(rows, dtype=torch.int32)
    return x.new_empty(x.shape), index, count, x.new_empty(rows, dtype=torch.float32)


def _lists(rows: int, width: int) -> tuple[Tensor, Tensor, Any]:
    """Room for the chosen neurons, their number, and the bits of the cut."""
    index = torch.zeros(rows, width, dtype=torch.int32)
    return index, torch.empty(rows, dtype=torch.int32), numpy.empty(rows, numpy.uint32)


def _bits(threshold: Tensor | None) -> Any:
    """Thresholds as bits, ordered as the floats are; none is empty, and one under 0 counts as 0."""
    if threshold is None:
        return numpy.empty(0, numpy.uint32)
    return threshold.float().clamp(min=0).numpy().view(numpy.uint32)
