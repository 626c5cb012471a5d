"""The per-token operators in plain torch against loops in double precision, and the choice against a sort."""

from __future__ import annotations

import random

import pytest
import torch

from dartprune.ffn.backend import activation
from dartprune.ffn.token_ops import (
    build_planes,
    build_sketch,
    chosen_mask,
    chosen_rows,
    gated_rows,
    quantise_input,
    sketch_dots,
    sketch_integers,
    sketch_scores,
    sketched_rows,
)
from ffn.test_cpu import lists, make, naive


def values(planes, hidden, signed=False):
    """Planes read bit by bit: a list of lists of ints."""
    rows, bits, _ = planes.shape
    result = []
    for r in range(rows):
        row = []
        for j in range(hidden):
            ones = [int(planes[r, k, j // 64]) >> (j % 64) & 1 for k in range(bits)]
            number = sum(bit << k for k, bit in enumerate(ones))
            row.append(number - (1 << bits) if signed and ones[-1] else number)
        result.append(row)
    return result


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_hold_the_nearest_levels(bits):
    torch.manual_seed(bits)
    weight = torch.randn(7, 130)
    weight[3] = 0
    sketch = build_planes(weight, bits)
    top = 2**bits - 1
    assert (sketch.bits, sketch.neurons, sketch.hidden) == (bits, 7, 130)
    assert sketch.bytes == 7 * bits * 3 * 8 + 7 * 4
    code = torch.tensor(values(sketch.planes, 130))
    levels = sketch.scale[:, None] * (2 * code - top)
    every = sketch.scale[:, None, None] * (2 * torch.arange(top + 1) - top)
    nearest = (weight[:, :, None] - every).abs().min(dim=2).values
    torch.testing.assert_close((weight - levels).abs(), nearest, atol=1e-6, rtol=0)
    assert sketch.scale[3] == 0
    # the bits past the end are 0, so that a count over whole words is right
    assert int((sketch.planes[:, :, -1] >> 2 & 0x3FFFFFFFFFFFFFFF).abs().max()) == 0
    if bits == 1:
        torch.testing.assert_close(sketch.scale, weight.abs().mean(dim=1))


def test_the_scale_is_the_best_of_its_neighbours():
    torch.manual_seed(0)
    weight = torch.randn(5, 256)
    for bits in (2, 3, 4):
        top = 2**bits - 1
        sketch = build_planes(weight, bits)

        def error(scale, top=top):
            code = torch.floor((weight / scale[:, None] + top + 1) / 2).clamp(0, top)
            return (weight - scale[:, None] * (2 * code - top)).square().sum(dim=1)

        for factor in (0.7, 0.85, 1.2, 1.5):
            assert (error(sketch.scale) < error(sketch.scale * factor)).all()


def test_more_bits_estimate_better():
    torch.manual_seed(0)
    weight, x = torch.randn(200, 256), torch.randn(1, 256)
    rounded = quantise_input(x, 8)
    truth = (x @ weight.T)[0]
    errors = [float((sketch_dots(rounded, build_planes(weight, b))[0] - truth).norm()) for b in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.25 * errors[0]


@pytest.mark.parametrize("activation_bits", [2, 4, 8])
@pytest.mark.parametrize("hidden", [5, 64, 131])
def test_rounded_input(activation_bits, hidden):
    torch.manual_seed(hidden)
    x = torch.randn(3, hidden)
    x[1] = 0
    result = quantise_input(x, activation_bits, 3)
    ints = torch.tensor(values(result.planes, hidden, signed=True))
    top = 2 ** (activation_bits - 1) - 1
    assert int(ints.abs().max()) <= top
    assert ints.sum(dim=1).tolist() == result.total.tolist()
    for n in (0, 2):
        largest = sorted(range(hidden), key=lambda j: (-abs(float(x[n, j])), j))[:3]
        assert result.outlier_index[n].tolist() == largest
        assert result.outlier_value[n].tolist() == [float(x[n, j]) for j in largest]
        rest = [j for j in range(hidden) if j not in largest]
        assert not ints[n, largest].any()
        inside = x[n, rest].abs() <= result.step[n] * (top + 0.5)
        error = (x[n, rest] - ints[n, rest] * result.step[n]).abs()
        assert (error[inside] <= result.step[n] * 0.5001).all()
        assert (ints[n, rest][~inside].abs() == top).all()
    assert result.step[1] == 0 and not ints[1].any()


def test_one_dimension_a_hundred_times_the_others():
    torch.manual_seed(0)
    weight, x = torch.randn(300, 256), torch.randn(2, 256)
    plain = sketch_dots(quantise_input(x), build_planes(weight, 4))
    x[:, 17] *= 100
    # what the 4 bits lose is what they lose without the outlier
    sketch = build_planes(weight, 4)
    error = sketch_dots(quantise_input(x), sketch) - x @ weight.T
    error -= (x[:, 17, None]) * (_column(sketch, 17) - weight[:, 17])
    small = x.clone()
    small[:, 17] = 0
    assert error.norm() < 0.2 * (small @ weight.T).norm()
    # and with no entry kept exact they would lose everything else
    lost = sketch_dots(quantise_input(x, 4, 0), sketch) - x @ weight.T
    assert lost.norm() > 3 * error.norm()
    assert plain.isfinite().all()


def _column(sketch, j):
    code = torch.tensor(values(sketch.planes, sketch.hidden))[:, j]
    return sketch.scale * (2 * code - (2**sketch.bits - 1))


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("activation_bits", [2, 4, 8])
def test_integers_by_hand(bits, activation_bits):
    torch.manual_seed(bits)
    sketch = build_planes(torch.randn(6, 70), bits)
    rounded = quantise_input(torch.randn(2, 70), activation_bits)
    code, ints = values(sketch.planes, 70), values(rounded.planes, 70, signed=True)
    top = 2**bits - 1
    want = [[sum((2 * q - top) * v for q, v in zip(code[i], ints[n], strict=True)) for i in range(6)] for n in range(2)]
    got = sketch_integers(rounded, sketch)
    assert got.dtype is torch.int32 and got.tolist() == want
    dots = sketch_dots(rounded, sketch)
    for n in range(2):
        exact = sum(
            v * (2 * torch.tensor([code[i][j] for i in range(6)]) - top)
            for j, v in zip(rounded.outlier_index[n].tolist(), rounded.outlier_value[n].tolist(), strict=True)
        )
        torch.testing.assert_close(dots[n], (torch.tensor(want[n]) * rounded.step[n] + exact) * sketch.scale)


@pytest.mark.parametrize("gated", [True, False])
def test_scores_by_hand(gated):
    torch.manual_seed(0)
    w = make(40, 30, torch.bfloat16, gated, True, "gelu")
    sketch = build_sketch(w, 2)
    assert sketch.bytes == (2 if gated else 1) * sketch.up.bytes and (sketch.gate is None) is not gated
    x, importance = torch.randn(3, 40), torch.rand(1, 30)
    rounded = quantise_input(x)
    u = sketch_dots(rounded, sketch.up) + w.up_bias.float()
    if gated:
        a = activation("gelu", sketch_dots(rounded, sketch.gate) + w.gate_bias.float()) * u
    else:
        a = activation("gelu", u)
    torch.testing.assert_close(sketch_scores(x, w, sketch, importance), a.abs() * importance)


def by_sorting(scores, wanted, width, threshold):
    """One row, in Python: the chosen, ascending, and the cut."""
    ranked = sorted((i for i, s in enumerate(scores) if s != 0), key=lambda i: (-scores[i], i))
    own = ranked[: max(wanted, 0)]
    take = own if threshold is None else [i for i in ranked if scores[i] >= threshold]
    return sorted(take[:width]), scores[own[-1]] if own else float("inf")


@pytest.mark.parametrize("seed", range(60))
def test_chosen_rows_against_a_sort(seed, choose=chosen_rows):
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


def test_what_is_refused():
    w = make(8, 10, torch.float32, True, False, "silu")
    with pytest.raises(ValueError, match="bits=5"):
        build_planes(w.up, 5)
    with pytest.raises(ValueError, match="activation_bits=1 "):
        build_sketch(w, 1, activation_bits=1)
    with pytest.raises(ValueError, match="outliers=9 "):
        build_sketch(w, 1, outliers=9)
