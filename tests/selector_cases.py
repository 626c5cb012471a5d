"""Random calls of the per-token operators, and when two answers agree, for the tests of every kernel."""

from __future__ import annotations

import random

import torch

from dartprune.ffn import selector_ops
from dartprune.ffn.backend import activation
from ffn_cases import ACTS, DTYPES, TOLERANCE, make, naive

HIDDEN = (1, 3, 16, 31, 64, 97, 200, 577)
NEURONS = (1, 2, 5, 33, 64, 129, 200)


def case(seed, hidden=HIDDEN, neurons=NEURONS, most_rows=9):
    """A random FFN, rows, slots and choice."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, neurons = rng.choice(hidden), rng.choice(neurons)
    dtype, gated, biases, act = rng.choice(DTYPES), rng.random() < 0.6, rng.random() < 0.5, rng.choice(ACTS)
    w = make(hidden, neurons, dtype, gated, biases, act)
    rows = rng.randint(1, most_rows)
    slots = torch.tensor([rng.randrange(3) for _ in range(rows)])
    wanted = torch.tensor([0, rng.randint(1, neurons), rng.randint(0, neurons)], dtype=torch.int32)
    threshold = None if rng.random() < 0.6 else torch.rand(3) * 0.3
    importance = torch.rand(rng.choice([1, 3]), neurons)
    x = torch.randn(hidden, rows).to(dtype).t()  # not contiguous
    kind = rng.random()
    if kind < 0.1:
        x = torch.zeros(rows, hidden, dtype=dtype)
    elif kind < 0.2:
        x[:, rng.randrange(hidden)] *= 100
    return rng, w, x, slots, wanted, threshold, importance


def errors_of(w, slots=3):
    """Means and variances of a sketch's errors, of each slot: bf16 [S, 4 or 2, I]; some have but a mean."""
    mean = torch.randn(slots, w.matrices - 1, w.neurons) * 0.3
    variance = torch.rand_like(mean)
    variance[..., ::5] = 0
    return torch.stack((mean, variance), dim=2).flatten(1, 2).bfloat16()


def others_of(w, slots=3):
    """Means of what each slot drops, and what all of them give together: bf16 [S, I], float32 [S, H]."""
    means = (torch.randn(slots, w.neurons) * 0.3).bfloat16()
    means[:, ::4] = 0
    return means, means.float() @ w.down.float()


def by_row(slots, importance, errors):
    """Importance and errors of each row, from those of its slot."""
    return importance if importance.shape[0] == 1 else importance[slots], None if errors is None else errors[slots]


def gate_scores(x, w, slots, importance):
    """What the gate would give every neuron, were it a candidate."""
    matrix, bias = (w.up, w.up_bias) if w.gate is None else (w.gate, w.gate_bias)
    a = x.float() @ matrix.float().T + (0 if bias is None else bias.float())
    scores = activation(w.activation, a).abs()
    return scores if importance is None else scores * (importance if importance.shape[0] == 1 else importance[slots])


def assert_agree(got, want, scores, w, x, means=None):
    """The same choice, up to scores that lie within rounding of the cut, and the exact output of the choice made.

    means: of each row, what stands in the place of what it drops, [N, I].
    """
    tolerance = TOLERANCE[x.dtype]
    assert got.out.dtype is x.dtype and got.out.shape == x.shape
    assert got.index.shape == want.index.shape and got.index.dtype is torch.int32 and got.count.dtype is torch.int32
    torch.testing.assert_close(got.cut, want.cut, rtol=1e-3, atol=1e-6)
    here = selector_ops.chosen_mask(got.index, got.count, w.neurons)
    there = selector_ops.chosen_mask(want.index, want.count, w.neurons)
    for n in (here ^ there).any(dim=1).nonzero()[:, 0].tolist():
        border = scores[n][here[n] ^ there[n]]
        assert float(border.max() - border.min()) <= 1e-4 * float(scores[n].max()) + 1e-6
    exact = naive(x, w, got.index, got.count, torch.arange(x.shape[0]))
    if means is not None:
        exact = exact + means.double().masked_fill(here, 0) @ w.down.double()
    scale = float(exact.abs().max()) + 1.0
    torch.testing.assert_close(got.out.double(), exact, rtol=tolerance, atol=tolerance * scale)


def same(a, b):
    """Bit for bit, in all that is defined."""
    lists_agree = all(torch.equal(p[:k], q[:k]) for p, q, k in zip(a.index, b.index, a.count.tolist(), strict=True))
    return lists_agree and all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("out", "count", "cut"))


def by_sorting(scores, wanted, width, threshold):
    """One row, in Python: the chosen, ascending, and the cut."""
    ranked = sorted((i for i, s in enumerate(scores) if s != 0), key=lambda i: (-scores[i], i))
    own = ranked[: max(wanted, 0)]
    take = own if threshold is None else [i for i in ranked if scores[i] >= threshold]
    return sorted(take[:width]), scores[own[-1]] if own else float("inf")


def check_choice(seed, choose):
    """The choice of random scores against a sort."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    neurons, rows = rng.choice([1, 2, 9, 64, 300]), rng.choice([1, 3])
    scores = torch.randn(rows, neurons).abs() * 10 ** rng.uniform(-30, 30)
    if rng.random() < 0.5:
        scores = (scores / scores.max() * 5).round()  # many ties and zeros
    wanted = torch.tensor([rng.choice([-1, 0, 1, neurons // 3, neurons, neurons + 4]) for _ in range(rows)]).int()
    width = rng.choice([1, max(1, neurons // 2), neurons, neurons + 3])
    threshold = None if rng.random() < 0.5 else torch.rand(rows) * scores.max() - 0.1 * scores.max()
    index, count, cut = choose(scores, wanted, width, threshold)
    assert index.shape == (rows, width) and index.dtype is torch.int32 and count.dtype is torch.int32
    for n in range(rows):
        least = None if threshold is None else float(threshold[n])
        want, want_cut = by_sorting(scores[n].tolist(), int(wanted[n]), width, least)
        assert index[n, : count[n]].tolist() == want
        assert float(cut[n]) == want_cut
