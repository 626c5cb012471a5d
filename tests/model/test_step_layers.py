"""All layers of a decode step in one call: the bits of the modules, and only where nobody hears these."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
import transformers as t

import dartprune
from dartprune.model import step_attention
from dartprune.model.caches import handed
from dartprune.model.step_layers import OwnLayers
from tiny import FAMILIES

pytest.importorskip("numba")
OWN = ["llama", "mistral", "qwen2", "qwen3"]
PRUNERS = {
    "dense": dartprune.Dense(),
    "dart": dartprune.Dart(0.5, min_traced=4),
    "static": dartprune.Static(0.5, min_traced=4, compensate="mean"),
    "sketch": dartprune.SketchDart(0.4),
    "plain sketch": dartprune.SketchDart(0.4, compensate=None, token=dartprune.Sketch(calibrate=False)),
}


def model_of(family, dtype=torch.bfloat16, bits=4):
    # with windows a cache has layers of another kind
    model = FAMILIES[family](sliding_window=None).to(dtype)
    if bits:
        dartprune.quantise(model, bits)
    return model


def prompt(lines, padded=False):
    torch.manual_seed(lines)
    ids = torch.randint(2, 128, (lines, 24))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5], ids[0, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def calls(monkeypatch):
    """How many lines each call of the kernel had."""
    made, run = [], OwnLayers._run

    def counted(self, x, table, *rest):
        if len(table):
            made.append(len(x))
        return run(self, x, table, *rest)

    monkeypatch.setattr(OwnLayers, "_run", counted)
    return made


@pytest.fixture
def by_modules(monkeypatch):
    """Makes the coming steps go module by module, the last attention in one kernel like the others."""

    def use():
        monkeypatch.setattr(OwnLayers, "_fits", lambda self, x, call: False)
        monkeypatch.setattr(step_attention, "untouched", lambda module: True)
        attend = step_attention.OwnAttention._attend

        def told(self, *given):
            out = attend(self, *given)
            site = next((cell for cell in tapped if cell.layer.attention_output is self.module.o_proj), None)
            if site is not None and site.hooks is not None:
                site.hooks.attention(out)
            return out

        monkeypatch.setattr(step_attention.OwnAttention, "_attend", told)

    tapped = []
    use.sites = tapped
    return use


def decoded(model, pruner, inputs, sites=None, steps=20):
    """Logits, what the rings hold, the report."""
    with torch.no_grad(), pruner(model) as run:
        if sites is not None:
            sites[:] = run._sites.layers[-1:]
        out = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        rings = [layer.ring.rings.codes[:, layer.ring.number].clone() for layer in run.layers if layer.ring is not None]
        report = run.report()
    return torch.stack(out.logits), rings, report


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize(("family", "dtype"), [(f, torch.bfloat16) for f in OWN] + [("qwen3", torch.float16)])
@pytest.mark.parametrize(("lines", "padded"), [(1, False), (3, True)])
@pytest.mark.parametrize("bits", [4, None])
def test_the_bits_are_those_of_the_modules(name, family, dtype, lines, padded, bits, calls, by_modules):
    if bits is None and name == "dense":
        pytest.skip("modules round between gate, up and down, the call for all layers does not: see the next test")
    model, inputs = model_of(family, dtype, bits), prompt(lines, padded)
    whole, rings, report = decoded(model, PRUNERS[name], inputs)
    assert calls == [lines] * 19 and report.step == "3 layers in one call of a kernel"
    by_modules()
    want, rings_before, before = decoded(model, PRUNERS[name], inputs, by_modules.sites)
    assert len(calls) == 19
    assert torch.equal(whole, want)
    assert len(rings) == len(rings_before) and all(map(torch.equal, rings, rings_before))
    assert report.realised_sparsity == before.realised_sparsity
    assert report.bytes_saved == before.bytes_saved
    assert [s.similarities for s in report.sequences] == [s.similarities for s in before.sequences]


@pytest.mark.parametrize(
    "pruner", [dartprune.GatedDart(0.3), dartprune.PerToken(0.3), dartprune.Griffin(0.3)], ids=lambda p: p.name
)
def test_other_methods_say_how_their_steps_are_computed(pruner, calls):
    model = model_of("llama")
    report = decoded(model, pruner, prompt(1))[2]
    assert bool(calls) == (report.step == "3 layers in one call of a kernel")


def test_more_lines_than_the_kernels_are_for_go_by_modules(calls):
    model = model_of("llama")
    report = decoded(model, dartprune.Dense(), prompt(5))[2]
    assert not calls and report.step.startswith("3 attention layers")


def test_sliding_windows_go_by_modules(calls):
    model = FAMILIES["mistral"]().bfloat16()
    report = decoded(model, dartprune.Dense(), prompt(1))[2]
    assert not calls and report.step.startswith("3 attention layers")


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize(("lines", "padded"), [(1, False), (3, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_steps_in_words_are_as_near_to_exact_as_transformers_own(family, lines, padded, dtype, calls):
    model, inputs = model_of(family, dtype, None), prompt(lines, padded)
    exact = decoded(copy.deepcopy(model).float(), dartprune.Dense(), inputs, steps=2)[0]
    ours = decoded(model, dartprune.Dense(), inputs, steps=2)[0].float() - exact
    assert calls == [lines]
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    theirs = torch.stack(model.generate(**inputs, **options).logits).float() - exact
    assert ours.square().mean() <= 1.5 * theirs.square().mean() + 1e-6


@pytest.mark.parametrize("name", ["dense", "dart", "sketch"])
@pytest.mark.parametrize("family", OWN)
def test_8_bits_are_near_the_modules(name, family, calls, by_modules):
    """Modules round what attention's bytes give, the call for all layers does not."""
    model, inputs = model_of(family, bits=8), prompt(3, padded=True)
    whole, _, report = decoded(model, PRUNERS[name], inputs, steps=2)
    assert calls == [3] and report.step == "3 layers in one call of a kernel"
    by_modules()
    want = decoded(model, PRUNERS[name], inputs, by_modules.sites, steps=2)[0]
    assert (whole - want).float().square().mean() < 0.002 * want.float().square().mean()


