"""Row kernels on the CPU: the kept rows are read from the original weights, nothing else is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dartprune.ffn.cpu import quantised
from dartprune.ffn.cpu.arrays import WORDS, weight_arrays
from dartprune.ffn.cpu.threads import kept_threads, use_threads
from dartprune.ffn.operators import ffn_operator
from dartprune.ffn.quantised import QuantisedRows
from dartprune.ffn.weights import FFNWeights


@ffn_operator("ffn_cpu")
def _pruned_ffn(x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
    from dartprune.ffn.cpu import kernels

    if isinstance(weights, QuantisedRows):
        return quantised.pruned_ffn(x, weights, index, count, slots)
    threads = use_threads()
    rows, hidden = x.shape
    wide = x.detach().float().contiguous()
    out = torch.empty(rows, hidden, dtype=torch.float32, device="cpu")
    arrays, kind = weight_arrays(weights), kernels.ACTIVATIONS[weights.activation]
    lists, counts, owners = index.numpy(), count.numpy(), slots.numpy()
    if rows == 1:
        slot = int(owners[0])
        call: tuple[Any, ...] = (wide[0].numpy(), *arrays, lists[slot], int(counts[slot]), kind)
        if threads == 1:
            kernels.single_alone(*call, out[0].numpy())
        else:
            partial = torch.empty(threads, hidden, dtype=torch.float32, device="cpu").numpy()
            kernels.single(*call, threads, partial, out[0].numpy())
    else:
        for first in range(0, rows, kernels.MOST_ROWS):
            part = slice(first, min(rows, first + kernels.MOST_ROWS))
            call = (wide[part].numpy(), *arrays, lists, counts, owners[part], kind)
            if threads == 1:
                kernels.several_alone(*call, out[part].numpy())
            else:
                partial = torch.empty(threads, part.stop - first, hidden, dtype=torch.float32, device="cpu").numpy()
                kernels.several(*call, threads, partial, out[part].numpy())
    if weights.down_bias is not None:
        out += weights.down_bias.float()
    return out.to(x.dtype)


@ffn_operator("ffn_cpu_invariant")
def _invariant_ffn(x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
    from dartprune.ffn.cpu import selector_kernels as kernels

    wide = x.detach().float().contiguous()
    out = torch.empty(wide.shape, dtype=torch.float32, device="cpu")
    arrays, kind = weight_arrays(weights), kernels.ACTIVATIONS[weights.activation]
    lists = index.index_select(0, slots), count.index_select(0, slots)
    for first in range(0, x.shape[0], kernels.MOST_ROWS):
        part = slice(first, first + kernels.MOST_ROWS)
        rows = wide[part].numpy()
        value = torch.empty(rows.shape[0], weights.neurons, dtype=torch.float32, device="cpu").numpy()
        mine = lists[0][part].numpy(), lists[1][part].numpy()
        kernels.mask_rows(rows, arrays, mine, kind, use_threads(), value, out[part].numpy())
    if weights.down_bias is not None:
        out += weights.down_bias.float()
    return out.to(x.dtype)


class CpuBackend:
    """Fused Numba kernels over the kept rows of the original weights, as many threads as torch uses."""

    name = "cpu"
    saves_time = True
    gathers = True
    wants_rows = True

    def reason_against(self, weights: FFNWeights | str, device: torch.device) -> str | None:
        """None on a CPU with Numba, for bf16, fp16 and fp32 weights and activations with a canonical name."""
        if isinstance(weights, str):
            return weights
        if device.type != "cpu":
            return f"the cpu kernel does not run on {device.type}"
        if importlib.util.find_spec("numba") is None:
            return "the cpu kernel needs Numba (pip install 'dartprune[cpu]')"
        if not isinstance(weights, QuantisedRows) and weights.dtype not in WORDS:
            return f"the cpu kernel has no {weights.kind} form"
        if weights.activation == "other":
            return "the activation has no canonical form"
        return None

    def prepare(self, weights: FFNWeights) -> None:
        """Compile for this dtype (kept on disk), so that no token waits for it."""
        index = torch.zeros(1, 1, dtype=torch.int32, device="cpu")
        count = torch.ones(1, dtype=torch.int32, device="cpu")
        with kept_threads():
            for rows in (1, 2):
                x = torch.zeros(rows, weights.hidden, dtype=weights.dtype, device="cpu")
                self.ffn(x, weights, index, count, torch.zeros(rows, dtype=torch.int64, device="cpu"))

    def ffn(self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
        """Compute the pruned FFN of x [N, H]; see `Backend.ffn`."""
        return _pruned_ffn(x, weights, index, count, slots)

    def bytes_read(self, weights: FFNWeights, kept: Sequence[Tensor]) -> int:
        """The union of the kept rows, each read once."""
        if len(kept) == 1:
            return kept[0].numel() * weights.row_bytes
        return int(torch.cat(list(kept)).unique().numel()) * weights.row_bytes


class InvariantCpuBackend(CpuBackend):
    """The same with sums in one order: a row gives the same bits alone and in a batch. Index lists are ascending."""

    def reason_against(self, weights: FFNWeights | str, device: torch.device) -> str | None:
        """Packed rows have no such form."""
        if isinstance(weights, QuantisedRows):
            return "rows of 4 and 8 bits are added in an order that depends on the batch"
        return super().reason_against(weights, device)

    def ffn(self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
        """Compute the pruned FFN of x [N, H]; see `Backend.ffn`."""
        return _invariant_ffn(x, weights, index, count, slots)
