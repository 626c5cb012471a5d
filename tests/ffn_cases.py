"""Random FFNs, index lists and a naive pruned FFN, for the tests of every kernel."""

from __future__ import annotations

import torch

from dartprune.ffn.backend import activation
from dartprune.ffn.weights import FFNWeights

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(hidden, neurons, dtype, gated, biases, act, device="cpu"):
    def values(*shape):
        return (torch.randn(*shape) / hidden**0.5).to(device, dtype)

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


def naive(x, w, index, count, slots):
    """Neuron by neuron, in double precision."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for n, slot in enumerate(slots.tolist()):
        v = x[n].double()
        for i in index[slot, : count[slot]].tolist():
            up = w.up[i].double() @ v + (w.up_bias[i].double() if w.up_bias is not None else 0)
            if w.gate is None:
                a = activation(w.activation, up)
            else:
                gate = w.gate[i].double() @ v + (w.gate_bias[i].double() if w.gate_bias is not None else 0)
                a = activation(w.activation, gate) * up
            out[n] += a * w.down[i].double()
        if w.down_bias is not None:
            out[n] += w.down_bias.double()
    return out


def lists(neurons, counts):
    index = torch.zeros(len(counts), max(1, *counts), dtype=torch.int32)
    for slot, k in enumerate(counts):
        index[slot, :k] = torch.randperm(neurons)[:k].int()  # no order, no neuron twice
    return index, torch.tensor(counts, dtype=torch.int32)


def assert_near(got, want, dtype):
    """Within the rounding of a dtype, for values as large as the largest of the result."""
    scale = float(want.abs().max()) + 1.0
    torch.testing.assert_close(got.double().cpu(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
