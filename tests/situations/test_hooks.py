"""Forward hooks on the parts of an FFN are in force at every token, and hear of no call but the model's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dartprune import Dart, Detector, Replay, Static, presets
from dartprune.model.caches import handed
from dartprune.model.families import describe
from oracle import assert_untouched, masked_by_hand, snapshot
from test_matrix import tokens
from tiny import FAMILIES

PARTS = ("gate", "up", "down", "act")
LIVELY = Dart(
    sparsity=0.5, detector=Detector(window=4, patience=1, min_drop=0.0, delta=0.0), refresh=Replay(tokens=8, settle=16)
)


def part(model, name, layer=1):
    return getattr(describe(model).layers[layer], name)


def steer(module, args, out):
    return out + 0.5


def generated(model, count=8):
    return model.generate(tokens(model), max_new_tokens=count, min_new_tokens=count, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("when", ["before", "while"])
def test_steering_is_in_force_after_the_prompt(name, when, family):
    """Hooks of the same kind on the plain model, with the masks applied by hand, give the same logits."""
    model = FAMILIES[family]()
    module = part(model, name)
    if module is None or not isinstance(module, nn.Module):
        pytest.skip("no such module")
    before, ids, new = snapshot(model), tokens(model), tokens(model, length=5, seed=1)
    handle = module.register_forward_hook(steer) if when == "before" else None
    with Static(sparsity=0.5)(model) as run:
        if handle is None:
            handle = module.register_forward_hook(steer)
        with run.phase("prefill"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        with run.phase("decode"):
            got = [model(input_ids=new[:, t : t + 1], **handed(cache)).logits for t in range(5)]
        masks = []
        for number, layer in enumerate(run.layers):
            rows = torch.zeros(2, layer.neurons, dtype=torch.bool)
            for line in range(2):
                rows[line, run.selection(line)[number].long()] = True
            masks.append(rows)
        report = run.report()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with masked_by_hand(model, masks):
        want = [model(input_ids=new[:, t : t + 1], **handed(cache)).logits for t in range(5)]
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(want, 1), rtol=1e-4, atol=1e-4)
    handle.remove()
    assert_untouched(model, before)
    assert report.pruned_tokens == 10 and report.realised_sparsity == pytest.approx(0.5, abs=0.05)
    assert report.bytes_saved == 0
    if when == "before":
        assert "masked" in report.backend and any("forward hooks" in note for note in report.notes)
    else:
        assert any("was given hooks" in note for note in report.notes)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["forward", "pre", "global"])
def test_after_the_hook_is_gone_rows_are_read_again(kind):
    model = FAMILIES["llama"]()
    with Static(sparsity=0.5)(model) as run:
        generated(model)
        saved = run.report().bytes_saved
        assert saved > 0.3  # a batch reads the union
        if kind == "global":
            handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        else:
            module = part(model, "gate")
            add = module.register_forward_hook if kind == "forward" else module.register_forward_pre_hook
            handle = add(lambda *args: None)
        generated(model)
        handle.remove()
        half = run.report().bytes_saved
        generated(model)
        third = run.report()
    assert half == pytest.approx(saved / 2, abs=0.03) and third.bytes_saved == pytest.approx(saved * 2 / 3, abs=0.03)
    assert third.realised_sparsity == pytest.approx(0.5, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("preset", [*presets.names(), "lively"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "phi3"])
def test_observers_count_the_models_own_calls(family, preset):
    """No probe, replay, compensation or choice of ours is heard: every module is called as often as without a run."""
    model = FAMILIES[family]()
    heard = {}

    def count(name):
        def hear(module, args, out):
            heard.setdefault(name, []).append([tuple(x.shape) for x in args if isinstance(x, torch.Tensor)])

        return hear

    handles = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList)
    ]
    generated(model, 14)
    plain = dict(heard)
    heard.clear()
    pruner = LIVELY if preset == "lively" else presets.get(preset)()
    with pruner(model) as run:
        generated(model, 14)
        assert preset != "lively" or run.report().events
    assert heard == plain
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_recognising_by_structure_is_not_heard(monkeypatch):
    monkeypatch.setattr("dartprune.model.families.FAMILIES", {})
    model = FAMILIES["llama"]()
    heard = []
    everywhere = nn.modules.module.register_module_forward_hook(lambda *args: heard.append(args))
    single = model.model.layers[0].register_forward_hook(lambda *args: heard.append(args))
    describe(model)
    everywhere.remove()
    single.remove()
    assert not heard


@torch.no_grad()
def test_a_hook_within_a_decoding_loop():
    model = FAMILIES["llama"]()
    seen = []
    with Static(sparsity=0.5)(model) as run:
        with run.phase("prefill"):
            cache = model(input_ids=tokens(model), use_cache=True).past_key_values
        with run.phase("decode"):
            model(input_ids=tokens(model)[:, :1], **handed(cache))
            handle = part(model, "up").register_forward_hook(lambda module, args, out: seen.append(out))
            model(input_ids=tokens(model)[:, :1], **handed(cache))
            handle.remove()
            model(input_ids=tokens(model)[:, :1], **handed(cache))
    assert len(seen) == 1


@torch.no_grad()
def test_token_selectors_give_way_to_hooks_too():
    for preset in ("gated-dart", "sketch-dart"):
        model = FAMILIES["llama"]()
        pruner = presets.get(preset)(sparsity=0.5)
        with pruner(model):
            want = generated(model)
        seen = []
        with pruner(model):
            handle = part(model, "down").register_forward_hook(lambda module, args, out, seen=seen: seen.append(1))
            assert torch.equal(generated(model), want)
        handle.remove()
        assert len(seen) == 8
