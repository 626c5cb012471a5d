"""Which blocks the GPU kernels work with: measured once per shape and device, while a run attaches."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from dartprune.ffn.gpu import kernels
from dartprune.ffn.gpu.kernels import Blocks, Config
from dartprune.ffn.weights import FFNWeights

UP = (
    Blocks(1, 512, 1),
    Blocks(1, 1024, 4),
    Blocks(1, 4096, 8),
    Blocks(2, 512, 4),
    Blocks(2, 1024, 8),
    Blocks(4, 256, 4),
)
MOST_PIECES = 32  # of a row: the loop over them is unrolled
DOWN = (
    Blocks(8, 256, 4),
    Blocks(8, 512, 4),
    Blocks(16, 128, 4),
    Blocks(16, 256, 4),
    Blocks(16, 256, 8),
    Blocks(32, 64, 4),
)
PROGRAMS = (2, 4, 8)  # of the down kernel, per multiprocessor
MOST_SPLITS = 128

UNMEASURED = Config(Blocks(4, 512, 4), Blocks(16, 256, 4), splits=32)
INTERPRETED = Config(Blocks(32, 64, 4), Blocks(32, 64, 4), splits=3)
SCRATCH = 1 << 30  # bytes of free memory below which nothing is measured: the timer clears the cache with a buffer

_chosen: dict[tuple[Any, ...], Config] = {}


def interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter (TRITON_INTERPRET=1), which runs them on a CPU."""
    return not isinstance(kernels.up_kernel, triton.runtime.JITFunction)


def _key(gate: Tensor | None, up: Tensor) -> tuple[Any, ...]:
    return up.device, up.dtype, gate is not None, *up.shape


def config(gate: Tensor | None, up: Tensor) -> Config:
    """The blocks for these weights; what was measured for their shape, or a fair guess. Measures nothing."""
    return _chosen.get(_key(gate, up), INTERPRETED if interpreted() else UNMEASURED)


def measure(weights: FFNWeights) -> None:
    """Try the candidates on these weights with 30 % of the neurons kept and one row, and remember the fastest.

    Nothing is measured twice for a shape, under the interpreter, while a CUDA graph is captured (which timing would
    break), or with less than 1 GiB of free memory.
    """
    up = weights.up
    key = _key(weights.gate, up)
    if key in _chosen or interpreted() or torch.cuda.is_current_stream_capturing():
        return
    if torch.cuda.mem_get_info(up.device)[0] < SCRATCH:
        return
    neurons, hidden = up.shape
    width = max(1, round(0.3 * neurons))
    index = torch.linspace(0, neurons - 1, width, dtype=torch.float64, device=up.device).to(torch.int32)[None]
    count = torch.full((1,), width, dtype=torch.int32, device=up.device)
    slots = torch.zeros(1, dtype=torch.int64, device=up.device)
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, hidden, generator=generator, dtype=torch.float32, device="cpu").to(up)
    acts = torch.zeros(1, width, dtype=torch.float32, device=up.device)
    matrices = weights.gate, up, weights.gate_bias, weights.up_bias

    def up_time(blocks: Blocks) -> float:
        return _time(lambda: kernels.launch_up(x, *matrices, index, count, slots, acts, weights.activation, blocks))

    def down_time(choice: tuple[Blocks, int]) -> float:
        partial = torch.empty(choice[1], 1, hidden, dtype=torch.float32, device=up.device)
        out = torch.empty_like(x)

        def run() -> None:
            kernels.launch_down(acts, weights.down, index, count, slots, partial, choice[0])
            kernels.launch_sum(partial, weights.down_bias, out)

        return _time(run)

    processors = torch.cuda.get_device_properties(up.device).multi_processor_count
    choices = {
        (blocks, min(MOST_SPLITS, max(1, each * processors // triton.cdiv(hidden, blocks.columns))))
        for blocks, each in product(DOWN, PROGRAMS)
    }
    down, splits = min(sorted(choices, key=str), key=down_time)
    known = [blocks for blocks in UP if triton.cdiv(hidden, blocks.columns) <= MOST_PIECES]
    _chosen[key] = Config(min(known, key=up_time), down, splits)


def _time(run: Any) -> float:
    """Milliseconds, the median of some runs with a cold L2 cache: a decode step has read other layers since."""
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))