@pytest.mark.parametrize("what", ["float32", "FFN alone"])
def test_other_weights_go_by_modules(what, calls):
    model = FAMILIES["llama"]()
    if what != "float32":
        dartprune.quantise(model.bfloat16(), 4, whole=False)
    report = decoded(model, dartprune.Dense(), prompt(1))[2]
    assert not calls and "one call" not in report.step


def step(model, cache, token=20):
    mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.int64)
    return model(input_ids=torch.tensor([[token]]), attention_mask=mask, **handed(cache), use_cache=True)


def cached(model, run):
    cache = t.DynamicCache(config=model.config)
    with run.phase("prefill"):
        model(**prompt(1), **handed(cache), use_cache=True)
    return cache


@pytest.mark.parametrize(
    "name",
    ["", "input_layernorm", "self_attn", "self_attn.o_proj", "post_attention_layernorm", "mlp", "mlp.up_proj"],
)
@pytest.mark.parametrize("pre", [False, True])
def test_hooks_are_heard_and_in_force(name, pre, calls):
    model, inputs = model_of("qwen2"), prompt(1)
    plain = decoded(model, dartprune.Dense(), inputs, steps=6)[0]
    assert calls
    calls.clear()
    part = model.model.layers[1].get_submodule(name)
    seen = []

    def hook(module, args, out=None):
        seen.append(module)
        given = args[0] if out is None and args else out
        if not isinstance(given, torch.Tensor):
            return None
        return (given * 0.5 + 0.25, *args[1:]) if out is None else given * 0.5

    handle = part.register_forward_pre_hook(hook) if pre else part.register_forward_hook(hook)
    changed = decoded(model, dartprune.Dense(), inputs, steps=6)[0]
    handle.remove()
    assert not calls and len(seen) == 6
    if name != "self_attn":  # it gives a tuple, and takes its input by name
        assert not torch.equal(changed, plain)
    assert torch.equal(decoded(model, dartprune.Dense(), inputs, steps=6)[0], plain) and calls


def test_a_hook_that_comes_while_attached_is_heard(calls):
    model, seen = model_of("qwen2"), []
    with torch.no_grad(), dartprune.Dense()(model) as run:
        cache = cached(model, run)
        with run.phase("decode"):
            step(model, cache)
            assert run.report().step == "3 layers in one call of a kernel"
            handle = model.model.layers[2].mlp.act_fn.register_forward_hook(lambda *a: seen.append(1))
            step(model, cache)
            handle.remove()
            step(model, cache)
    assert len(calls) == 2 and len(seen) == 1
    assert run.report().step == "3 layers in one call of a kernel, in 2 of 3 steps"


