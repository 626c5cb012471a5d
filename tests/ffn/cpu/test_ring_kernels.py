"""The kernel that stores a ring's rows against plain torch."""

from __future__ import annotations

import pytest
import torch

from dartprune.runtime.ring import EIGHT, Rings

pytest.importorskip("numba")


def rings(hidden, dtype, kernel):
    made = Rings(5, 4, hidden, dtype, torch.device("cpu"))
    made._has_kernel = kernel
    made.grow(3)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [1, 31, 64, 700])
def test_rows_are_rounded_as_torch_rounds_them(dtype, hidden):
    torch.manual_seed(hidden)
    ours, theirs = rings(hidden, dtype, True), rings(hidden, dtype, False)
    for factor in (1e-6, 1.0, 300.0):
        x = (torch.randn(3, 2, hidden) * factor * torch.randn(hidden).exp()).to(dtype)
        x[0, 0, ::3] = 0
        x[1] = torch.linspace(-448, 448, hidden)  # codes themselves, and what lies between two
        slots, places = torch.tensor([2, 0]), torch.tensor([3, 1])
        for each in (ours, theirs):
            each.keep(x, slots, places, [4, 0, 2])
            each.settle()
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales)
    assert ours.codes.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_prepared_is_not_compiled_by_a_token(dtype):
    from dartprune.ffn.cpu.ring_kernels import store_rows

    made = rings(64, dtype, True)
    made.prepare()
    before = len(store_rows.signatures)
    made.keep(torch.randn(5, 1, 64).to(dtype), torch.tensor([1]), torch.tensor([0]))
    made.settle()
    assert len(store_rows.signatures) == before > 0 and made.codes[1].any()


def test_every_float_of_8_bits_and_all_between_two():
    codes = torch.arange(127, dtype=torch.uint8).view(EIGHT).float()
    between = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([between * (1 - 2**-20), between, between * (1 + 2**-20), codes])
    x = torch.cat([near, -near])[None, None]  # the largest is 448: the scale is 1
    ours, theirs = rings(x.shape[2], torch.float32, True), rings(x.shape[2], torch.float32, False)
    for each in (ours, theirs):
        each.keep(x, torch.tensor([1]), torch.tensor([0]), [3])
        each.settle()
    assert torch.equal(ours.codes, theirs.codes) and float(ours.scales[1, 3, 0]) == 1.0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(wrong):
    x = torch.randn(1, 2, 64)
    x[0, 0, 5] = wrong
    ours, theirs = rings(64, torch.float32, True), rings(64, torch.float32, False)
    for each in (ours, theirs):
        each.keep(x, torch.tensor([1, 2]), torch.tensor([0, 0]), [3])
        each.settle()
    read = [each.codes.view(EIGHT).float() * each.scales[..., None] for each in (ours, theirs)]
    torch.testing.assert_close(*read, rtol=0, atol=0, equal_nan=True)
    assert read[0].isnan().any() and not read[0][2].isnan().any()
