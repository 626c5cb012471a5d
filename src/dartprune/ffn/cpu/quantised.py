"""Rows of 4 and 8 bits on the CPU: the pruned FFN, whole projections, and rows unpacked."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from dartprune.ffn.cpu.threads import use_threads
from dartprune.ffn.quantised import QuantisedRows

_NONE = numpy.empty(0, numpy.float32)
_ROLES = {"gate": 0, "up": 1, "down": 2}


def _floats(bias: Tensor | None) -> Any:
    return _NONE if bias is None else bias.detach().float().contiguous().numpy()


def _arrays(rows: QuantisedRows) -> tuple[Any, ...]:
    """Head, tail and offsets; both biases and which are there."""
    biased = (rows.gate_bias is not None) + 2 * (rows.up_bias is not None)
    packed = rows.head.numpy(), rows.tail.numpy(), rows.layout.offsets
    return *packed, _floats(rows.gate_bias), _floats(rows.up_bias), biased


def pruned_ffn(x: Tensor, rows: QuantisedRows, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
    """The FFN of x [N, H] over each row's own neurons; see `Backend.ffn`."""
    from dartprune.ffn.cpu import group_kernels as kernels
    from dartprune.ffn.cpu.kernels import MOST_ROWS

    threads = use_threads()
    wide = x.detach().float().contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    arrays, kind = _arrays(rows), kernels.ACTIVATIONS[rows.activation]
    lists, counts, owners = index.numpy(), count.numpy(), slots.numpy()
    if x.shape[0] == 1:
        slot = int(owners[0])
        kernels.single(wide[0].numpy(), *arrays, lists[slot], int(counts[slot]), kind, threads, out[0].numpy())
    else:
        for first in range(0, x.shape[0], MOST_ROWS):
            part = slice(first, first + MOST_ROWS)
            kernels.several(
                wide[part].numpy(), *arrays, lists, counts, owners[part], kind, threads, out[part].numpy()
            )
    if rows.down_bias is not None:
        out += rows.down_bias.float()
    return out.to(x.dtype)


def products(x: Tensor, rows: QuantisedRows, role: str) -> Tensor:
    """x [N, H] times all rows of gate or up, [N, I], without bias."""
    from dartprune.ffn.cpu import group_kernels as kernels

    out = torch.empty(x.shape[0], rows.neurons, dtype=torch.float32, device="cpu")
    packed = rows.head.numpy(), rows.tail.numpy(), rows.layout.offsets
    kernels.products(x.detach().float().contiguous().numpy(), *packed, role == "up", use_threads(), out.numpy())
    return out.to(x.dtype)


def down_product(a: Tensor, rows: QuantisedRows) -> Tensor:
    """a [N, I] times all down rows, [N, H], without bias."""
    from dartprune.ffn.cpu import group_kernels as kernels

    out = torch.empty(a.shape[0], rows.hidden, dtype=torch.float32, device="cpu")
    wide = a.detach().float().contiguous().numpy()
    kernels.down_rows(wide, rows.tail.numpy(), rows.layout.offsets, use_threads(), out.numpy())
    return out.to(a.dtype)


def unpacked(rows: QuantisedRows, role: str, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows `first` to `last` of a matrix, [rows, H]: see `QuantisedRows.unpacked`."""
    from dartprune.ffn.cpu import group_kernels as kernels

    head, tail = rows.head[first:last].numpy(), rows.tail[first:last].numpy()
    out = torch.empty(head.shape[0], rows.hidden, dtype=torch.float32, device="cpu")
    kernels.unpack_rows(head, tail, rows.layout.offsets, _ROLES[role], use_threads(), out.numpy())
    return out.to(dtype)