def test_global_hooks_are_heard(calls):
    model, seen = model_of("llama"), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *a: seen.append(module))
    try:
        decoded(model, dartprune.Dense(), prompt(1), steps=4)
    finally:
        handle.remove()
    assert not calls and seen.count(model.model.layers[1].mlp) == 4


def test_a_layer_called_by_itself_is_that_layer():
    """Also in the middle of a forward of another thread."""
    model = model_of("llama")
    x = torch.randn(1, 1, model.config.hidden_size).bfloat16()
    first = model.model.layers[0]

    def alone():
        cache = t.DynamicCache(config=model.config)
        turned = model.model.rotary_emb(x, torch.tensor([[0]]))
        there = torch.ones(1, 2, 1, 8).bfloat16()
        for layer in range(3):
            cache.update(there, there, layer)
        with torch.no_grad():
            return first(x, position_embeddings=turned, **handed(cache))

    want, met = alone(), []
    with torch.no_grad(), dartprune.Dense()(model) as run:
        torch.testing.assert_close(alone(), want, rtol=0.05, atol=0.05)
        cache = cached(model, run)

        def elsewhere():
            thread = threading.Thread(target=lambda: met.append(alone()))
            thread.start()
            thread.join()

        original = model.model.norm.forward
        model.model.norm.forward = lambda h: elsewhere() or original(h)
        with run.phase("decode"):
            step(model, cache)
        model.model.norm.forward = original
    torch.testing.assert_close(met[-1], want, rtol=0.05, atol=0.05)


def test_a_decoder_whose_forward_somebody_replaced_runs_as_they_wrote_it(calls):
    """Whatever layers it calls."""
    model = model_of("llama")
    with torch.no_grad(), dartprune.Dense()(model) as run:
        cache = cached(model, run)
        with run.phase("decode"):
            before = step(model, cache).logits
            cache.crop(-1)
            forward, layers = model.model.forward, model.model.layers

            def shorter(*args, **kwargs):
                model.model.layers = layers[:2]
                try:
                    return forward(*args, **kwargs)
                finally:
                    model.model.layers = layers

            model.model.forward = shorter
            after = step(model, cache).logits
            model.model.forward = forward
    assert len(calls) == 1 and not torch.equal(before, after)


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm"])
def test_weights_that_are_replaced_are_read(name, calls):
    model = model_of("qwen3")
    norm, made = model.model.layers[1].get_submodule(name), []
    with torch.no_grad(), dartprune.Dense()(model) as run:
        cache = cached(model, run)
        with run.phase("decode"):
            for factor in (1, 3):
                norm.weight.data = norm.weight.data * factor
                made.append(step(model, cache).logits)
                cache.crop(-1)
    with torch.no_grad(), dartprune.Dense()(model) as run:
        norm.weight.data = norm.weight.data / 3
        cache = cached(model, run)  # as the first was
        norm.weight.data = norm.weight.data * 3
        with run.phase("decode"):
            want = step(model, cache).logits
    assert torch.equal(made[1], want) and not torch.equal(*made) and len(calls) == 3


def test_norms_of_another_dtype_are_left_to_the_modules(calls):
    model = model_of("llama")

    def change(ids, scores):
        if ids.shape[1] == 24 + 3:
            model.model.layers[1].post_attention_layernorm.float()
        return scores

    with torch.no_grad(), suppress(RuntimeError), dartprune.Dense()(model):  # what the modules make of it is theirs
        model.generate(**prompt(1), max_new_tokens=8, do_sample=False, logits_processor=[change], pad_token_id=0)
    assert len(calls) == 3


def test_weights_of_another_shape_are_left_to_the_modules(calls):
    """A kernel that still counts on the old one would read what lies behind."""
    model, want = model_of("llama", bits=None), []
    mlp = model.model.layers[1].mlp
    with torch.no_grad(), dartprune.Dense()(model) as run:
        cache = cached(model, run)
        with run.phase("decode"):
            step(model, cache)
            cache.crop(-1)
            for part in (mlp.gate_proj, mlp.up_proj):
                part.weight = torch.nn.Parameter(part.weight[:40].clone())
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :40].clone())
            want.append(step(model, cache).logits)
            cache.crop(-1)
            monitor = mlp.register_forward_hook(lambda *given: None)  # certainly by modules
            want.append(step(model, cache).logits)
            monitor.remove()
    assert len(calls) == 1 and torch.equal(*want)


