"""The kernel that rounds rows against its reference in torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from dartprune.ffn.cpu.rounding import rounded as kernel
from dartprune.ffn.quantised import quantised_rows
from dartprune.ffn.row_format import RowFormat, rounded, row_values
from dartprune.ffn.weights import FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("seed", range(60))
def test_codes_and_scales_are_those_of_the_reference(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    bits, hidden, rows = draw(2, 9), draw(1, 700), draw(1, 40)
    layout = RowFormat(hidden, True, bits // 2, bits - bits // 2)
    matrix = torch.randn(rows, hidden, generator=generator) * torch.rand(rows, 1, generator=generator)
    matrix[draw(0, rows)] = 0.0  # a row of nothing, one of a constant, and one weight far from all others
    matrix[draw(0, rows)] = 0.25
    matrix[draw(0, rows), draw(0, hidden)] = 300.0
    matrix = matrix.to(DTYPES[seed % 3])
    codes, scales = kernel(matrix, layout, bits)
    want_codes, want_scales = rounded(matrix, layout, bits)
    assert torch.equal(scales[:, -8:], want_scales[:, -8:]), "the floats of each row"
    # one range in a thousand may be as good as another to rounding, and one code lie in the middle of two
    assert (scales == want_scales).float().mean() > 0.995 and (codes == want_codes).float().mean() > 0.99
    exact = matrix.double()
    ours, theirs = (
        (row_values(*pair, layout) - exact).square().sum(1) for pair in ((codes, scales), (want_codes, want_scales))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_an_ffn_are_the_same_by_either(bits):
    generator = torch.Generator().manual_seed(bits)
    parts = [torch.randn(50, 96, generator=generator) for _ in range(3)]
    weights = FFNWeights(*parts, None, None, None, "silu", torch.nn.functional.silu)
    ours, theirs = (quantised_rows(weights, bits, round_matrix=by) for by in (kernel, rounded))
    for role in ("gate", "up", "down"):
        a, b = ours.unpacked(role), theirs.unpacked(role)
        assert (a != b).float().mean() < 0.01 and (a - b).abs().max() < 0.5
