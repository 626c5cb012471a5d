"""Bit planes of weights and products with them, by the quickest way there is; plain torch where there is no other."""

from __future__ import annotations

import importlib.util

import numpy
from torch import Tensor

from dartprune.ffn import sketch
from dartprune.ffn.cpu.threads import kept_threads, use_threads
from dartprune.ffn.quantised import QuantisedRows, nested_estimates, nested_pairs
from dartprune.ffn.sketch import FFNSketch, Products, SketchPlanes

_BLOCK = 1 << 24  # weights widened at a time


def build_planes(weight: Tensor, bits: int) -> SketchPlanes:
    """Round a weight matrix [I, H] to b bits a weight: see `sketch.build_planes`.

    The sums of a row's fit are made in another order than there, so its scale may differ in the last digits, and a
    weight that lies between two levels may fall to the other side.

    Raises:
        ValueError: bits outside 1 to 4.
    """
    if weight.device.type != "cpu" or importlib.util.find_spec("numba") is None:
        return sketch.build_planes(weight, bits)
    empty = sketch.empty_planes(weight, bits)
    with kept_threads():
        _fill(weight.detach(), empty)
    return empty


def estimates(x: Tensor, of: FFNSketch) -> Products:
    """Products of rows x [N, H], rounded, with sketched matrices, float32 [N, I]: see `sketch.estimated_products`."""
    if x.is_cuda and importlib.util.find_spec("triton") is not None:
        from dartprune.ffn.gpu import selectors as gpu_selectors

        return gpu_selectors.estimates(x, of)
    if x.device.type == "cpu" and importlib.util.find_spec("numba") is not None:
        from dartprune.ffn.cpu import selectors as cpu_selectors

        with kept_threads():
            return cpu_selectors.estimates(x, of)
    return sketch.estimated_products(x, of)


def estimates_of_rows(x: Tensor, rows: QuantisedRows) -> tuple[Tensor | None, Tensor]:
    """Products of rows x [N, H] with the high codes of nested rows: see `quantised.nested_estimates`."""
    if importlib.util.find_spec("numba") is None:
        return nested_estimates(x, rows)
    from dartprune.ffn.cpu import quantised as cpu_quantised

    with kept_threads():
        return cpu_quantised.estimates(x, rows)


def pairs_of_rows(x: Tensor, rows: QuantisedRows) -> tuple[Products, Products]:
    """Products of rows x [N, H] with nested rows, and what their high codes estimate: see `quantised.nested_pairs`."""
    if importlib.util.find_spec("numba") is None:
        return nested_pairs(x, rows)
    from dartprune.ffn.cpu import quantised as cpu_quantised

    with kept_threads():
        return cpu_quantised.pairs(x, rows)


def _fill(weight: Tensor, into: SketchPlanes) -> None:
    from dartprune.ffn.cpu import planes as cpu_planes

    threads = use_threads()
    first_scale = numpy.float32(sketch.GAUSSIAN_SCALE[into.bits])
    starts = numpy.array(sketch.STARTS, dtype=numpy.float32)
    step = max(1, _BLOCK // into.hidden)
    for first in range(0, into.neurons, step):
        part = weight[first : first + step].float().contiguous()
        planes, scale = into.planes[first : first + step], into.scale[first : first + step]
        cpu_planes.round_matrix(part.numpy(), into.bits, first_scale, starts, threads, planes.numpy(), scale.numpy())
