"""The per-token operators in plain torch against loops in double precision, and the choice against a sort."""

from __future__ import annotations

import pytest
import torch

from dartprune.ffn.backend import activation
from dartprune.ffn.selector_ops import chosen_mask, chosen_rows, gated_rows, sketched_rows
from dartprune.ffn.sketch import build_sketch, sketch_scores
from ffn_cases import lists, make, naive
from selector_cases import by_sorting, check_choice


@pytest.mark.parametrize("seed", range(60))
def test_chosen_rows_against_a_sort(seed):
    check_choice(seed, chosen_rows)


def test_not_a_number_is_chosen_first():
    scores = torch.tensor([[1.0, float("nan"), float("inf"), 2.0]])
    index, count, cut = chosen_rows(scores, torch.tensor([2]).int(), 4)
    assert index[0, : count[0]].tolist() == [1, 2] and cut.tolist() == [float("inf")]


def test_mask_of_lists():
    index = torch.tensor([[2, 0, 9], [1, 1, 1]]).int()
    mask = chosen_mask(index, torch.tensor([2, 0]).int(), 4)
    assert mask.tolist() == [[True, False, True, False], [False] * 4]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_gated_rows_by_hand(gated, threshold):
    torch.manual_seed(1)
    w = make(24, 50, torch.float32, gated, True, "silu")
    index, count = lists(50, [20, 0, 50])
    slots, wanted = torch.tensor([2, 0, 1, 2]), torch.tensor([5, 3, 60]).int()
    x, importance = torch.randn(4, 24), torch.rand(3, 50)
    least = None if threshold is None else torch.full((3,), threshold)
    result = gated_rows(x, w, index, count, slots, wanted, least, importance)
    for n, slot in enumerate(slots.tolist()):
        matrix, bias = (w.gate, w.gate_bias) if gated else (w.up, w.up_bias)
        score = [0.0] * 50
        for i in index[slot, : count[slot]].tolist():
            score[i] = abs(float(activation("silu", matrix[i] @ x[n] + bias[i]))) * float(importance[slot, i])
        want, cut = by_sorting(score, int(wanted[slot]), index.shape[1], threshold)
        assert result.index[n, : result.count[n]].tolist() == want
        assert float(result.cut[n]) == pytest.approx(cut, rel=1e-4)
    exact = naive(x, w, result.index, result.count, torch.arange(4))
    torch.testing.assert_close(result.out.double(), exact, rtol=1e-4, atol=1e-5)


def test_sketched_rows_compute_their_choice_exactly():
    torch.manual_seed(2)
    w = make(64, 90, torch.bfloat16, True, False, "gelu_tanh")
    sketch, importance = build_sketch(w, 1), torch.rand(2, 90)
    slots, wanted, x = torch.tensor([1, 0, 1]), torch.tensor([10, 40]).int(), torch.randn(3, 64).bfloat16()
    result = sketched_rows(x, w, sketch, slots, wanted, importance, 30)
    scores = sketch_scores(x, w, sketch, importance[slots])
    index, count, cut = chosen_rows(scores, wanted[slots], 30)
    assert torch.equal(result.index, index) and torch.equal(result.cut, cut)
    assert result.count.tolist() == [30, 10, 30] and result.out.dtype is torch.bfloat16
    exact = naive(x, w, index, count, torch.arange(3))
    torch.testing.assert_close(result.out.double(), exact, rtol=1e-2, atol=1e-2)
