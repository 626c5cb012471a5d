"""Rows of 4 and 8 bits on the CPU: the pruned FFN, whole projections, and rows unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from dartprune.ffn.cpu.arrays import error_array, floats, others_arrays
from dartprune.ffn.cpu.threads import use_threads
from dartprune.ffn.quantised import QuantisedRows
from dartprune.ffn.selector_ops import TokenRows
from dartprune.ffn.sketch import Products

_ROLES = {"gate": 0, "up": 1, "down": 2}


def _arrays(rows: QuantisedRows) -> tuple[Any, ...]:
    """Head, tail and offsets; the biases of gate and up and which are there; the activation's number."""
    from dartprune.ffn.cpu.activations import ACTIVATIONS

    biased = (rows.gate_bias is not None) + 2 * (rows.up_bias is not None)
    biases = floats(rows.gate_bias), floats(rows.up_bias), biased
    return rows.head.numpy(), rows.tail.numpy(), rows.layout.offsets, biases, ACTIVATIONS[rows.activation]


def pruned_ffn(x: Tensor, rows: QuantisedRows, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
    """The FFN of x [N, H] over each row's own neurons; see `Backend.ffn`."""
    from dartprune.ffn.cpu import group_kernels as kernels

    wide = x.detach().float().contiguous().numpy()
    out = numpy.empty_like(wide)
    lists = index.numpy(), count.numpy(), slots.numpy()
    kernels.chosen(wide, *_arrays(rows), *lists, use_threads(), out)
    return _finished(out, rows, x.dtype)


def _finished(out: Any, rows: QuantisedRows, dtype: torch.dtype) -> Tensor:
    result = torch.from_numpy(out)
    if rows.down_bias is not None:
        result += rows.down_bias.detach().float()
    return result.to(dtype)


def gated_rows(
    x: Tensor,
    rows: QuantisedRows,
    index: Tensor,
    count: Tensor,
    slots: Tensor,
    wanted: Tensor,
    threshold: Tensor | None,
    importance: Tensor | None,
) -> TokenRows:
    """See `selector_ops.gated_rows`."""
    from dartprune.ffn.cpu import group_kernels as kernels

    candidates = index.numpy(), count.numpy()
    weight = numpy.empty((0, 0), numpy.float32) if importance is None else importance.float().numpy()
    return _by_parts(
        x, rows, slots, wanted, threshold, index.shape[1],
        lambda wide, owners, choice, results: kernels.gate_rows(
            wide, *_arrays(rows), candidates, owners, choice, weight, *results
        ),
    )  # fmt: skip


def nested_rows(
    x: Tensor,
    rows: QuantisedRows,
    slots: Tensor,
    wanted: Tensor,
    importance: Tensor,
    width: int,
    threshold: Tensor | None,
    errors: Tensor | None,
    means: Tensor | None = None,
    compensation: Tensor | None = None,
) -> TokenRows:
    """See `selector_ops.sketched_rows`: the high codes of the rows are the sketch."""
    from dartprune.ffn.cpu import group_kernels as kernels

    weight, known, others = importance.float().numpy(), error_array(errors), others_arrays(means, compensation)
    return _by_parts(
        x, rows, slots, wanted, threshold, width,
        lambda wide, owners, choice, results: kernels.nested_rows(
            wide, *_arrays(rows), owners, choice, weight, known, others, *results
        ),
    )  # fmt: skip


def _by_parts(
    x: Tensor,
    rows: QuantisedRows,
    slots: Tensor,
    wanted: Tensor,
    threshold: Tensor | None,
    width: int,
    work: Callable[..., None],
) -> TokenRows:
    """Call a selector's kernel for at most 64 rows at a time, with room for what it fills."""
    from dartprune.ffn.cpu.kernels import MOST_ROWS

    wide = x.detach().float().contiguous().numpy()
    out, owners = numpy.empty_like(wide), slots.numpy()
    index, count = numpy.zeros((len(wide), width), numpy.int32), numpy.empty(len(wide), numpy.int32)
    cut = numpy.empty(len(wide), numpy.uint32)
    none = numpy.empty(0, numpy.uint32)
    least = none if threshold is None else threshold.float().clamp(min=0).numpy().view(numpy.uint32)
    threads = use_threads()
    for first in range(0, len(wide), MOST_ROWS):
        part = slice(first, first + MOST_ROWS)
        key = numpy.zeros((len(wide[part]), rows.neurons), numpy.float32)  # a neuron that is no candidate scores 0
        results = threads, key, index[part], count[part], cut[part], out[part]
        work(wide[part], owners[part], (wanted.numpy(), least), results)
    lists = torch.from_numpy(index), torch.from_numpy(count), torch.from_numpy(cut.view(numpy.float32))
    return TokenRows(_finished(out, rows, x.dtype), *lists)


def estimates(x: Tensor, rows: QuantisedRows) -> Products:
    """See `quantised.nested_estimates`."""
    from dartprune.ffn.cpu import group_kernels as kernels

    room, result = _room_of_both(x, rows)
    wide = x.detach().float().contiguous().numpy()
    kernels.estimates(wide, rows.head.numpy(), rows.layout.offsets, use_threads(), *room)
    return result


def pairs(x: Tensor, rows: QuantisedRows) -> tuple[Products, Products]:
    """See `quantised.nested_pairs`."""
    from dartprune.ffn.cpu import group_products as kernels

    (exact, products_), (rough, estimates_) = (_room_of_both(x, rows) for _ in range(2))
    packed = rows.head.numpy(), rows.tail.numpy(), rows.layout.offsets
    kernels.pairs(x.detach().float().contiguous().numpy(), *packed, use_threads(), exact, rough)
    return products_, estimates_


def _room_of_both(x: Tensor, rows: QuantisedRows) -> tuple[tuple[Any, Any], Products]:
    """Room for products of x with gate (of no size where there is none) and up; the same as they are returned."""
    ups = torch.empty(x.shape[0], rows.neurons, dtype=torch.float32, device="cpu")
    gates = torch.empty_like(ups) if rows.layout.gated else ups.new_empty(0, 0)
    return (gates.numpy(), ups.numpy()), ((gates if rows.layout.gated else None), ups)


def products(x: Tensor, rows: QuantisedRows, role: str) -> Tensor:
    """X [N, H] times all rows of gate or up, [N, I], without bias."""
    from dartprune.ffn.cpu import group_products as kernels

    out = torch.empty(x.shape[0], rows.neurons, dtype=torch.float32, device="cpu")
    packed = rows.head.numpy(), rows.tail.numpy(), rows.layout.offsets
    kernels.products(x.detach().float().contiguous().numpy(), *packed, role == "up", use_threads(), out.numpy())
    return out.to(x.dtype)


def down_product(a: Tensor, rows: QuantisedRows) -> Tensor:
    """A [N, I] times all down rows, [N, H], without bias."""
    from dartprune.ffn.cpu import group_products as kernels

    out = torch.empty(a.shape[0], rows.hidden, dtype=torch.float32, device="cpu")
    wide = a.detach().float().contiguous().numpy()
    kernels.down_rows(wide, rows.tail.numpy(), rows.layout.offsets, use_threads(), out.numpy())
    return out.to(a.dtype)


def picked(rows: QuantisedRows, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Up's rows of index int64 [N], [N, H]; IndexError where one is not there."""
    from dartprune.ffn.cpu.arrays import words
    from dartprune.ffn.cpu.unpacking import pick_rows

    out = torch.empty(len(index), rows.hidden, dtype=dtype, device="cpu")
    if not pick_rows(rows.head.numpy(), rows.tail.numpy(), rows.layout.offsets, index.numpy(), words("up", out)):
        raise IndexError(f"index out of range: rows are 0 to {rows.neurons - 1}")
    return out


def unpacked(rows: QuantisedRows, role: str, first: int, last: int | None, dtype: torch.dtype) -> Tensor:
    """Rows `first` to `last` of a matrix, [rows, H]: see `QuantisedRows.unpacked`."""
    from dartprune.ffn.cpu.arrays import words
    from dartprune.ffn.cpu.unpacking import unpack_rows

    head, tail = rows.head[first:last].numpy(), rows.tail[first:last].numpy()
    out = torch.empty(head.shape[0], rows.hidden, dtype=dtype, device="cpu")
    unpack_rows(head, tail, rows.layout.offsets, _ROLES[role], use_threads(), words(role, out))
    return out
