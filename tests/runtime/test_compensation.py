"""Mean compensation: what is dropped is replaced by its mean over the traced tokens."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart, DepthAware, Detector, Replay
from dartprune.model.caches import handed
from dartprune.model.families import describe
from oracle import masks_of
from test_matrix import tokens
from tiny import FAMILIES


@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
@torch.no_grad()
def test_the_dropped_mean_is_added(family, backend):
    model = FAMILIES[family]()
    ids, new = tokens(model, length=20), tokens(model, length=1, seed=2)
    pruner = Dart(sparsity=0.6, compensate="mean")
    layers = describe(model).layers
    activations, outputs = {}, {}
    with pruner(model, backend=backend) as run:
        handles = [
            layer.down.register_forward_pre_hook(
                lambda m, args, i=layer.index: activations.setdefault(i, args[0].detach().clone())
            )
            for layer in layers
        ]
        with run.phase("prefill"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        for handle in handles:
            handle.remove()
        inputs = {}
        handles = []
        for layer in layers:
            handles.append(
                layer.entry.register_forward_hook(
                    lambda m, a, o, i=layer.index: inputs.update({i: a[0].detach().clone()})
                )
            )
            target = layer.down if layer.inline else layer.entry
            handles.append(
                target.register_forward_hook(lambda m, a, o, i=layer.index: outputs.update({i: o.detach().clone()}))
            )
        with run.phase("decode"):
            model(input_ids=new, **handed(cache))
        for handle in handles:
            handle.remove()
        masks = masks_of(run, run.slots_of(cache))
    for layer, mask in zip(layers, masks, strict=True):
        a = activations[layer.index].reshape(2, 20, -1)
        mean = a[:, 1:].mean(1)  # the first token of a text does not count
        x = inputs[layer.index].reshape(2, 1, -1)
        filled = torch.where(mask[:, None], layer.activations(x), mean[:, None])
        want = layer.down(filled).reshape(outputs[layer.index].shape)
        torch.testing.assert_close(outputs[layer.index], want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_it_is_renewed_by_a_replay():
    model = FAMILIES["llama"]()
    eager = Detector(window=4, patience=1, min_drop=0.0, delta=0.0)
    pruner = Dart(
        sparsity=0.6, budget=DepthAware(), compensate="mean", detector=eager, refresh=Replay(tokens=8, settle=16)
    )
    with pruner(model) as run:
        with run.phase("prefill"):
            cache = model(input_ids=tokens(model), use_cache=True).past_key_values
        before = None
        with run.phase("decode"):
            for token in tokens(model, length=30, seed=3).T:
                model(input_ids=token[:, None], **handed(cache))
                if before is None:
                    before = [layer.selection.compensation.clone() for layer in run.layers]
        assert run.report().events
        after = [layer.selection.compensation for layer in run.layers]
        assert all(a.any() and not torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
        assert not after[0].any(), "the most sensitive layer is left whole"
