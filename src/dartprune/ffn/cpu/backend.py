"""Row kernels on the CPU: the kept rows are read from the original weights, nothing else is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dartprune.ffn.backend import row_bytes, same_shape
from dartprune.ffn.weights import FFNWeights

WORDS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}


def _array(tensor: Tensor) -> Any:
    """A numpy view of a weight; 16-bit floats as words, since numpy has no bf16."""
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError("the cpu kernel needs weights whose rows are contiguous: it reads whole rows by their address")
    return tensor.view(WORDS[tensor.dtype]).numpy()


def _float(tensor: Tensor | None, like: Tensor) -> Any:
    return (like.new_empty(0, dtype=torch.float32) if tensor is None else tensor.float().contiguous()).numpy()


@torch.library.custom_op("dartprune::ffn_cpu", mutates_args=())
def _ffn_cpu(
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
    act: str,
) -> Tensor:
    from dartprune.ffn.cpu import kernels

    threads = torch.get_num_threads()
    _use_threads(threads)
    rows, hidden = x.shape
    wide = x.detach().float().contiguous()
    out = torch.empty(rows, hidden, dtype=torch.float32, device="cpu")
    biased = (gate_bias is not None) + 2 * (up_bias is not None)
    up_words = _array(up)
    weights = (
        gate is not None,
        up_words if gate is None else _array(gate),
        up_words,
        _array(down),
        _float(gate_bias, x),
        _float(up_bias, x),
        biased,
    )
    kind = kernels.ACTIVATIONS[act]
    lists, counts, owners = index.numpy(), count.numpy(), slots.numpy()
    if rows == 1:
        slot = int(owners[0])
        call: tuple[Any, ...] = (wide[0].numpy(), *weights, lists[slot], int(counts[slot]), kind)
        if threads == 1:
            kernels.single_alone(*call, out[0].numpy())
        else:
            partial = torch.empty(threads, hidden, dtype=torch.float32, device="cpu").numpy()
            kernels.single(*call, threads, partial, out[0].numpy())
    else:
        for first in range(0, rows, kernels.MOST_ROWS):
            part = slice(first, min(rows, first + kernels.MOST_ROWS))
            call = (wide[part].numpy(), *weights, lists, counts, owners[part], kind)
            if threads == 1:
                kernels.several_alone(*call, out[part].numpy())
            else:
                partial = torch.empty(threads, part.stop - first, hidden, dtype=torch.float32, device="cpu").numpy()
                kernels.several(*call, threads, partial, out[part].numpy())
    if down_bias is not None:
        out += down_bias.float()
    return out.to(x.dtype)


_ffn_cpu.register_fake(same_shape)


def _use_threads(threads: int) -> None:
    import numba

    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))


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
        if weights.up.dtype not in WORDS:
            return f"the cpu kernel has no {str(weights.up.dtype).removeprefix('torch.')} form"
        if weights.activation == "other":
            return "the activation has no canonical form"
        return None

    def prepare(self, weights: FFNWeights) -> None:
        """Compile for this dtype (kept on disk), so that no token waits for it."""
        threads = torch.get_num_threads()
        try:
            self._compile(weights)
        finally:
            # both may sit on one OpenMP runtime, where Numba's start sets the number of threads anew
            torch.set_num_threads(threads)

    def _compile(self, weights: FFNWeights) -> None:
        hidden = weights.hidden
        index = torch.zeros(1, 1, dtype=torch.int32, device="cpu")
        count = torch.ones(1, dtype=torch.int32, device="cpu")
        for rows in (1, 2):
            x = torch.zeros(rows, hidden, dtype=weights.up.dtype, device="cpu")
            self.ffn(x, weights, index, count, torch.zeros(rows, dtype=torch.int64, device="cpu"))

    def ffn(self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
        """Compute the pruned FFN of x [N, H]; see `Backend.ffn`."""
        out: Tensor = _ffn_cpu(x, *weights.tensors(), index, count, slots, weights.activation)
        return out

    def bytes_read(self, weights: FFNWeights, kept: Sequence[Tensor]) -> int:
        """The union of the kept rows, each read once."""
        if len(kept) == 1:
            return kept[0].numel() * row_bytes(weights)
        return int(torch.cat(list(kept)).unique().numel()) * row_bytes(weights)
