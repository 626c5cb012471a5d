"""Budgets against the published table, their invariants, and tables given by hand."""

from __future__ import annotations

import warnings

import pytest
import torch

from dartprune.budget import (
    BudgetFacts,
    DepthAware,
    Global,
    Table,
    Uniform,
    budget_kinds,
    depth_aware,
    distribute,
    keep_counts,
    parse_table,
    rank,
    sensitivity,
    uniform,
)

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
    flat = DepthAware(depth_protection=False).pruned(BudgetFacts(noise, torch.ones(12), [100] * 12), 0.5)
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
    both = DepthAware().pruned(BudgetFacts(angle, change, [10] * 3), 0.5)
    assert torch.allclose(both, depth_aware(angle * change, 0.5, min_sparsity=0.0))
    paper = DepthAware(min_sparsity=0.1)
    assert torch.allclose(paper.pruned(BudgetFacts(angle, change, [10] * 3), 0.5), depth_aware(angle * change, 0.5))
    angle_alone = DepthAware(magnitude_factor=False, min_sparsity=0.1)
    assert torch.allclose(angle_alone.pruned(BudgetFacts(angle, change, [10] * 3), 0.5), depth_aware(angle, 0.5))
    assert torch.equal(Uniform().pruned(BudgetFacts(angle, change, [10] * 3), 0.5), torch.full((3,), 0.5))
    assert keep_counts(torch.tensor([0.3, 0.9, 0.0]), [10, 11, 12]) == [7, 1, 12]


def test_tables():
    neurons = [100, 200, 100, 100]
    table = parse_table("all:0.5, 1-2:0.25, 3:40", neurons)
    assert torch.allclose(table, torch.tensor([0.5, 0.75, 0.75, 0.6]))
    assert torch.allclose(Table("all:1.0").pruned(BudgetFacts(table, table, neurons), 0.7), torch.zeros(4))


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


def naive_pressure(s, early_width=0.3, late_width=0.15, early_floor=0.25, late_floor=0.35):
    """Steps 1 and 2 one layer at a time."""
    low, high, mean = min(s), max(s), sum(s) / len(s)
    out = []
    for layer, value in enumerate(s):
        readiness = 1 - (value - low) / (high - low + 1e-6 * mean)
        z = layer / (len(s) - 1)
        depth = 1.0
        if z < early_width:
            depth = early_floor + (1 - early_floor) * z / early_width
        elif z > 1 - late_width:
            depth = late_floor + (1 - late_floor) * (1 - z) / late_width
        out.append(readiness * depth)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_depth_aware_against_the_equations_one_layer_at_a_time(seed):
    g = torch.Generator().manual_seed(seed)
    layers = int(torch.randint(2, 50, (1,), generator=g))
    s = torch.rand(layers, generator=g).double() + 0.01
    pressure = torch.tensor(naive_pressure(s.tolist()), dtype=torch.float64)
    torch.testing.assert_close(depth_aware(s, 0.6), distribute(pressure, 0.6))
    # away from every bound, shares are in proportion to the pressure
    free = depth_aware(s, 0.1, min_sparsity=0.0, max_sparsity=1.0)
    torch.testing.assert_close(free, (0.1 * layers * pressure / pressure.sum()).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["even", "many zeros", "huge range", "one layer carries all", "tiny"])
