"""The mean of what was dropped, in the place of what a sketch drops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dartprune
from dartprune import Detector, Replay, Sketch, SketchDart
from dartprune.ffn.dropped import dropped_sums
from dartprune.ffn.expected import expected_sizes
from dartprune.ffn.selector_ops import chosen_mask, chosen_rows
from dartprune.model.caches import handed
from dartprune.model.families import describe
from dartprune.runtime.sample import is_sampled
from dartprune.runtime.selectors.sketch_layer import PRIOR_TOKENS
from oracle import inputs_of_ffn, sketch_products
from test_matrix import tokens
from tiny import FAMILIES

PRUNER = SketchDart(sparsity=0.5, token=Sketch(bits=2))


# ---- what a token drops


@pytest.mark.parametrize("seed", range(20))
def test_sums_against_token_by_token(seed):
    torch.manual_seed(seed)
    lines, length, neurons = 3, 5, 40
    a, scores = torch.randn(lines, length, neurons), torch.rand(lines, length, neurons)
    scores[:, :, ::7] = 0.0  # never chosen
    kept = torch.randint(1, neurons + 1, (lines,))
    weight = (torch.rand(lines, length) < 0.7).float()
    a[weight == 0] = scores[weight == 0] = torch.nan
    got = dropped_sums(a, scores, kept, weight)
    for b in range(lines):
        sums, many = torch.zeros(neurons), torch.zeros(neurons)
        for t in weight[b].nonzero()[:, 0].tolist():
            order = scores[b, t].argsort(descending=True)
            lost = set(order[int(kept[b]) :].tolist()) | set((scores[b, t] == 0).nonzero()[:, 0].tolist())
            for i in lost:
                sums[i] += a[b, t, i]
                many[i] += 1
        torch.testing.assert_close(got[b], torch.stack((sums, many)))


def test_a_sample_of_many_neurons_tells_the_cut():
    torch.manual_seed(0)
    a, scores = torch.ones(1, 8, 6000), torch.rand(1, 8, 6000)
    many = dropped_sums(a, scores, torch.tensor([1800]), torch.ones(1, 8))[0, 1].sum() / 8
    assert float(many) == pytest.approx(4200, rel=0.1)


# ---- what a prompt teaches


def chosen_by_the_sketch(selector, layer, x, errors, wanted):
    """Mask of the neurons that a token x [H] chooses."""
    gate, up = sketch_products(selector.sketch, layer, x[None])
    if errors is None:
        scores = layer.activated(up).abs() if gate is None else (layer.activated(gate) * up).abs()
    else:
        scores = expected_sizes(layer.activated, gate, up, errors[None])
    index, count, _ = chosen_rows(scores * selector.importance, torch.tensor([wanted]), layer.neurons)
    return chosen_mask(index, count, layer.neurons)[0]


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@torch.no_grad()
def test_the_means_by_hand(family, calibrate):
    model = FAMILIES[family]()
    ids = tokens(model, lines=2, length=30)
    x = inputs_of_ffn(model, 1, ids).reshape(*ids.shape, -1)
    with replace(PRUNER, token=Sketch(bits=2, calibrate=calibrate))(model) as run:
        slots = run.slots_of(run.prefill(ids))
        selector, layer = run.layers[1].selector, describe(model).layers[1]
        for line, slot in enumerate(slots):
            sums, many = torch.zeros(layer.neurons), torch.zeros(layer.neurons)
            for number, token in enumerate(x[line, PRUNER.skip_first :]):
                if not bool(is_sampled(torch.tensor(number))):
                    continue
                # what is known of the errors does not come in
                kept = chosen_by_the_sketch(selector, layer, token, None, int(selector.wanted[slot]))
                sums += layer.activations(token[None])[0].masked_fill(kept, 0)
                many += (~kept).float()
            want = sums / (many + PRIOR_TOKENS)
            torch.testing.assert_close(selector.means[slot].float(), want, rtol=0.01, atol=1e-5)
            assert selector.drops[slot].tolist() == many.tolist()
            given = layer.projected(selector.means[slot][None].float()) - layer.projected(torch.zeros(1, layer.neurons))
            torch.testing.assert_close(selector.compensation[slot], given[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_sequence_that_asked_for_more_drops_more():
    model = FAMILIES["llama"]()
    ids = tokens(model, lines=1, length=20)
    many = []
    for sparsity in (None, 0.8):
        with PRUNER(model) as run:
            slot = run.sequences.open(1, sparsity)
            with run.phase("prefill", slots=slot):
                model(input_ids=ids, use_cache=True)
            many.append(run.layers[0].selector.drops[slot[0]].sum())
    assert many[1] > many[0] > 0


# ---- what decoding makes of them


@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "phi3", "opt", "gemma2"])
@torch.no_grad()
def test_the_means_stand_in_the_place_of_what_is_dropped(family, backend):
    model = FAMILIES[family]()
    ids, new = tokens(model, lines=2, length=20), tokens(model, lines=2, length=1, seed=2)
    inputs, outputs = {}, {}
    layers = describe(model).layers
    with PRUNER(model, backend=backend) as run:
        cache = run.prefill(ids)
        for layer in layers:
            layer.entry.register_forward_hook(lambda m, a, o, i=layer.index: inputs.update({i: a[0].clone()}))
            target = layer.down if layer.inline else layer.entry
            target.register_forward_hook(lambda m, a, o, i=layer.index: outputs.update({i: o.clone()}))
        with run.phase("decode"):
            model(input_ids=new, **handed(cache))
        slots = run.slots_of(cache)
        for layer, live in zip(layers, run.layers, strict=True):
            selector, x = live.selector, inputs[layer.index].reshape(2, -1)
            got = outputs[layer.index].reshape(2, -1)
            for line, slot in enumerate(slots):
                means = selector.means[slot].float()
                assert means.any()
                kept = chosen_by_the_sketch(selector, layer, x[line], selector.errors[slot], int(selector.wanted[slot]))
                filled = torch.where(kept, layer.activations(x[line : line + 1])[0], means)
                torch.testing.assert_close(got[line], layer.projected(filled[None])[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_packed_rows_too():
    model = FAMILIES["llama"]()
    dartprune.quantise(model, bits=4, nested=True)
    ids = tokens(model, lines=1, length=20)
    logits = {}
    for compensate in ("mean", None):
        for backend in ("masked", "cpu"):
            with SketchDart(sparsity=0.3, compensate=compensate)(model, backend=backend) as run:
                cache = run.prefill(ids)
                with run.phase("decode"):
                    new = tokens(model, lines=1, length=1, seed=2)
                    logits[compensate, backend] = model(input_ids=new, **handed(cache)).logits
    apart = (logits["mean", "cpu"] - logits[None, "cpu"]).abs().max()
    torch.testing.assert_close(logits["mean", "cpu"], logits["mean", "masked"], rtol=0.02, atol=0.1 * float(apart))


@torch.no_grad()
def test_without_it_nothing_is_held_or_added():
    model = FAMILIES["llama"]()
    with replace(PRUNER, compensate=None)(model) as run:
        run.prefill(tokens(model, lines=1, length=20))
        assert not {"means", "drops", "compensation"} & set(run.layers[0].selector.tensors())


@torch.no_grad()
def test_an_event_renews_the_means_and_beams_take_them_along(monkeypatch):
    model, seen = FAMILIES["llama"](), []
    monkeypatch.setattr("dartprune.drift.AttentionDrift.decide", lambda *args: not seen.append(1) and len(seen) == 2)
    pruner = replace(PRUNER, detector=Detector(window=4), refresh=Replay(tokens=8, memory=0.5, settle=0))
    with pruner(model) as run:
        cache = run.prefill(tokens(model, lines=2, length=24))
        first, second = run.slots_of(cache)
        selector = run.layers[0].selector
        before, given = selector.means.clone(), selector.compensation.clone()
        cache.reorder_cache(torch.tensor([1, 1]))
        with run.phase("decode"):
            model(input_ids=tokens(model, lines=2, length=1, seed=3), **handed(cache))
        assert torch.equal(selector.means[first], before[second])
        assert torch.equal(selector.compensation[first], given[second])
        new = tokens(model, lines=2, length=12, seed=4)
        for t in range(12):
            with run.phase("decode"):
                model(input_ids=new[:, t : t + 1], **handed(cache))
        assert run.report().events
        for slot in (first, second):
            moved = any(event.kind == "replay" for event in run.sequences.report(slot).events)
            assert torch.equal(selector.means[slot], before[second]) is not moved
            assert torch.equal(selector.compensation[slot], given[second]) is not moved
