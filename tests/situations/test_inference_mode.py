"""The block lies inside `torch.inference_mode()`: afterwards the model is made of ordinary tensors again."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart, Detector, Replay, Static, presets
from dartprune.model.caches import handed
from oracle import assert_untouched, held_by, snapshot
from test_matrix import tokens
from tiny import FAMILIES

LIVELY = Dart(
    sparsity=0.5, detector=Detector(window=4, patience=1, min_drop=0.0, delta=0.0), refresh=Replay(tokens=8, settle=16)
)


def decode(model, run, ids, new):
    with run.phase("prefill"):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with run.phase("decode"):
        return [model(input_ids=new[:, t : t + 1], **handed(cache)).logits for t in range(new.shape[1])]


def trained(model):
    torch.manual_seed(3)  # dropout
    model.train()
    model(input_ids=tokens(model), labels=tokens(model)).loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.eval()
    return grads


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("preset", ["static", "dart", "sketch-dart", "gated-dart"])
def test_training_goes_on_after_a_block_in_inference_mode(family, preset):
    model = FAMILIES[family]()
    before, grads = snapshot(model), trained(model)
    with torch.inference_mode(), presets.get(preset)(sparsity=0.5)(model) as run:
        model.generate(tokens(model), max_new_tokens=6, min_new_tokens=6)
        assert run.report().pruned_tokens == 10
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert_untouched(model, before)
    for got, want in zip(trained(model), grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
def test_a_run_goes_in_and_out_of_inference_mode(backend):
    model = FAMILIES["llama"]()
    ids, new = tokens(model), tokens(model, length=12, seed=1)
    with torch.no_grad(), LIVELY(model, backend=backend) as run:
        want = decode(model, run, ids, new)
        events = [(e.kind, e.decoded, e.changed) for e in run.report().events]
    assert events
    with torch.inference_mode():
        run = LIVELY.attach(model, backend=backend)
        with run.phase("prefill"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        got = []
    with run.phase("decode"):
        for t in range(new.shape[1]):
            with torch.inference_mode() if t % 3 else torch.no_grad():
                got.append(model(input_ids=new[:, t : t + 1], **handed(cache)).logits.clone())
    assert [(e.kind, e.decoded, e.changed) for e in run.report().events] == events
    with torch.inference_mode():
        run.detach()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    trained(model)


def test_everything_that_a_run_holds_is_an_ordinary_tensor():
    model = FAMILIES["llama"]()
    with torch.inference_mode():
        run = LIVELY.attach(model)
        model.generate(tokens(model), max_new_tokens=12, min_new_tokens=12)
    model.generate(tokens(model), max_new_tokens=2)  # what belonged to the last forward alone is gone
    held = held_by(run)
    assert len(held) > 10 and not any(tensor.is_inference() for tensor in held)
    run.detach()
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_weights_that_were_made_in_inference_mode():
    with torch.inference_mode():
        model = FAMILIES["llama"]()
        before = snapshot(model)
        plain = model.generate(tokens(model), max_new_tokens=6, do_sample=False)
    run = Static(sparsity=0.0).attach(model, backend="cpu")
    with torch.inference_mode():
        assert torch.equal(model.generate(tokens(model), max_new_tokens=6, do_sample=False), plain)
    run.detach()
    assert_untouched(model, before)
    assert all(parameter.is_inference() for parameter in model.parameters())
