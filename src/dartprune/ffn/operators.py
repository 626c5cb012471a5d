"""The operators of a pruned FFN as torch.compile sees them, the same for every backend.

An operator takes tensors, numbers and strings alone. Here, and nowhere else, stands how weights and sketches are taken
apart into its arguments and put together again; a backend writes functions of `FFNWeights` and `FFNSketch`.
Packed rows are no tensors that an operator takes: graphs of torch.compile end before them and go on behind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dartprune.ffn.backend import activation, exactly, outside_graphs
from dartprune.ffn.quantised import NestedSketch, QuantisedRows
from dartprune.ffn.selector_ops import TokenRows
from dartprune.ffn.sketch import AnySketch, FFNSketch, SketchPlanes
from dartprune.ffn.weights import FFNWeights

FFNCall = Callable[[Tensor, FFNWeights, Tensor, Tensor, Tensor], Tensor]
TokenRowsCall = Callable[..., TokenRows]
_Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # of a TokenRows

_WEIGHTS = (
    "Tensor x, Tensor? gate, Tensor up, Tensor down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str act"
)
SKETCH = "Tensor? gate_planes, Tensor? gate_scale, Tensor up_planes, Tensor up_scale, SymInt bits, SymInt outliers"
_FFN = f"({_WEIGHTS}, Tensor index, Tensor count, Tensor slots) -> Tensor"
_GATED = (
    f"({_WEIGHTS}, Tensor index, Tensor count, Tensor slots, Tensor wanted, Tensor? threshold, Tensor? importance) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_SKETCHED = (
    f"({_WEIGHTS}, {SKETCH}, Tensor slots, Tensor wanted, Tensor importance, SymInt width, Tensor? threshold, "
    "Tensor? errors, Tensor? means, Tensor? compensation) -> (Tensor, Tensor, Tensor, Tensor)"
)
_OF_WEIGHTS, _OF_SKETCH = 7, 6  # arguments


def ffn_operator(name: str) -> Callable[[FFNCall], FFNCall]:
    """Decorator: send a function (x, weights, index, count, slots) -> [N, H] through an operator of that name."""

    def register(work: FFNCall) -> FFNCall:
        def flat(x: Tensor, *given: Any) -> Tensor:
            return work(x, _weights(given), *given[_OF_WEIGHTS:])

        def fake(x: Tensor, *given: Any) -> Tensor:
            return x.new_empty(x.shape)

        operator = register_operator(name, _FFN, flat, fake)
        packed = outside_graphs(exactly(work))

        def call(x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
            if isinstance(weights, QuantisedRows):
                return packed(x, weights, index, count, slots)
            out: Tensor = operator(x, *weights.tensors(), weights.activation, index, count, slots)
            return out

        return call

    return register


def gated_operator(name: str, *, direct: bool = False) -> Callable[[TokenRowsCall], TokenRowsCall]:
    """Decorator: send a function with the signature of `selector_ops.gated_rows` through an operator of that name.

    direct: outside torch.compile call the function itself, which leaves out the operator's dispatch, 50 us.
    """

    def register(work: TokenRowsCall) -> TokenRowsCall:
        def flat(x: Tensor, *given: Any) -> _Parts:
            return _parts(work(x, _weights(given), *given[_OF_WEIGHTS:]))

        def fake(x: Tensor, *given: Any) -> _Parts:
            return room_for_rows(x, given[_OF_WEIGHTS].shape[1])

        operator = register_operator(name, _GATED, flat, fake)
        packed = outside_graphs(exactly(work))

        def call(
            x: Tensor,
            weights: FFNWeights,
            index: Tensor,
            count: Tensor,
            slots: Tensor,
            wanted: Tensor,
            threshold: Tensor | None = None,
            importance: Tensor | None = None,
        ) -> TokenRows:
            lists = index, count, slots, wanted, threshold, importance
            if isinstance(weights, QuantisedRows):
                return packed(x, weights, *lists)
            if direct and not torch.compiler.is_compiling():
                return work(x, weights, *lists)
            return TokenRows(*operator(x, *weights.tensors(), weights.activation, *lists))

        return call

    return register


def sketched_operator(name: str, *, direct: bool = False) -> Callable[[TokenRowsCall], TokenRowsCall]:
    """Decorator: the same for functions with the signature of `selector_ops.sketched_rows`."""

    def register(work: TokenRowsCall) -> TokenRowsCall:
        def flat(x: Tensor, *given: Any) -> _Parts:
            planes = given[_OF_WEIGHTS : _OF_WEIGHTS + _OF_SKETCH]
            return _parts(work(x, _weights(given), sketch_of(x, planes), *given[_OF_WEIGHTS + _OF_SKETCH :]))

        def fake(x: Tensor, *given: Any) -> _Parts:
            return room_for_rows(x, given[-5])

        operator = register_operator(name, _SKETCHED, flat, fake)
        packed = outside_graphs(exactly(work))

        def call(
            x: Tensor,
            weights: FFNWeights,
            sketch: AnySketch,
            slots: Tensor,
            wanted: Tensor,
            importance: Tensor,
            width: int,
            threshold: Tensor | None = None,
            errors: Tensor | None = None,
            means: Tensor | None = None,
            compensation: Tensor | None = None,
        ) -> TokenRows:
            choice = slots, wanted, importance, width, threshold, errors, means, compensation
            if isinstance(weights, QuantisedRows) or isinstance(sketch, NestedSketch):
                return packed(x, weights, sketch, *choice)
            if direct and not torch.compiler.is_compiling():
                return work(x, weights, sketch, *choice)
            flattened = *weights.tensors(), weights.activation, *sketch_arguments(sketch)
            return TokenRows(*operator(x, *flattened, *choice))

        return call

    return register


def room_for_rows(x: Tensor, width: int | torch.SymInt) -> _Parts:
    """The tensors of a `TokenRows` for x [N, H], not filled."""
    rows = x.shape[0]
    index, count = x.new_empty(rows, width, dtype=torch.int32), x.new_empty(rows, dtype=torch.int32)
    return x.new_empty(x.shape), index, count, x.new_empty(rows, dtype=torch.float32)


def register_operator(name: str, schema: str, work: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operator, and for torch.compile what its results look like."""
    operator = torch.library.custom_op(f"dartprune::{name}", exactly(work), mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _weights(given: tuple[Any, ...]) -> FFNWeights:
    gate, up, down, gate_bias, up_bias, down_bias, act = given[:_OF_WEIGHTS]
    return FFNWeights(gate, up, down, gate_bias, up_bias, down_bias, act, partial(activation, act))


def sketch_arguments(sketch: FFNSketch) -> tuple[Any, ...]:
    """A sketch as an operator takes it, see `SKETCH`."""
    gate, up = sketch.gate, sketch.up
    planes = (None, None) if gate is None else (gate.planes, gate.scale)
    return *planes, up.planes, up.scale, sketch.activation_bits, sketch.outliers


def sketch_of(x: Tensor, given: tuple[Any, ...]) -> FFNSketch:
    """The sketch that was flattened so, for inputs x [N, H]."""
    gate, gate_scale, up, up_scale, bits, outliers = given
    hidden = x.shape[1]
    first = None if gate is None else SketchPlanes(gate, gate_scale, hidden)
    return FFNSketch(first, SketchPlanes(up, up_scale, hidden), bits, outliers)


def _parts(rows: TokenRows) -> _Parts:
    return rows.out, rows.index, rows.count, rows.cut
