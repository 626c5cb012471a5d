"""Random FFNs and index lists for the tests of kernels, and the answer in double precision."""

from __future__ import annotations

import torch

from dartprune.ffn.backend import activation
from dartprune.ffn.reference import ReferenceBackend
from dartprune.ffn.weights import FFNWeights

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(hidden, neurons, dtype, gated, biases, act, device="cpu"):
    """Random weights; outputs come near 1."""

    def values(*shape):
        return (torch.randn(*shape, device=device) / hidden**0.5).to(dtype)

    return FFNWeights(
        values(neurons, hidden) if gated else None,
        values(neurons, hidden),
        values(neurons, hidden),
        values(neurons) if gated and biases else None,
        values(neurons) if biases else None,
        values(hidden) if biases else None,
        act,
        lambda x: activation(act, x),
    )


def lists(neurons, counts, width=None):
    """Index lists without order, no neuron twice; what lies past a count is as wrong as it can be."""
    index = torch.full((len(counts), width or max(1, *counts)), neurons - 1, dtype=torch.int32)
    for slot, k in enumerate(counts):
        index[slot, :k] = torch.randperm(neurons)[:k].int()
    return index, torch.tensor(counts, dtype=torch.int32)


def exact(x, w, index, count, slots):
    """The reference backend in double precision."""
    wide = FFNWeights(*(t if t is None else t.double() for t in w.tensors()), w.activation, w.act)
    return ReferenceBackend().ffn(x.double(), wide, index, count, slots)


def assert_near(got, want, dtype):
    """As near as the rounding of a result in this dtype allows."""
    scale = float(want.abs().max()) + 1.0 if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
