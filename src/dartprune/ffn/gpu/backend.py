"""Row kernels on the GPU: the kept rows are read from the original weights, nothing else is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.ffn.operators import ffn_operator
from dartprune.ffn.quantised import QuantisedRows
from dartprune.ffn.weights import FFNWeights

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (7, 0)  # compute capability that Triton compiles for
OLDEST_TRITON = (3, 6)  # that the kernels were seen to run with


def ready(x: Tensor, weights: FFNWeights) -> Tensor:
    """X as the kernels take it, contiguous and aligned.

    Raises:
        ValueError: a matrix is not contiguous.
    """
    if not all(matrix is None or matrix.is_contiguous() for matrix in (weights.gate, weights.up, weights.down)):
        raise ValueError("the gpu kernel needs weights whose rows are contiguous, one after another")
    rows = x.detach().contiguous()
    # or the kernels would be compiled again, for unaligned memory
    return rows.clone() if rows.data_ptr() % 16 else rows


# A custom operator, not `triton_op`: torch.compile then calls it as it stands, so the blocks stay those measured at
# attach (Inductor would tune the kernels again inside the graph), nothing is compiled anew when a batch or a list
# changes its width, and it runs under the interpreter. Launches inside it are captured by a CUDA graph like any other.
@ffn_operator("ffn_gpu")
def _pruned_ffn(x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
    from dartprune.ffn.gpu import kernels as gpu_kernels
    from dartprune.ffn.gpu import tuning as gpu_tuning

    rows = ready(x, weights)
    lists = (index.contiguous(), count.contiguous(), slots.contiguous())
    with torch.cuda.device_of(x):
        return gpu_kernels.pruned_ffn(rows, weights, *lists, gpu_tuning.config(weights.gate, weights.up))


class GpuBackend:
    """Triton kernels over the kept rows of the original weights; each sequence reads its own rows.

    Works eagerly, inside `torch.compile(fullgraph=True)` and inside CUDA graphs whose lists change in place between
    replays; no call waits for the device.
    """

    name = "gpu"
    saves_time = True
    gathers = True
    wants_rows = True

    def reason_against(self, weights: FFNWeights | str, device: torch.device) -> str | None:
        """None on a GPU with Triton, for bf16, fp16 and fp32 weights and activations with a canonical name.

        With TRITON_INTERPRET=1 a CPU will do: slowly, for tests.
        """
        if isinstance(weights, str):
            return weights
        if device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
            return f"the gpu kernel does not run on {device.type}"
        if importlib.util.find_spec("triton") is None:
            return "the gpu kernel needs Triton (pip install 'dartprune[gpu]')"
        if (found := _triton_version()) < OLDEST_TRITON:
            return f"the gpu kernel needs Triton {_dotted(OLDEST_TRITON)} or newer, this is {_dotted(found)}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
            return "the gpu kernel needs a GPU of compute capability 7.0 or newer"
        if isinstance(weights, QuantisedRows) or weights.dtype not in DTYPES:
            return f"the gpu kernel has no {weights.kind} form"
        if weights.activation == "other":
            return "the activation has no canonical form"
        return None

    def prepare(self, weights: FFNWeights) -> None:
        """Choose the blocks for this shape by measuring, and compile, so that no token waits for either."""
        from dartprune.ffn.gpu import tuning as gpu_tuning

        if gpu_tuning.interpreted():
            return
        up = weights.up
        with torch.cuda.device_of(up):
            gpu_tuning.measure(weights)
        index = torch.zeros(1, 1, dtype=torch.int32, device=up.device)
        count = torch.zeros(1, dtype=torch.int32, device=up.device)
        slots = torch.zeros(1, dtype=torch.int64, device=up.device)
        self.ffn(up.new_zeros(1, weights.hidden), weights, index, count, slots)

    def ffn(self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
        """Compute the pruned FFN of x [N, H]; see `Backend.ffn`."""
        return _pruned_ffn(x, weights, index, count, slots)

    def bytes_read(self, weights: FFNWeights, kept: Sequence[Tensor]) -> int:
        """Every sequence reads its own rows, once however many candidate tokens it has."""
        return sum(rows.numel() for rows in kept) * weights.row_bytes


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
