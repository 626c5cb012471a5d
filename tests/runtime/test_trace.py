"""Statistics against naive loops: blocks, padding, half precision, blending; rings; selections; rows."""

from __future__ import annotations

import pytest
import torch

import dartprune.runtime.trace as trace_module
from dartprune.model.rows import Phase, Rows
from dartprune.runtime.ring import Rings
from dartprune.runtime.selection import LayerSelection
from dartprune.runtime.trace import STATISTICS, LayerTrace, impact_terms

CPU = torch.device("cpu")
ALL = tuple(STATISTICS)


def naive(a, weight, decay):
    """One line's statistics, token by token, in double precision."""
    out = {name: torch.zeros(a.shape[-1], dtype=torch.float64) for name in ALL}
    for t in range(a.shape[0]):
        if weight[t] == 0:
            continue
        x = a[t].double()
        unit = x / x.norm()
        out["energy"] += x**2
        out["normalised_energy"] += unit**2
        out["normalised_peak"] = torch.maximum(out["normalised_peak"], unit.abs())
        out["average"] = decay * out["average"] + (1 - decay) * x.abs()
        out["total"] += x
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 1 << 19])
def test_statistics_against_a_loop(dtype, chunk, monkeypatch):
    monkeypatch.setattr(trace_module, "CHUNK", chunk)
    trace = LayerTrace(ALL, 13, 0.6, CPU)
    trace.grow(5)
    slots = torch.tensor([3, 1])
    blocks = [(300 * torch.randn(2, n, 13)).to(dtype) for n in (7, 1, 4)]
    weights = [(torch.rand(2, n) > 0.3).float() for n in (7, 1, 4)]
    for a, w in zip(blocks, weights, strict=True):
        spoiled = a.clone()
        spoiled[w == 0] = float("nan")
        trace.add(spoiled, slots, w, padded=True)
    whole, weight = torch.cat(blocks, 1), torch.cat(weights, 1)
    for line, slot in enumerate(slots.tolist()):
        for name, want in naive(whole[line], weight[line], 0.6).items():
            got = trace.tensors()[name][slot]
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-3, msg=name)
        assert trace.tokens[slot] == weight[line].sum()
    assert trace.energy[0].abs().sum() == 0


def test_without_padding_the_weights_alone_decide():
    one, two = (LayerTrace(ALL, 13, 0.6, CPU) for _ in range(2))
    a, w = torch.randn(2, 9, 13), (torch.rand(2, 9) > 0.3).float()
    for trace, padded in ((one, True), (two, False)):
        trace.grow(2)
        trace.add(a, torch.tensor([0, 1]), w, padded=padded)
    for name in ALL:
        torch.testing.assert_close(one.tensors()[name], two.tensors()[name])


def test_blending():
    trace = LayerTrace(("energy", "total", "average", "normalised_peak"), 5, 0.5, CPU)
    trace.grow(2)
    slots = torch.tensor([0, 1])
    old, new = torch.randn(2, 6, 5), torch.randn(2, 4, 5)
    weight = torch.ones(2, 6)
    weight[1] = 0  # slot 1 has nothing to remember
    trace.add(old, slots, weight)
    peak = trace.normalised_peak.clone()
    trace.blend(new, slots, torch.ones(2, 4), memory=0.25)
    want = (0.25 * old[0].square().mean(0) + 0.75 * new[0].square().mean(0)) * 10
    torch.testing.assert_close(trace.energy[0], want)
    torch.testing.assert_close(trace.energy[1], new[1].square().sum(0))
    fresh = (new / new.norm(dim=-1, keepdim=True)).abs().amax(1)
    torch.testing.assert_close(trace.normalised_peak, torch.maximum(0.25 * peak, fresh))
    assert trace.tokens.tolist() == [10, 4]


