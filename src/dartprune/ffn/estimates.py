"""What a sketch estimates, as torch.compile sees it: by the quickest way there is."""

from __future__ import annotations

import torch
from torch import Tensor

from dartprune.ffn.backend import outside_graphs
from dartprune.ffn.operators import register_operator
from dartprune.ffn.planes import estimates, estimates_of_rows
from dartprune.ffn.quantised import QuantisedRows
from dartprune.ffn.sketch import SketchPlanes


def estimated(x: Tensor, planes: SketchPlanes, activation_bits: int, outliers: int) -> Tensor:
    """Products of x [N, H] with a sketched matrix, float32 [N, I]; see `sketch.sketch_dots`."""
    dots: Tensor = _estimated(x, planes.planes, planes.scale, activation_bits, outliers)
    return dots


@outside_graphs
def nested_estimated(x: Tensor, rows: QuantisedRows) -> tuple[Tensor | None, Tensor]:
    """See `quantised.nested_estimates`; by the kernels where they can be used."""
    return estimates_of_rows(x, rows)


def _estimate(x: Tensor, planes: Tensor, scale: Tensor, activation_bits: int, outliers: int) -> Tensor:
    return estimates(x, SketchPlanes(planes, scale, x.shape[1]), activation_bits, outliers)


_estimated = register_operator(
    "estimated",
    "(Tensor x, Tensor planes, Tensor scale, SymInt activation_bits, SymInt outliers) -> Tensor",
    _estimate,
    lambda x, planes, *_: x.new_empty(x.shape[0], planes.shape[0], dtype=torch.float32),
)
