"""Budgets against the published table, their invariants, and tables given by hand."""

from __future__ import annotations

import warnings

import pytest
import torch

from dartprune.budget import DepthAware, Table, Uniform, depth_aware, distribute, keep_counts, parse_table

# what the authors publish: the share that each layer of Llama-3.1-8B keeps at 50 %
PUBLISHED = torch.tensor(
    [
        0.8864,
        0.7743,
        0.7547,
        0.7199,
        0.7534,
        0.8033,
        0.7902,
        0.7423,
        0.7213,
        0.6537,
        0.6480,
        0.6309,
        0.6044,
        0.5859,
        0.5832,
        0.5181,
        0.4282,
        0.3293,
        0.2601,
        0.2263,
        0.1817,
        0.1186,
        0.1015,
        0.1010,
        0.1010,
        0.1095,
        0.1104,
        0.2221,
        0.3671,
        0.5515,
        0.7218,
        0.9,
    ]
)


def test_the_published_table_at_seventy_percent():
    pressure = 1 - PUBLISHED.double()
    pressure[-1] = 0.0
    keep = 1 - distribute(pressure, 0.7)
    expected = {0: 0.783, 8: 0.467, 14: 0.203, 29: 0.143, 30: 0.468, 31: 0.9} | dict.fromkeys(range(15, 29), 0.1)
    for layer, value in expected.items():
        assert round(float(keep[layer]), 3) == value, layer
    assert float(keep.mean()) == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 32])
def test_the_mean_is_the_sparsity(layers):
    generator = torch.Generator().manual_seed(layers)
    for sparsity in [0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.85, 0.9, 0.95, 0.99]:
        for _ in range(20):
            s = torch.rand(layers, generator=generator) ** 4 * 100
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruned = depth_aware(s, sparsity)
            assert pruned.dtype is torch.float32 and torch.isfinite(pruned).all()
            assert float(pruned.double().mean()) == pytest.approx(sparsity, abs=1e-5)
            assert float(pruned.min()) >= min(0.1, sparsity) - 1e-6 and float(pruned.max()) <= max(0.9, sparsity) + 1e-6


def test_bounds_that_are_too_narrow_are_widened_with_a_warning():
    with pytest.warns(UserWarning, match=r"0\.95 lies outside of the layer bounds \[0\.1, 0\.9\]"):
        assert float(depth_aware(torch.rand(8), 0.95).mean()) == pytest.approx(0.95)
    with pytest.warns(UserWarning, match=r"0\.05 lies outside"):
        depth_aware(torch.rand(8), 0.05)


def test_sensitive_and_outer_layers_are_spared():
    s = torch.ones(20)
    s[10] = 5.0
    pruned = depth_aware(s, 0.5)
    assert pruned.argmin() == 10
    assert pruned[0] < pruned[2] < pruned[6] and pruned[19] < pruned[17]


def test_alike_sensitivities_count_as_equal():
    noise = 1 + 0.004 * torch.rand(12)
    assert torch.allclose(depth_aware(noise, 0.5), depth_aware(torch.ones(12), 0.5))
    flat = DepthAware(depth_protection=False)(noise, torch.ones(12), 0.5, [100] * 12)
    assert torch.allclose(flat, torch.full((12,), 0.5))


def test_no_pressure_at_all_is_uniform():
    assert torch.equal(distribute(torch.zeros(5), 0.4), torch.full((5,), 0.4))
    assert torch.equal(distribute(torch.tensor([3.0]), 0.4), torch.full((1,), 0.4))
    assert torch.isfinite(depth_aware(torch.tensor([float("nan"), 1.0, 2.0]), 0.5)).all()


def test_residue_goes_to_layers_without_pressure_when_the_others_are_full():
    pruned = distribute(torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.5)
    assert float(pruned.mean()) == pytest.approx(0.5)
    assert pruned[0] == pytest.approx(0.9) and torch.allclose(pruned[1:], pruned[1])


def test_kinds():
    angle, change = torch.tensor([0.5, 1.0, 0.2]), torch.tensor([0.1, 3.0, 1.0])
    both = DepthAware()(angle, change, 0.5, [10] * 3)
    assert torch.allclose(both, depth_aware(angle * change, 0.5))
    assert torch.allclose(DepthAware(magnitude_factor=False)(angle, change, 0.5, [10] * 3), depth_aware(angle, 0.5))
    assert torch.equal(Uniform()(angle, change, 0.5, [10] * 3), torch.full((3,), 0.5))
    assert keep_counts(torch.tensor([0.3, 0.9, 0.0]), [10, 11, 12]) == [7, 1, 12]


def test_tables():
    neurons = [100, 200, 100, 100]
    table = parse_table("all:0.5, 1-2:0.25, 3:40", neurons)
    assert torch.allclose(table, torch.tensor([0.5, 0.75, 0.75, 0.6]))
    assert torch.allclose(Table("all:1.0")(table, table, 0.7, neurons), torch.zeros(4))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("0:0.5", "no share for layer 1"),
        ("0-9:0.5", "'0-9:0.5' names layer 9, but the model has layers 0 to 3"),
        ("3-1:0.5,all:1.0", "backwards"),
        ("all:1.2", "keeps more than"),
        ("all:101", "keeps more than the 100 neurons of layer 0"),
        ("all=0.5", "cannot be read"),
        ("", "cannot be read"),
        ("all:-0.5", "cannot be read"),
    ],
)
def test_bad_tables(table, message):
    with pytest.raises(ValueError, match=message):
        parse_table(table, [100, 200, 100, 100])


def test_bad_settings():
    with pytest.raises(ValueError, match=r"early_width must lie in \[0, 1\], got 2"):
        DepthAware(early_width=2)
    with pytest.raises(ValueError, match="is above max_sparsity"):
        DepthAware(min_sparsity=0.9, max_sparsity=0.1)