def test_the_mean_holds_for_pressures_of_every_kind(kind):
    g = torch.Generator().manual_seed(7)
    for case in range(40):
        layers = int(torch.randint(1, 48, (1,), generator=g))
        p = torch.rand(layers, generator=g).double()
        if kind == "many zeros":
            p *= torch.rand(layers, generator=g) < 0.3
        elif kind == "huge range":
            p = 10 ** (60 * p - 30)
        elif kind == "one layer carries all":
            p *= 1e-12
            p[case % layers] = 1.0
        elif kind == "tiny":
            p *= 1e-300
        for sparsity in (i / 20 for i in range(20)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruned = distribute(p, sparsity).double()
            assert torch.isfinite(pruned).all()
            assert float(pruned.mean()) == pytest.approx(sparsity, abs=1e-6), (layers, sparsity)
            assert float(pruned.min()) >= min(0.1, sparsity) - 1e-6
            assert float(pruned.max()) <= max(0.9, sparsity) + 1e-6


def test_within_the_bounds_there_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sparsity in (0.0, 0.1, 0.5, 0.9):
            depth_aware(torch.rand(8), sparsity)


def test_one_layer_gets_the_target():
    for sparsity in (0.1, 0.5, 0.9):
        assert depth_aware(torch.tensor([4.0]), sparsity).tolist() == pytest.approx([sparsity])


def test_all_alike_means_a_spread_under_one_percent():
    base = torch.full((12,), 2.0)
    under, over = base.clone(), base.clone()
    under[5] += 0.019
    over[5] += 0.021
    options = {"early_width": 0.0, "late_width": 0.0}
    assert torch.allclose(depth_aware(under, 0.5, **options), torch.full((12,), 0.5))
    assert depth_aware(over, 0.5, **options)[5] == pytest.approx(0.1)
    protected = depth_aware(under, 0.5)
    assert protected[0] < protected[5] > protected[-1], "depth protection stays"


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, float("inf"), float("nan")])
def test_sensitivities_of_any_size_never_give_a_nan(value):
    for s in (torch.full((6,), value), torch.tensor([value, 1.0, 2.0, 3.0, 4.0, 5.0])):
        pruned = depth_aware(s, 0.5)
        assert torch.isfinite(pruned).all()
        assert float(pruned.mean()) == pytest.approx(0.5, abs=1e-6)


def test_a_rounding_error_below_zero_counts_as_zero():
    s = torch.tensor([-1e-8, 0.0, 0.5, 1.0])
    assert torch.equal(depth_aware(s, 0.5), depth_aware(s.clamp_min(0), 0.5))


def test_sensitivity_is_the_product():
    assert torch.allclose(sensitivity(torch.tensor([0.5, 2.0]), torch.tensor([4.0, 0.1])), torch.tensor([2.0, 0.2]))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_sparsities_that_make_no_sense(sparsity):
    for give in (lambda: depth_aware(torch.rand(4), sparsity), lambda: uniform(4, sparsity)):
        with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\), got"):
            give()


def test_bounds_that_contradict_each_other():
    for low, high in ((0.8, 0.2), (-0.1, 0.9), (0.1, 1.1), (float("nan"), 0.9)):
        with pytest.raises(ValueError, match="layer bounds must satisfy"):
            depth_aware(torch.rand(4), 0.5, min_sparsity=low, max_sparsity=high)


@pytest.mark.parametrize(
    ("table", "keep"),
    [
        ("all:0.5", [0.5, 0.5, 0.5, 0.5]),
        ("all:1.", [1.0, 1.0, 1.0, 1.0]),
        ("all:.25", [0.25, 0.25, 0.25, 0.25]),
        ("0-3:0.5,2:0.75", [0.5, 0.5, 0.75, 0.5]),
        ("2:0.75,all:0.5", [0.5, 0.5, 0.5, 0.5]),
        ("0:0.9,1:0.82,2-2:0.5,3:20", [0.9, 0.82, 0.5, 0.2]),
        ("all:0", [0.0, 0.0, 0.0, 0.0]),
        ("all:1,1:200", [0.01, 1.0, 0.01, 0.01]),  # without a point: numbers of neurons
        (" all : 0.5 , 3 : 0.0 ", [0.5, 0.5, 0.5, 0.0]),
    ],
)
def test_good_tables(table, keep):
    neurons = [100, 200, 100, 100]
    pruned = parse_table(table, neurons)
    assert pruned.dtype is torch.float32
    assert torch.allclose(1 - pruned, torch.tensor(keep))


def test_counts_come_back_as_they_were_given():
    neurons = [14336] * 40
    for count in (0, 1, 1200, 4301, 14335, 14336):
        assert keep_counts(parse_table(f"all:{count}", neurons), neurons) == [count] * 40