def test_a_bias_that_comes_while_attached_is_added(calls):
    model, made = model_of("llama", bits=None), []
    with torch.no_grad(), dartprune.Dense()(model) as run:
        cache = cached(model, run)
        with run.phase("decode"):
            made.append(step(model, cache).logits)
            cache.crop(-1)
            model.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(32).bfloat16())
            made.append(step(model, cache).logits)
    assert len(calls) == 1 and not torch.allclose(*made)


def test_all_hidden_states_are_given(calls):
    model = model_of("llama")
    with torch.no_grad(), dartprune.Dense()(model) as run:
        cache = cached(model, run)
        with run.phase("decode"):
            cache_before = copy.deepcopy(cache)
            step(model, cache)
            mask = torch.ones(1, cache_before.get_seq_length() + 1, dtype=torch.int64)
            out = model(
                input_ids=torch.tensor([[20]]), attention_mask=mask, **handed(cache_before), output_hidden_states=True
            )
    states = out.hidden_states
    assert len(states) == 4 and len(calls) == 1
    assert not any(torch.equal(a, b) for a, b in pairwise(states))


def test_generation_in_all_its_forms(calls):
    """Samples, beams, drafts and cropped caches."""
    model, inputs = model_of("llama"), prompt(1)
    run = dartprune.Static(0.5, min_traced=4).attach(model)
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert len(calls) == 19
    looked_up = model.generate(**inputs, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3, pad_token_id=0)
    beams = model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
    sampled = model.generate(**inputs, max_new_tokens=8, do_sample=True, pad_token_id=0)
    exits = model.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_early_exit=1, pad_token_id=0)
    run.detach()
    assert plain.shape == looked_up.shape and beams.shape == sampled.shape
    agreed = (exits[0, : plain.shape[1]] == plain[0, : exits.shape[1]]).float().mean()
    assert agreed > 0.6
    assert 3 in calls


def test_paused_pruning_is_dense(calls):
    model, inputs = model_of("llama"), prompt(1)
    dense = decoded(model, dartprune.Dense(), inputs, steps=8)[0]
    with torch.no_grad(), dartprune.Static(0.5)(model) as run, run.dense():
        paused = model.generate(
            **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    assert len(calls) == 7  # of the run that prunes nothing: the other's steps go by modules
    torch.testing.assert_close(torch.stack(paused.logits)[:2], dense[:2], rtol=0.1, atol=0.1)


def test_nothing_keeps_a_model_alive():
    model = model_of("llama")
    decoded(model, dartprune.SketchDart(0.4), prompt(1), steps=4)
    left = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()
    assert left() is None


def test_a_step_that_fails_after_its_layers_leaves_nothing_behind(calls):
    """Neither inputs for a replay nor counts of chosen neurons."""
    model, ids = model_of("qwen2"), prompt(1)["input_ids"]
    with torch.no_grad(), dartprune.SketchDart(0.4)(model) as run:
        cache = t.DynamicCache(config=model.config)
        with run.phase("prefill"):
            model(ids, past_key_values=cache)
        with run.phase("decode"):
            model(ids[:, :1], past_key_values=cache)
        rings = run.layers[0].ring.rings
        before = rings.codes.clone()
        handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), run.phase("decode"):
            model(ids[:, 1:2], past_key_values=cache)
        handle.remove()
        assert calls == [1, 1]  # the layers had been computed
        rings.settle()
        assert torch.equal(rings.codes, before) and run._parts.spending._told is None


@pytest.mark.parametrize("name", ["dense", "sketch"])
def test_a_cache_that_was_let_go_of_is_gone_while_attached(name, calls):
    model, inputs = model_of("qwen2"), prompt(1)
    with torch.no_grad(), PRUNERS[name](model):
        out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0, eos_token_id=-1)
        left = [weakref.ref(part) for part in vars(out.past_key_values.layers[0])["_dartprune_room"][0]]
        assert calls
        del out
        gc.collect()
        assert all(ref() is None for ref in left)
