"""What tokens teach a sketch: the kernel against plain torch, and plain torch against a loop over tokens."""

from __future__ import annotations

import random

import pytest
import torch

from dartprune.ffn.backend import activation
from dartprune.ffn.dropped import Drops
from dartprune.ffn.lessons import Activation, lesson_sums, reference_sums
from ffn_cases import ACTS, DTYPES


def case(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lines, tokens, neurons = rng.choice([1, 1, 3]), rng.choice([1, 2, 16, 36]), rng.choice([1, 5, 64, 150, 700])
    name, dtype, gated = rng.choice(ACTS), rng.choice(DTYPES), rng.random() < 0.7
    exact = [torch.randn(lines * tokens, neurons).to(dtype) for _ in range(2)]
    estimates = [part.float() + 0.3 * torch.randn(part.shape) for part in exact]
    weight = (torch.rand(lines, tokens) < 0.8).float()
    idle = weight.flatten() == 0
    for part in (*exact, *estimates):
        part[idle] = rng.choice([0.0, float("nan"), float("inf")])  # of tokens that do not count
    kept = torch.tensor([rng.randint(1, neurons) for _ in range(lines)], dtype=torch.int32)
    drops = Drops(torch.rand(1, neurons), kept) if rng.random() < 0.8 else None
    pairs = [(first if gated else None, second) for first, second in (exact, estimates)]
    return Activation(lambda a: activation(name, a), name), *pairs, weight, drops


@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_against_plain_torch(seed):
    pytest.importorskip("numba")
    act, exact, *rest = case(seed)
    errors, dropped = lesson_sums(act, exact, *rest)
    wide = tuple(None if part is None else part.float() for part in exact)
    want_errors, want_dropped = reference_sums(act, wide, *rest)
    torch.testing.assert_close(errors, want_errors, rtol=1e-4, atol=1e-4)
    assert (dropped is None) == (want_dropped is None)
    if dropped is None:
        return
    # a score on the cut itself may fall to either side, once in a line
    differ = (dropped[:, 1] - want_dropped[:, 1]).abs()
    assert float(differ.max()) <= 2
    assert float(differ.sum()) <= 0.01 * rest[1].numel() * dropped.shape[-1] + 1
    same = differ == 0
    torch.testing.assert_close(dropped[:, 0][same], want_dropped[:, 0][same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gated", [True, False])
def test_plain_torch_against_a_loop(gated):
    torch.manual_seed(1)
    act = Activation(torch.nn.functional.silu, "silu")
    exact, estimates = torch.randn(2, 6, 9), torch.randn(2, 6, 9)
    weight = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    drops = Drops(torch.rand(1, 9), torch.tensor([4, 2]))

    def pair(of):
        return (of[0] if gated else None, of[1])

    errors, dropped = reference_sums(act, pair(exact), pair(estimates), weight, drops)
    want, lost = torch.zeros(2, 2 + 2 * gated, 9), torch.zeros(2, 2, 9)
    for line in range(2):
        for m in weight[line].nonzero()[:, 0].tolist():
            n = 3 * line + m
            for part in range(1 - gated, 2):
                error = exact[part, n] - estimates[part, n]
                want[line, 2 * (part - 1 + gated)] += error
                want[line, 2 * (part - 1 + gated) + 1] += error**2
            a, e = (act.act(p[0, n]) * p[1, n] if gated else act.act(p[1, n]) for p in (exact, estimates))
            order = (e.abs() * drops.importance[0]).argsort(descending=True)
            for i in order[int(drops.kept[line]) :].tolist():
                lost[line, 0, i] += a[i]
                lost[line, 1, i] += 1
    torch.testing.assert_close(errors, want)
    torch.testing.assert_close(dropped, lost)


def test_an_activation_without_a_kernel_goes_by_torch():
    act = Activation(torch.sin, "other")
    exact, weight = (None, torch.randn(4, 30)), torch.ones(1, 4)
    drops = Drops(torch.ones(1, 30), torch.tensor([10]))
    got = lesson_sums(act, exact, exact, weight, drops)
    for one, other in zip(got, reference_sums(act, exact, exact, weight, drops), strict=True):
        assert torch.equal(one, other)


def test_the_lines_of_a_batch_learn_what_each_learns_alone():
    act, *_ = case(0)
    torch.manual_seed(2)
    exact, estimates = torch.randn(2, 12, 100), torch.randn(2, 12, 100)
    weight, kept = torch.ones(3, 4), torch.tensor([50, 20, 70], dtype=torch.int32)
    importance = torch.rand(1, 100)
    whole = lesson_sums(act, tuple(exact), tuple(estimates), weight, Drops(importance, kept))
    for line in range(3):
        rows = slice(4 * line, 4 * line + 4)
        parts = tuple(exact[:, rows]), tuple(estimates[:, rows])
        alone = lesson_sums(act, *parts, weight[:1], Drops(importance, kept[line : line + 1]))
        for one, other in zip(whole, alone, strict=True):
            assert torch.equal(one[line], other[0])
