"""The rest of a decode step by kernels: near transformers' own wherever it is taken over."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t

import dartprune
from dartprune.model.caches import handed
from dartprune.model.packed_bytes import ByteEmbedding, ByteLinear
from dartprune.model.packed_rows import RowEmbedding, RowProjection
from dartprune.model.step_attention import grown
from tiny import FAMILIES

pytest.importorskip("numba")
OWN = ["llama", "llama-bias", "mistral", "qwen2", "qwen3"]


def model_of(family, dtype=torch.bfloat16):
    return FAMILIES[family]().to(dtype)


def prompt(lines=1, length=12, padded=False):
    torch.manual_seed(lines)
    ids = torch.randint(2, 128, (lines, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
        ids[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model, inputs, steps=6):
    """Logits of steps on a cache, the tokens given."""
    out, cache = [], t.DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, **handed(cache), use_cache=True)
        mask = inputs["attention_mask"]
        for step in range(steps):
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            token = torch.full((len(mask), 1), 20 + step)
            positions = (mask.cumsum(1) - 1)[:, -1:]
            out.append(model(input_ids=token, attention_mask=mask, position_ids=positions, **handed(cache)).logits)
    return torch.cat(out, dim=1)


def attached(model, inputs, steps=6):
    run = dartprune.Dense().attach(model)
    try:
        with run.phase("prefill"):
            pass
        out, cache = [], t.DynamicCache(config=model.config)
        mask = inputs["attention_mask"]
        with torch.no_grad():
            with run.phase("prefill"):
                model(**inputs, **handed(cache), use_cache=True)
            with run.phase("decode"):
                for step in range(steps):
                    mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
                    token = torch.full((len(mask), 1), 20 + step)
                    positions = (mask.cumsum(1) - 1)[:, -1:]
                    out.append(
                        model(input_ids=token, attention_mask=mask, position_ids=positions, **handed(cache)).logits
                    )
        return torch.cat(out, dim=1), run.report()
    finally:
        run.detach()


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize(("lines", "padded"), [(1, False), (1, True), (3, True), (6, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_are_as_near_to_exact_as_transformers_own(family, lines, padded, dtype):
    """Both differ from the float32 model by rounding; ours by no more than half as much again."""
    inputs = prompt(lines, padded=padded)
    model = model_of(family, dtype)
    exact = logits_of(copy.deepcopy(model).float(), inputs)
    theirs = logits_of(model, inputs).float() - exact
    ours, report = attached(model, inputs)
    ours = ours.float() - exact
    # one call for all layers knows no biases of FFNs, no windows and no more than four lines
    together = family not in ("llama-bias", "mistral") and lines <= 4
    assert report.step.startswith("3 layers in one call" if together else "3 attention layers")
    assert ours.square().mean() <= 1.5 * theirs.square().mean() + 1e-6
    assert torch.equal(logits_of(model, inputs).float() - exact, theirs)  # given back as it was


def quantised(family, bits, whole=True):
    """A model in bf16 whose weights are packed, and one in float32 with the weights that it computes with."""
    model, exact = model_of(family), FAMILIES[family]()
    dartprune.quantise(model, bits, whole=whole)
    for name, module in model.named_modules():
        other = exact.get_submodule(name)
        if isinstance(module, RowProjection):
            unpacked = module.rows().unpacked(module.role, dtype=torch.float32)
            other.weight.data = unpacked.t().contiguous() if module.role == "down" else unpacked
        elif isinstance(module, RowEmbedding):
            other.weight.data = module.rows().unpacked("up", dtype=torch.float32)
        elif isinstance(module, (ByteLinear, ByteEmbedding)):
            other.weight.data = module.weight8.float() * module.scale.float()[:, None]
        elif isinstance(getattr(module, "weight", None), torch.Tensor):
            other.weight.data = module.weight.detach().float()
        if isinstance(getattr(module, "bias", None), torch.Tensor):
            other.bias.data = module.bias.detach().float()
    return model, exact


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize(("lines", "padded"), [(1, False), (3, True), (6, False)])
@pytest.mark.parametrize(("bits", "whole"), [(4, True), (8, True), (4, False)])
def test_quantised_steps_are_near_those_with_unpacked_weights(family, lines, padded, bits, whole):
    """Attached and not, they differ by the rounding of inputs to 8 bits, in places of their own."""
    inputs, (model, exact) = prompt(lines, padded=padded), quantised(family, bits, whole)
    want, theirs = logits_of(exact, inputs), logits_of(model, inputs)
    ours, report = attached(model, inputs)
    together = whole and family not in ("llama-bias", "mistral") and lines <= 4
    told = "3 layers in one call of a kernel" if together else "3 attention layers"
    assert report.step.startswith(told) and ("3 dense FFNs" in report.step) != together
    size = want.square().mean()
    assert (theirs - want).square().mean() < 0.01 * size
    assert (ours - want).square().mean() < 0.01 * size
    assert torch.equal(logits_of(model, inputs), theirs)


def test_only_runs_that_prune_nothing_compute_dense_ffns_by_rows():
    model, _ = quantised("llama", 4, whole=False)
    for pruner, told in ((dartprune.Dense(), True), (dartprune.Dart(0.5), False), (dartprune.Dense(), True)):
        with pruner(model) as run:
            step = run.report().step
        assert ("3 dense FFNs" in step) == told and "3 attention layers" in step


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.act_fn"]
)
def test_hooks_on_packed_projections_are_in_force(name):
    inputs, (model, _) = prompt(), quantised("qwen2", 4)
    plain, _ = attached(model, inputs)
    seen = []
    part = model.model.layers[1].get_submodule(name)
    handle = part.register_forward_hook(lambda module, args, out: seen.append(out.shape) or out * 0)
    changed, want = attached(model, inputs)[0], logits_of(model, inputs)
    handle.remove()
    assert len(seen) == 2 * 7  # the prompt and six tokens, twice
    assert (changed - want).abs().max() < 0.1 * want.abs().max() and not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(attached(model, inputs)[0], plain)


def test_weights_that_are_replaced_are_the_ones_that_are_read():
    """What the kernels see of a module is made again where its weights lie elsewhere by now."""
    inputs, model = prompt(), model_of("qwen2")
    token = {"input_ids": torch.tensor([[20]]), "attention_mask": torch.ones(1, 13, dtype=torch.int64)}
    caches = [t.DynamicCache(config=model.config) for _ in range(3)]
    with torch.no_grad():
        for cache in caches:
            model(**inputs, **handed(cache), use_cache=True)
        with dartprune.Dense()(model) as run, run.phase("decode"):
            before = model(**token, **handed(caches[0])).logits
            layer = model.model.layers[0]
            for module in (layer.self_attn.v_proj, layer.input_layernorm):
                module.weight.data = module.weight.data * 3
            ours = model(**token, **handed(caches[1])).logits
        want = model(**token, **handed(caches[2])).logits
    size = want.abs().max()
    assert (ours - want).abs().max() < 0.1 * size < (ours - before).abs().max()


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "phi3"])
def test_other_families_keep_their_attention(family):
    _, report = attached(model_of(family), prompt())
    assert "attention" not in report.step


def test_float32_is_left_to_torch():
    model, inputs = model_of("llama", torch.float32), prompt(2)
    before = logits_of(model, inputs)
    ours, report = attached(model, inputs)
    assert torch.equal(ours, before) and report.step == "transformers' own"


def test_nothing_keeps_a_model_alive():
    import gc
    import weakref

    model = model_of("llama")
    attached(model, prompt())
    left = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()
    assert left() is None


def test_generation_in_all_its_forms():
    """Samples, beams, prompt lookup and a cropped cache go through the own step and come out as before."""
    model, inputs = model_of("llama"), prompt(2)
    calls = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.3},
    ]
    for call in calls:
        alone = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
        before = model.generate(**inputs, **alone, **call)
        run = dartprune.Dense().attach(model)
        after = model.generate(**inputs, **alone, **call)
        run.detach()
        assert before.sequences.shape == after.sequences.shape
        first = before.scores[0], after.scores[0]
        torch.testing.assert_close(*(torch.nan_to_num(part.float(), neginf=0) for part in first), rtol=0.1, atol=0.2)
    single = prompt(1)
    run = dartprune.Static(0.5).attach(model)
    plain = model.generate(**single, max_new_tokens=20, do_sample=False)
    looked_up = model.generate(**single, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    run.detach()
    assert plain.shape == looked_up.shape


def test_attention_outputs_and_gradients_go_the_old_way():
    model, inputs = model_of("llama"), prompt(1)
    run = dartprune.Dense().attach(model)
    cache = t.DynamicCache(config=model.config)
    with torch.no_grad(), run.phase("prefill"):
        model(**inputs, **handed(cache))
    token = torch.tensor([[5]])
    with run.phase("decode"):
        out = model(input_ids=token, **handed(cache), output_hidden_states=True)
    assert out.logits.requires_grad and len(out.hidden_states) == 4
    run.detach()


def appended(layer, key, value):
    """What the kernels do: one more token in a cache's layer."""
    length = layer.keys.shape[2]
    for room, new in zip(grown(layer), (key, value), strict=True):
        room[:, :, length : length + 1] = new
    return layer.keys, layer.values


