"""Direct calls without `torch.no_grad()`: nothing that a run keeps holds the graph of gradients."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dartprune import Clock, Dart, Detector, Relearn, Replay, presets
from dartprune.model.caches import handed
from dartprune.refresh import Periodic
from oracle import held_by, masked_by_hand, masks_of
from test_matrix import tokens
from tiny import FAMILIES

EAGER = Detector(window=4, patience=1, min_drop=0.0, delta=0.0)
PRUNERS = {
    "replay": Dart(sparsity=0.5, detector=EAGER, refresh=Replay(tokens=8, settle=16)),
    "relearn": Dart(sparsity=0.5, detector=EAGER, refresh=Relearn(tokens=3)),
    "clock": Clock(sparsity=0.5, start=2, refresh=Periodic(every=3, dense=2)),
    "average": Dart(sparsity=0.5, scorer="average", impact="residual"),
    "gate": presets.get("gated-dart")(sparsity=0.5),
    "sketch": presets.get("sketch-dart")(sparsity=0.5),
    "exact": presets.get("per-token")(sparsity=0.5),
}


@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
@pytest.mark.parametrize("name", PRUNERS)
def test_statistics_hold_no_graph(name, backend):
    model = FAMILIES["gemma2"]()
    with PRUNERS[name](model, backend=backend) as run:
        for seed in range(2):
            with run.phase("prefill"):
                cache = model(input_ids=tokens(model, seed=seed), use_cache=True).past_key_values
            with run.phase("decode"):
                for t in range(10):
                    model(input_ids=tokens(model, length=10, seed=7)[:, t : t + 1], **handed(cache))
            found = [tensor for tensor in held_by(run) if not isinstance(tensor, torch.nn.Parameter)]
            assert len(found) > 10
            assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in found)


def test_activations_of_past_texts_are_freed():
    model = FAMILIES["llama"]()
    seen = []
    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda module, args, out: seen.append(weakref.ref(out))
    )
    with Dart(sparsity=0.5)(model) as run:
        for seed in range(4):
            with run.phase("prefill"):
                model(input_ids=tokens(model, seed=seed), use_cache=True)
        gc.collect()
        assert len(seen) == 4
        assert not any(ref() is not None for ref in seen)
    handle.remove()


def test_the_prompts_own_gradients_are_those_of_the_plain_model():
    model = FAMILIES["llama"]()
    ids = tokens(model)

    def grads(call):
        model.zero_grad()
        call().logits.float().logsumexp(-1).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    want = grads(lambda: model(input_ids=ids, use_cache=True))
    with Dart(sparsity=0.5)(model, backend="masked") as run, run.phase("prefill"):
        got = grads(lambda: model(input_ids=ids, use_cache=True))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["masked", "reference", "cpu"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["static", "dart", "gated-dart", "sketch-dart", "per-token"])
def test_gradients_through_decoded_tokens_are_right_or_refused(name, family, backend):
    model = FAMILIES[family]()
    ids = tokens(model)
    with presets.get(name)(sparsity=0.5)(model, backend=backend) as run:
        cache = run.prefill(ids)
        with run.phase("decode"):
            logits = model(input_ids=ids[:, :1], **handed(cache)).logits
        masks = masks_of(run, run.slots_of(cache))
        if run.report().backend != "masked":
            with pytest.raises(ValueError, match="no gradient passes through the row kernels of decoded tokens"):
                logits.logsumexp(-1).sum().backward()
            return
        logits.logsumexp(-1).sum().backward()
        got = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    if name != "static":  # others choose or fill by values that have no gradient
        assert all(gradient.isfinite().all() for gradient in got)
        return
    model.zero_grad()
    plain = model(input_ids=ids, use_cache=True).past_key_values
    for layer in plain.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    with masked_by_hand(model, masks):
        model(input_ids=ids[:, :1], **handed(plain)).logits.logsumexp(-1).sum().backward()
    want = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
