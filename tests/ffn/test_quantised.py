"""Rows of 4 and 8 bits in plain torch: rounding, packing, estimates."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dartprune.ffn.quantised import nested_estimates, quantised_rows, rounded_inputs
from dartprune.ffn.row_format import GROUP, RowFormat, pack_down, pack_fields, rounded, unpack_down, unpack_fields
from ffn_cases import make

FORMS = [(4, True), (4, False), (8, True), (8, False)]


@pytest.mark.parametrize("hidden", [1, 31, 32, 100, 128, 256, 576, 640, 1000])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_what_is_packed_comes_back(hidden, width):
    layout = RowFormat(hidden, True, width, 0)
    codes = torch.randint(0, 1 << width, (5, layout.width), dtype=torch.uint8)
    packed = pack_fields(codes, width, layout)
    assert packed.shape == (5, layout.width * width // 8)
    assert torch.equal(unpack_fields(packed, width, layout), codes)
    if width > 2:
        assert torch.equal(unpack_down(pack_down(codes, width, layout), width, layout), codes)


@pytest.mark.parametrize(("bits", "nested"), FORMS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_weight_is_within_a_step_of_what_it_was(bits, nested, gated):
    weights = make(200, 9, torch.float32, gated, True, "silu")
    rows = quantised_rows(weights, bits, nested=nested)
    assert (rows.neurons, rows.hidden, rows.matrices) == (9, 200, 3 if gated else 2)
    assert rows.head.shape[1] % 64 == 0 and rows.tail.shape[1] % 64 == 0
    assert rows.row_bytes == rows.head.shape[1] + rows.tail.shape[1]
    assert rows.kind == f"{bits}-bit"
    for name in ("gate_bias", "up_bias", "down_bias"):
        mine, theirs = getattr(rows, name), getattr(weights, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    for name in ("gate", "up", "down"):
        before, after = getattr(weights, name), getattr(rows, name)
        if before is None:
            assert after is None
            continue
        assert after.dtype == before.dtype and after.shape == before.shape
        for first in range(0, 200, GROUP):
            part, other = before[:, first : first + GROUP].float(), after[:, first : first + GROUP].float()
            span = part.amax(1) - part.amin(1)
            # narrower ranges than the full one may be taken with 4 bits: their ends lie further away
            reach = span / (2**bits - 1) * (0.6 if bits == 8 else 3.5) + span * 0.01
            assert ((part - other).abs().amax(1) <= reach).all()


def test_rounding_to_4_bits_beats_the_full_range():
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    layout = RowFormat(256, False, 4, 0)
    codes, scales = rounded(weight, layout, 4)
    assert int(codes.max()) == 15 and int(codes.min()) == 0
    floats = scales[:, 16:].contiguous().view(torch.float32)
    step = scales[:, :8].float() * floats[:, :1]
    low = scales[:, 8:16].contiguous().view(torch.int8).float() * floats[:, 1:]
    found = codes.view(64, 8, GROUP) * step[..., None] + low[..., None]
    groups = weight.view(64, 8, GROUP)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    plain = ((groups - least) / (most - least) * 15).round() / 15 * (most - least) + least
    assert (found - groups).square().sum() < 0.95 * (plain - groups).square().sum()


def test_odd_weights_are_rounded_too():
    weight = torch.zeros(4, 64)
    weight[1] = 3.0  # all alike
    weight[2, 7] = 1e4  # one that is far away
    weight[3] = torch.arange(64) - 1000.0  # none near zero
    for bits in (4, 8):
        base = make(64, 4, torch.float32, False, False, "silu")
        rows = quantised_rows(dataclasses.replace(base, up=weight), bits)
        after = rows.up
        assert torch.isfinite(after).all()
        assert after[0].abs().max() < 1e-20
        torch.testing.assert_close(after[1], weight[1], rtol=0.01, atol=0)
        assert abs(float(after[2, 7]) / 1e4 - 1) < 0.3
        assert (after[3] - weight[3]).abs().max() < 0.1 * 64


def test_inputs_are_rounded_by_groups():
    x = torch.randn(3, 70) * torch.tensor([[1.0], [100.0], [0.0]])
    after = rounded_inputs(x)
    assert after.shape == x.shape and torch.equal(after[2], x[2])
    for first in (0, 32, 64):
        part = x[:, first : first + 32]
        assert ((part - after[:, first : first + 32]).abs() <= part.abs().amax(1, keepdim=True) / 127 / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_estimates_have_the_low_codes_in_the_middle(bits):
    weights = make(96, 12, torch.float32, True, False, "silu")
    rows = quantised_rows(weights, bits)
    x = torch.randn(2, 96)
    gate, up = nested_estimates(x, rows)
    exact = rounded_inputs(x) @ rows.up.float().t()
    steps = (2 ** (bits // 2) - 1) / 2  # how far a code may lie from the middle
    layout = rows.layout
    scales = rows.head[:, layout.offsets[7] :]
    step = scales[:, : layout.groups].float() * scales[:, 2 * layout.groups :][:, :4].contiguous().view(torch.float32)
    reach = rounded_inputs(x).abs().view(2, 3, 32).sum(-1) @ step[:, :3].t() * steps
    assert gate.shape == up.shape == (2, 12)
    assert ((up - exact).abs() <= reach + 1e-4).all()
    assert (up - exact).abs().mean() < 0.5 * reach.mean()
