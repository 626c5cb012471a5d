"""The sketch in plain torch against loops over bits and weights."""

from __future__ import annotations

import pytest
import torch

from dartprune.ffn.backend import activation
from dartprune.ffn.sketch import (
    build_planes,
    build_sketch,
    quantise_input,
    sketch_dots,
    sketch_integers,
    sketch_scores,
)
from ffn_cases import make


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


def test_what_is_refused():
    w = make(8, 10, torch.float32, True, False, "silu")
    with pytest.raises(ValueError, match="bits=5"):
        build_planes(w.up, 5)
    with pytest.raises(ValueError, match="activation_bits=1 "):
        build_sketch(w, 1, activation_bits=1)
    with pytest.raises(ValueError, match="outliers=9 "):
        build_sketch(w, 1, outliers=9)