class Layer:
    """A cache's layer, as far as `grown` looks at it."""

    def __init__(self, length, lines=2):
        self.keys, self.values = torch.randn(lines, 2, length, 8), torch.randn(lines, 2, length, 8)


def test_the_cache_grows_in_place_and_survives_what_is_done_to_it():
    layer = Layer(10)
    keys, values = layer.keys.clone(), layer.values.clone()
    addresses = set()
    for step in range(150):
        key, value = torch.randn(len(keys), 2, 1, 8), torch.randn(len(keys), 2, 1, 8)
        keys, values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        got = appended(layer, key, value)
        assert torch.equal(got[0], keys) and torch.equal(got[1], values) and layer.keys is got[0]
        addresses.add(layer.keys.data_ptr())
        if step == 40:  # a crop
            layer.keys, layer.values = layer.keys[..., :-7, :], layer.values[..., :-7, :]
            keys, values = keys[..., :-7, :].clone(), values[..., :-7, :].clone()
        if step == 60:  # lines change places
            order = torch.tensor([1, 0])
            layer.keys, layer.values = layer.keys.index_select(0, order), layer.values.index_select(0, order)
            keys, values = keys[order], values[order]
        if step == 80:  # a copy that goes on by itself
            twin = copy.deepcopy(layer)
            before = layer.keys.clone()
            appended(twin, key + 1, value + 1)
            assert torch.equal(layer.keys, before)
    assert len(addresses) < 8  # and not one for every token


