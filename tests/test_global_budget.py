"""The global budget on a model: its ranking is made of what the prompt really did."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart, GatedDart, Global, Pruner, Static
from dartprune.budget import keep_counts, rank
from dartprune.model.families import describe
from oracle import inputs_of_down
from test_matrix import tokens
from tiny import FAMILIES


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_contributions_are_those_of_the_prompt(family):
    model = FAMILIES[family]()
    ids = tokens(model, lines=1, length=24)
    layers = describe(model).layers
    streams = {}
    handles = [
        layer.norm.register_forward_pre_hook(lambda m, args, i=layer.index: streams.setdefault(i, args[0].clone()))
        for layer in layers
    ]
    with inputs_of_down(model) as activations:
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    contributions = []
    for layer, a in zip(layers, activations, strict=True):
        energy = a.reshape(24, -1)[1:].double().square().sum(0)  # the first token of a text does not count
        norms = layer.down(torch.eye(layer.neurons)) - layer.down(torch.zeros(1, layer.neurons))
        stream = streams[layer.index].reshape(24, -1)[1:].double().square().sum(-1).mean()
        contributions.append((energy * norms.double().square().sum(1) / stream).float())
    pruner = Static(sparsity=0.6, budget=Global())
    with pruner(model, backend="masked") as run:
        with run.phase("prefill"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        with run.phase("decode"):  # the masks are made when they are first needed
            model(input_ids=ids[:, :1], past_key_values=cache)
        kept = [len(rows) for rows in run.selection(run.slots_of(cache)[0])]
    neurons = [layer.neurons for layer in layers]
    want = keep_counts(rank(contributions, 0.6, 0.98), neurons)
    assert len(set(want)) > 1, "the layers must differ, or this shows nothing"
    assert all(abs(a - b) <= 1 for a, b in zip(kept, want, strict=True)), (kept, want)
    assert sum(kept) == round(0.4 * sum(neurons))


@pytest.mark.parametrize("preset", [Dart, GatedDart])
def test_it_decodes_at_the_asked_sparsity_and_is_kept_as_data(preset):
    pruner = preset(sparsity=0.5, budget=Global(max_sparsity=0.8))
    assert Pruner.from_dict(pruner.to_dict()) == pruner
    model = FAMILIES["llama"]()
    with pruner(model) as run:
        model.generate(tokens(model), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        report = run.report()
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.03) and report.pruned_tokens > 0