def test_impact_terms():
    y, z = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    terms = impact_terms(y.bfloat16(), z.bfloat16(), residual=False)
    y, z = y.bfloat16().double(), z.bfloat16().double()
    cos = (y * z).sum(-1) / (y.norm(dim=-1) * z.norm(dim=-1))
    torch.testing.assert_close(terms[..., 0].double(), 1 - cos, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms[..., 1].double(), (z - y).norm(dim=-1) / y.norm(dim=-1), rtol=1e-4, atol=1e-5)
    after = impact_terms(y.float(), z.float(), residual=True)
    torch.testing.assert_close(after[..., 1].double(), z.norm(dim=-1) / y.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(impact_terms(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), residual=False)).all()
    torch.testing.assert_close(terms[..., 2].double(), y.square().sum(-1).log(), rtol=1e-4, atol=1e-5)
    made = impact_terms(y.float(), 3 * z.float(), residual=True, raw=z.float())  # a factor after the projection
    torch.testing.assert_close(made[..., 2].double(), (y.square().sum(-1) / 9).log(), rtol=1e-4, atol=1e-5)
    trace = LayerTrace((), 1, 0.5, CPU)
    trace.grow(1)
    weight, traced = torch.tensor([[1.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    trace.add_impact(terms[:1], torch.tensor([0]), weight, traced)
    torch.testing.assert_close(trace.impact[0, :2], terms[0, [0, 2, 3], :2].sum(0))
    torch.testing.assert_close(trace.impact[0, 3], terms[0, [2, 3], 2].sum())
    assert trace.impact[0, 2] == 3 and trace.impact[0, 4] == 2


@pytest.mark.parametrize("residual", [False, True])
def test_impact_terms_in_blocks_are_those_of_the_whole(residual, monkeypatch):
    y, z, raw = (torch.randn(2, 9, 8).bfloat16() for _ in range(3))
    whole = impact_terms(y, z, residual=residual, raw=raw)
    monkeypatch.setattr(trace_module, "IMPACT_CHUNK", 3 * 8)
    assert torch.equal(impact_terms(y, z, residual=residual, raw=raw), whole)


def test_selection_writes_in_place():
    for masks in (True, False):
        selection = LayerSelection(6, 4, CPU, masks=masks)
        selection.grow(3)
        address = selection.index.data_ptr()
        assert selection.rows_mask(torch.tensor([0, 2])).all()
        assert selection.write(2, torch.tensor([1, 3], dtype=torch.int32), None) == 0  # everything was kept before
        assert selection.write(2, torch.tensor([0, 3, 5], dtype=torch.int32), 2) == 2
        assert selection.write(1, torch.tensor([], dtype=torch.int32), None) == 0
        mask = selection.rows_mask(torch.tensor([2, 0, 1]))
        assert mask.tolist() == [[True, False, False, True, False, True], [True] * 6, [False] * 6]
        assert selection.kept(2, 3).tolist() == [0, 3, 5]
        selection.open([2])
        assert selection.rows_mask(torch.tensor([2])).all()
        assert selection.index.data_ptr() == address
        selection.move(torch.tensor([1]), torch.tensor([0]))
        assert not selection.rows_mask(torch.tensor([0])).any()


def test_rows_and_rings():
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    rows = Rows(Phase.PREFILL, (4, 2), 5, valid)
    assert rows.counts() == [3, 5]
    assert rows.weight([1, 0]).tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    rings = Rings(2, 4, 1, torch.float32, CPU)
    rings.grow(5)
    ring = rings.layers[1]
    x = torch.arange(10.0)[:, None]
    ring.write(x, *rows.tail(4, [3, 0]))
    # tokens 2, 3, 4 at places 3, 0, 1
    assert ring.read(torch.tensor([4]), torch.arange(4)[None])[0, :, 0].tolist() == [3, 4, 0, 2]
    assert ring.read(torch.tensor([2]), torch.arange(4)[None])[0, :, 0].tolist() == [9, 6, 7, 8]
    one = Rows(Phase.DECODE, (2,), 1)
    ring.write(x[:1], *one.tail(4, [1]))
    assert ring.read(torch.tensor([2]), torch.tensor([[2, 3, 0, 1]]))[0, :, 0].tolist() == [7, 8, 9, 0]
    assert not rings.codes[:, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_ring_remembers_to_eight_bits(dtype):
    x = torch.randn(6, 40).to(dtype)
    x[1, 3] = 900.0  # the outlier dimension of a large model
    x[2] = 0.0
    x[3] *= 1e-4
    rings = Rings(1, 6, 40, dtype, CPU)
    rings.grow(1)
    (ring,) = rings.layers
    slots = torch.zeros(6, dtype=torch.int64)
    ring.write(x, torch.arange(6), slots, torch.arange(6))
    got = ring.read(slots[:1], torch.arange(6)[None])[0]
    assert got.dtype == dtype and torch.equal(got[2], x[2])
    # three bits of mantissa; values far below a token's largest one have fewer
    largest = x.float().abs().amax(1, keepdim=True)
    assert ((got.float() - x.float()).abs() <= x.float().abs() / 16 + largest / 448 / 512 + 1e-6).all()
    assert rings.bytes_per_slot() == 7 * (40 + 4)


def test_what_is_put_aside_is_stored_as_if_it_were_written_at_once():
    torch.manual_seed(0)
    stores = [Rings(layers, 4, width, torch.bfloat16, CPU) for layers, width in [(3, 40), (1, 24)] * 2]
    for store in stores:
        store.grow(2)  # layers need not be alike
    rings, at_once = ([*same.layers, *other.layers] for same, other in (stores[:2], stores[2:]))
    slots, places, rows = torch.tensor([1, 0, 1]), torch.tensor([0, 3, 2]), torch.tensor([4, 0, 2])
    for ring, other in zip(rings, at_once, strict=True):
        x = torch.randn(5, ring.rings.codes.shape[-1]).bfloat16()
        ring.keep(x.index_select(0, rows), slots, places)
        x_before = x.clone()
        x.zero_()  # what follows may work in place
        other.write(x_before, rows, slots, places)
    for store in stores[:2]:
        assert not store.codes.any()
        store.settle()
    every = torch.randn(3, 3, 40).bfloat16()
    stores[0].keep(every, slots, (places + 1) % 4)  # a forward that fails
    stores[0].forget()
    stores[0].settle()  # nothing is stored, and nothing twice
    assert_alike = [(store.codes, other.codes) for store, other in zip(stores[:2], stores[2:], strict=True)]
    assert_alike += [(store.scales, other.scales) for store, other in zip(stores[:2], stores[2:], strict=True)]
    assert all(torch.equal(*pair) for pair in assert_alike)
    stores[0].keep(every, slots, (places + 1) % 4)  # all layers at once
    stores[0].settle()
    for ring, x in zip(at_once[:3], every, strict=True):
        ring.write(x, torch.arange(3), slots, (places + 1) % 4)
    assert all(torch.equal(*pair) for pair in assert_alike)


def test_slots_grow_and_move_at_once():
    trace = LayerTrace(("energy",), 2, 0.5, CPU)
    trace.grow(2)
    trace.energy[:] = torch.tensor([[1.0, 1], [2, 2]])
    trace.grow(3)
    assert trace.energy.tolist() == [[1, 1], [2, 2], [0, 0]]
    trace.move(torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert trace.energy[:2].tolist() == [[2, 2], [1, 1]]
    assert trace.bytes_per_slot() == 2 * 4 + 5 * 4 + 4
    trace.clear([0])
    assert trace.energy[0].tolist() == [0, 0]