def test_a_snapshot_of_the_cache_is_not_written_to():
    layer = Layer(10)
    appended(layer, torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8))
    snapshot, before = layer.keys, layer.keys.clone()
    layer.keys, layer.values = layer.keys[:, :, :6], layer.values[:, :, :6]
    for _ in range(100):
        appended(layer, torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8))
    assert torch.equal(snapshot, before)


@pytest.mark.parametrize("what", ["pre-hook", "hook", "another forward"])
def test_what_others_do_to_a_projection_is_done(what):
    """The kernel of the whole module takes the four products over only where nobody has to do with them."""
    inputs, model = prompt(), model_of("qwen2")
    plain, _ = attached(model, inputs)
    value = model.model.layers[1].self_attn.v_proj
    if what == "hook":
        handle = value.register_forward_hook(lambda module, args, out: out * 0)
    elif what == "pre-hook":
        handle = value.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    else:
        original = value.forward
        value.forward = lambda x: original(x) * 0
    changed, want = attached(model, inputs)[0], logits_of(model, inputs)
    assert (changed - want).abs().max() < 0.1 * want.abs().max()
    assert not torch.allclose(changed, plain, atol=1e-3)
    if what != "another forward":
        handle.remove()
    else:
        del value.forward
    assert torch.equal(attached(model, inputs)[0], plain)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_hooks_on_the_norms_of_heads_are_in_force(name):
    inputs, model = prompt(), model_of("qwen3")
    plain, _ = attached(model, inputs)
    norm = getattr(model.model.layers[1].self_attn, name)
    seen = []
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(out.shape) or out * 0.5)
    changed, want = attached(model, inputs)[0], logits_of(model, inputs)
    assert len(seen) == 2 * 7  # the prompt and six tokens, twice
    assert (changed - want).abs().max() < 0.1 * want.abs().max() and not torch.allclose(changed, plain, atol=1e-3)
    handle.remove()
    assert torch.equal(attached(model, inputs)[0], plain)


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "q_norm"])
def test_norms_kept_in_float32_are_left_to_transformers(name):
    """What a model can without us it can with us, and the other way round."""
    inputs, model = prompt(), model_of("qwen3")
    for layer in model.model.layers:
        norm = getattr(layer, name, None) or getattr(layer.self_attn, name)
        norm.float()
    try:
        want = logits_of(model, inputs)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            attached(model, inputs)
        return
    assert (attached(model, inputs)[0] - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_become_floats_and_floats_the_nearest_words(dtype):
    import numpy as np

    from dartprune.ffn.cpu.arrays import words
    from dartprune.ffn.cpu.step_kernels import narrowed, widened

    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = np.empty(len(every), np.float32)
    widened(words("every", every), wide)
    assert torch.equal(torch.from_numpy(wide).nan_to_num(123), every.float().nan_to_num(123))
    torch.manual_seed(0)
    values = torch.cat((every.float(), torch.randn(5000) * 100, torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 3e38, 1e-42])))
    out = torch.empty(len(values), dtype=dtype)
    narrowed(values.numpy(), words("out", out))
    want = values.to(dtype)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.nan_to_num(), want.nan_to_num())
