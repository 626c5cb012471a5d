"""The compiler takes the GPU kernels of the per-token selectors, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dartprune.ffn.gpu import cut as gpu_cut
from dartprune.ffn.gpu import gate as gpu_gate
from dartprune.ffn.gpu import rounding as gpu_rounding
from dartprune.ffn.gpu import sketch as gpu_sketch
from dartprune.ffn.gpu.cut import TALLY

def build(kernel, pointers, constants, capability, warps=4, fusion=True):
    names = kernel.arg_names
    signature = {name: pointers.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in pointers.items() if kind[0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": fusion}
    built = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    assert built.asm["cubin"]
    return built

SHARED = {"slots": "*i64", "key": "*i32", "tally": "*i32", "value": "*fp32", "importance": "*fp32"}
ROUNDED = {"step": "*fp32", "total": "*i32", "place": "*i64", "exact": "*fp32"}
for capability, weight, gated, act, hidden, neurons, bits, words in (
    (90, "*bf16", True, "silu", 4096, 14336, 1, 64),
    (80, "*fp16", False, "gelu_tanh", 2048, 8192, 2, 32),
    (75, "*fp32", True, "gelu", 600, 1000, 4, 10),
):
    rounding = {"x": weight, "planes": "*i64", "tally": "*i32", "gaussian_step": "fp32", **ROUNDED}
    padded = triton.next_power_of_2(words)
    sizes = {"HIDDEN": hidden, "WORDS": words, "PADDED": padded, "BITS": 4, "OUTLIERS": 4, "COUNTS": TALLY}
    build(gpu_rounding.round_kernel, rounding, sizes, capability, max(4, padded // 8), False)

    planes = {"x": "*i64", "gate": "*i64", "up": "*i64", "gate_scale": "*fp32", "up_scale": "*fp32"}
    biases = {"gate_bias": weight, "up_bias": weight}
    score = {**planes, **biases, **ROUNDED, **SHARED, "importance_stride": "i32"}
    score.pop("value")
    blocks = gpu_sketch.sketch_blocks(words)
    sizes = {"ALL": neurons, "COUNTS": TALLY, "WORDS": words, "BITS": bits, "INPUT_BITS": 4, "OUTLIERS": 4}
    flags = {"GATED": gated, "GATE_BIASED": gated, "UP_BIASED": True, "ACT": act}
    shape = {"NEURONS": blocks.neurons, "COLUMNS": blocks.columns}
    ptx = build(gpu_sketch.score_kernel, score, {**sizes, **flags, **shape}, capability).asm["ptx"]
    assert "popc.b64" in ptx, "the compiler did not find the instruction for a population count"
    assert "ld.global.v2.b64" in ptx, "planes are not read sixteen bytes at a time"

    lists = {"index": "*i32", "count": "*i32", "width": "i32"}
    gate = {"x": weight, "matrix": weight, "bias": weight, **lists, **SHARED, "importance_stride": "i32"}
    sizes = {"ALL": neurons, "COUNTS": TALLY, "HIDDEN": hidden, "BIASED": gated, "WEIGHED": gated, "ACT": act}
    built = build(gpu_gate.gate_kernel, gate, {**sizes, "NEURONS": 4, "COLUMNS": 512}, capability)
    assert "ld.global.v4" in built.asm["ptx"], "weights are not read sixteen bytes at a time"
    up = {"x": weight, "up": weight, "up_bias": weight, "acts": "*fp32", **lists}
    sizes = {"HIDDEN": hidden, "BIASED": gated, "NEURONS": 4, "COLUMNS": 512}
    assert "ld.global.v4" in build(gpu_gate.chosen_up_kernel, up, sizes, capability).asm["ptx"]

    cut = {**SHARED, **lists, "wanted": "*i32", "threshold": "*fp32", "cut": "*fp32", "owners": "*i64", "acts": "*fp32"}
    cut.pop("importance")
    keys = min(gpu_cut.MOST_KEYS, triton.next_power_of_2(neurons))
    sizes = {"ALL": neurons, "COUNTS": TALLY, "KEYS": keys, "THRESHOLDED": not gated, "VALUED": gated}
    build(gpu_cut.cut_kernel, cut, sizes, capability, gpu_cut.cut_warps(keys))
print("all built")
"""


def test_the_compiler_takes_the_kernels_without_a_gpu(tmp_path):
    """What the interpreter forgives and the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all built" in done.stdout, done.stderr
