"""What a sketch estimates, as torch.compile sees it: by the quickest way there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dartprune.ffn.backend import exactly, outside_graphs
from dartprune.ffn.operators import SKETCH, register_operator, sketch_arguments, sketch_of
from dartprune.ffn.planes import estimates, estimates_of_rows, pairs_of_rows
from dartprune.ffn.quantised import NestedSketch
from dartprune.ffn.sketch import AnySketch, Products


def estimated(x: Tensor, sketch: AnySketch) -> Products:
    """Products of x [N, H] with a sketch, float32 [N, I], without biases; see `sketch.estimated_products`."""
    if isinstance(sketch, NestedSketch):
        return _nested(x, sketch)
    if not torch.compiler.is_compiling():
        return _direct(x, sketch)  # without the operator's dispatch, 50 us
    gate, up = _estimated(x, *sketch_arguments(sketch))
    return (None if sketch.gate is None else gate), up


_direct = exactly(estimates)


@outside_graphs
def _nested(x: Tensor, sketch: NestedSketch) -> Products:
    return estimates_of_rows(x, sketch.rows)


@outside_graphs
def exact_and_estimated(x: Tensor, sketch: NestedSketch) -> tuple[Products, Products]:
    """Products of x [N, H] with rows, and `estimated` ones by their own sketch, in one pass over them; no biases."""
    return pairs_of_rows(x, sketch.rows)


def _estimate(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    gate, up = estimates(x, sketch_of(x, given))
    return up.new_empty(0) if gate is None else gate, up


def _room(x: Tensor, gate: Tensor | None, _: Any, up: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    of_up = x.new_empty(x.shape[0], up.shape[0], dtype=torch.float32)
    return of_up.new_empty(0) if gate is None else of_up.new_empty(of_up.shape), of_up


_estimated = register_operator("estimated", f"(Tensor x, {SKETCH}) -> (Tensor, Tensor)", _estimate, _room)