@pytest.mark.parametrize(
    ("table", "quoted"),
    [
        ("all:0.5,4:0.5", "'4:0.5'"),
        ("all:0.5,2-4:0.5", "'2-4:0.5'"),
        ("all:0.5,3-1:0.2", "'3-1:0.2'"),
        ("all:0.5,0:1.01", "'0:1.01'"),
        ("all:0.5,1:201", "'1:201'"),
        ("all:0.5,-1:0.5", "'-1:0.5'"),
        ("all:0.5,0:", "'0:'"),
        ("all:0.5,0", "'0'"),
        ("all:0.5,0:nan", "'0:nan'"),
        ("all:0.5,0:1e-1", "'0:1e-1'"),
        ("all:0.5,0:50%", "'0:50%'"),
        ("all:0.5,0-1-2:0.5", "'0-1-2:0.5'"),
        ("all:0.5,every:0.5", "'every:0.5'"),
        ("all:0.5,", "''"),
        ("0-2:0.5", "layer 3"),
        ("1-3:0.5", "layer 0"),
    ],
)
def test_errors_quote_the_entry_in_one_line(table, quoted):
    with pytest.raises(ValueError) as caught:
        parse_table(table, [100, 200, 100, 100])
    assert quoted in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_is_read_when_it_is_made():
    with pytest.raises(ValueError, match="budget entry 'rubbish' cannot be read"):
        Table("all:0.5,rubbish")
    with pytest.raises(ValueError, match=r"'3-1:0\.5' names the range backwards: write 1-3"):
        Table("3-1:0.5")
    with pytest.raises(TypeError, match=r"keep must be text .* got 0\.5"):
        Table(0.5)
    with pytest.raises(ValueError, match="early_width must lie in"):
        DepthAware(early_width="wide")


def test_budgets_are_known_by_their_kind():
    assert budget_kinds.names() == ["depth-aware", "global", "table", "uniform"]
    assert budget_kinds.get("table") is Table and budget_kinds.name_of(DepthAware) == "depth-aware"
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        budget_kinds.get("uniformly")


def test_without_depth_protection_only_sensitivity_counts():
    angle = torch.linspace(1, 2, 9)
    pruned = DepthAware(depth_protection=False).pruned(BudgetFacts(angle, torch.ones(9), [10] * 9), 0.4)
    assert (pruned[:-1] >= pruned[1:]).all() and pruned[0] > pruned[-1]


def test_spread_draws_the_layers_together():
    angle, change, neurons = torch.tensor([0.9, 0.2, 0.3, 0.6]), torch.ones(4), [100] * 4
    paper, half, flat = (
        DepthAware(spread=spread).pruned(BudgetFacts(angle, change, neurons), 0.6) for spread in (1.0, 0.5, 0.0)
    )
    torch.testing.assert_close(half, (paper + 0.6) / 2)
    torch.testing.assert_close(flat, torch.full((4,), 0.6))
    assert float(paper.std()) > 0.05
    with pytest.raises(ValueError, match=r"spread must lie in \[0, 1\]"):
        DepthAware(spread=1.5)


@pytest.mark.parametrize("seed", range(8))
def test_one_ranking_keeps_the_highest_of_all_layers(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(n) for n in torch.randint(1, 60, (5,), generator=generator)]
    parts = [torch.rand(n, generator=generator) * 10.0**k for k, n in enumerate(sizes)]
    sparsity = float(torch.rand((), generator=generator))
    kept = round((1 - sparsity) * sum(sizes))
    order = sorted(((float(v), layer) for layer, part in enumerate(parts) for v in part), reverse=True)
    wanted = [sum(layer == n for _, layer in order[:kept]) for n in range(5)]
    assert keep_counts(rank(parts, sparsity), sizes) == wanted
    assert sum(wanted) == kept


def test_a_layer_keeps_its_share_in_any_case():
    parts = [torch.ones(100), torch.full((100,), 9.0), torch.full((50,), 5.0)]
    none, sizes = torch.zeros(3), [100, 100, 50]
    assert keep_counts(rank(parts, 0.5), [100, 100, 50]) == [0, 100, 25]
    assert keep_counts(Global(max_sparsity=0.9).pruned(BudgetFacts(none, none, sizes, parts), 0.5), [100, 100, 50]) == [
        10,
        100,
        15,
    ]
    assert keep_counts(rank(parts, 0.5, max_sparsity=0.2), [100, 100, 50]) == [50, 50, 25]  # the bound is widened
    parts[0][7] = torch.nan
    assert keep_counts(rank(parts, 0.5), [100, 100, 50]) == [1, 100, 24]  # what is wrong must show
    for wrong in (1.5, -0.1, True, "most"):
        with pytest.raises(ValueError, match=r"Global: max_sparsity must lie in \[0, 1\]"):
            Global(max_sparsity=wrong)
