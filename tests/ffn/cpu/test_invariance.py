"""Kernels whose rows have the same bits alone and in a batch, against naive products in double precision."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from dartprune.ffn.cpu.arrays import words
from dartprune.ffn.cpu.backend import InvariantCpuBackend
from dartprune.ffn.quantised import quantised_rows
from ffn_cases import ACTS, DTYPES, TOLERANCE, lists, make, naive

BACKEND = InvariantCpuBackend()
NO_BIAS = np.empty(0, np.float32)


@pytest.mark.parametrize("seed", range(60))
def test_masked_rows_on_random_cases(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, neurons = rng.choice([1, 3, 16, 31, 64, 97]), rng.choice([1, 2, 5, 33, 64, 129])
    dtype, gated, biases, act = rng.choice(DTYPES), rng.random() < 0.6, rng.random() < 0.5, rng.choice(ACTS)
    w = make(hidden, neurons, dtype, gated, biases, act)
    index, count = lists(neurons, [0, 1, neurons, rng.randint(0, neurons)])
    for line, many in zip(index, count.tolist(), strict=True):
        line[:many] = line[:many].sort().values
    rows = rng.choice([1, 2, 3, 5, 9, 70])
    slots = torch.tensor([rng.randrange(4) for _ in range(rows)])
    x = torch.randn(hidden, rows).to(dtype).t()
    got = BACKEND.ffn(x, w, index, count, slots)
    want = naive(x, w, index, count, slots)
    scale = float(want.abs().max()) + 1.0
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
    for n in range(rows):
        assert torch.equal(BACKEND.ffn(x[n : n + 1], w, index, count, slots[n : n + 1])[0], got[n])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(BACKEND.ffn(x, w, index, count, slots), got)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 2), (7, 31), (64, 33), (130, 96), (577, 64)])
def test_linear_layers_of_both_layouts(dtype, outputs, inputs):
    from dartprune.ffn.cpu import step_kernels as kernels

    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(9, inputs)
    bias = torch.randn(outputs).numpy() if outputs % 2 else NO_BIAS
    turned = weight.t().contiguous()

    def by_outputs(x):
        out = np.empty((len(x), outputs), np.float32)
        kernels.linear(x.numpy(), words("weight", weight), bias, 2, out)
        return out

    def by_inputs(x):
        out = np.empty((len(x), outputs), np.float32)
        kernels.linear_by_inputs(x.numpy(), words("weight", turned), bias, 2, out)
        return out

    want = (x.double() @ weight.double().t()).numpy() + (bias if len(bias) else 0)
    for product in (by_outputs, by_inputs):
        whole = product(x)
        np.testing.assert_allclose(whole, want, rtol=1e-4, atol=1e-4 * inputs**0.5)
        for first in range(9):
            for last in range(first + 1, 10):
                assert (product(x[first:last].contiguous()) == whole[first:last]).all()


def test_packed_rows_are_refused():
    reason = BACKEND.reason_against(
        quantised_rows(make(64, 64, torch.bfloat16, True, False, "silu"), 4), torch.device("cpu")
    )
    assert reason == "rows of 4 and 8 bits are added in an order that depends on the batch"
