"""The global budget on a model: its ranking is made of what the prompt really did."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart, GatedDart, Global, Pruner, Static
from dartprune.budget import keep_counts, rank
from dartprune.model.caches import handed
from dartprune.model.families import describe
from oracle import inputs_of_down
from test_matrix import tokens
from tiny import FAMILIES


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "granite"])
@torch.no_grad()
def test_contributions_are_those_of_the_prompt(family):
    model = FAMILIES[family]()
    ids = tokens(model, lines=1, length=24)
    layers = describe(model).layers
    for layer in layers:  # norms after the FFN that differ, so that leaving them out would show
        if layer.contribution not in (layer.entry, layer.down):
            layer.contribution.weight.mul_(0.2 + layer.index)
    streams, raw, added = [], [], []
    handles = []
    for layer in layers:
        norm = layer.entry if layer.norm is None else layer.norm
        handles.append(norm.register_forward_pre_hook(lambda m, args: streams.append(args[0].double())))
        handles.append(layer.down.register_forward_hook(lambda m, args, out: raw.append(out.double())))
        handles.append(
            layer.contribution.register_forward_hook(
                lambda m, args, out, scale=layer.scale: added.append(scale * out.double())
            )
        )
    with inputs_of_down(model) as activations:
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    contributions = []
    for number, (layer, a) in enumerate(zip(layers, activations, strict=True)):
        energy = a.reshape(24, -1)[1:].double().square().sum(0)  # the first token of a text does not count
        norms = layer.down(torch.eye(layer.neurons)) - layer.down(torch.zeros(1, layer.neurons))
        y, before, after = (part[number].reshape(24, -1)[1:].square().sum(-1) for part in (streams, raw, added))
        stream = (y * before / after).log().mean().exp()
        contributions.append((energy * norms.double().square().sum(1).mean() / stream).float())
    pruner = Static(sparsity=0.6, budget=Global())
    with pruner(model, backend="masked") as run:
        with run.phase("prefill"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        with run.phase("decode"):  # the masks are made when they are first needed
            model(input_ids=ids[:, :1], **handed(cache))
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
