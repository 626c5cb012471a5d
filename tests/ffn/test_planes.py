"""Bit planes made by Numba against those made by plain torch."""

from __future__ import annotations

import random

import pytest
import torch

from dartprune.ffn import planes, sketch
from dartprune.ffn.sketch import SketchPlanes


def values(of: SketchPlanes) -> torch.Tensor:
    """The rounded weights, float32 [I, H]."""
    place = torch.arange(64)
    bits = (of.planes[..., None] >> place & 1).flatten(2)[..., : of.hidden]
    code = (bits << torch.arange(of.bits)[:, None]).sum(1)
    return of.scale[:, None] * (2 * code - (2**of.bits - 1))


@pytest.mark.parametrize("seed", range(12))
def test_both_ways_round_alike(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    bits = rng.choice(sketch.SKETCH_BITS)
    hidden, neurons = rng.choice([1, 63, 64, 65, 200, 1000]), rng.choice([1, 2, 33])
    weight = torch.randn(neurons, hidden) * torch.rand(neurons, 1) * 10 ** rng.uniform(-4, 3)
    if rng.random() < 0.5:
        weight = weight**3  # heavy tails
    weight = weight.to(rng.choice([torch.float32, torch.float16, torch.bfloat16]))
    if rng.random() < 0.3:
        weight = weight.t().contiguous().t()  # rows that are not contiguous
    weight[rng.randrange(neurons)] = 0
    quick, plain = planes.build_planes(weight, bits), sketch.build_planes(weight, bits)
    assert quick.planes.shape == plain.planes.shape and quick.bits == bits
    torch.testing.assert_close(quick.scale, plain.scale, rtol=1e-5, atol=0)
    wide = weight.float()
    errors = [(values(each) - wide).square().sum(1) for each in (quick, plain)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-12)
    same = (quick.planes == plain.planes).float().mean()
    assert same > 0.97  # a weight between two levels may fall to either side


def test_one_bit_is_the_sign():
    weight = torch.randn(5, 130)
    made = planes.build_planes(weight, 1)
    torch.testing.assert_close(values(made), weight.sign() * weight.abs().mean(1, keepdim=True))


def test_rows_do_not_depend_on_blocks_or_threads(monkeypatch):
    weight = torch.randn(37, 96)
    whole = planes.build_planes(weight, 2)
    monkeypatch.setattr(planes, "_BLOCK", 500)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    parts = planes.build_planes(weight, 2)
    assert torch.equal(whole.planes, parts.planes) and torch.equal(whole.scale, parts.scale)


def test_without_numba_torch_does_it(monkeypatch):
    weight = torch.randn(3, 70)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "dartprune.ffn.cpu.planes", None)
    assert torch.equal(planes.build_planes(weight, 3).planes, sketch.build_planes(weight, 3).planes)


def test_bits_are_checked():
    with pytest.raises(ValueError, match="bits=5 is not one of"):
        planes.build_planes(torch.randn(2, 8), 5)
