"""A sketch that the context calibrates: what it learns from which tokens, and what it then expects."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dartprune import DepthAware, Detector, Replay, Sketch, SketchDart
from dartprune.ffn.expected import expected_sizes, mean_and_square
from dartprune.model.caches import handed
from dartprune.model.families import describe
from dartprune.runtime import layer_hooks
from dartprune.runtime.sample import is_sampled
from dartprune.runtime.selectors.sketch_layer import PRIOR_TOKENS
from oracle import inputs_of_ffn, sketch_products
from test_matrix import tokens
from tiny import FAMILIES

PRUNER = SketchDart(sparsity=0.4, token=Sketch(bits=2))


# ---- what is expected


def test_without_errors_an_estimate_is_what_it_is():
    gate, up = torch.randn(5, 9), torch.randn(5, 9)
    nothing = torch.zeros(5, 4, 9)
    torch.testing.assert_close(expected_sizes(F.silu, gate, up, nothing), (F.silu(gate) * up).abs())
    torch.testing.assert_close(expected_sizes(F.silu, None, up, nothing[:, :2]), F.silu(up).abs())


@pytest.mark.parametrize(("act", "tolerance"), [(lambda z: z, 1e-5), (F.relu, 0.25), (F.silu, 0.05), (F.gelu, 0.1)])
def test_the_expectation_against_drawn_errors(act, tolerance):
    generator = torch.Generator().manual_seed(3)
    gate, up = torch.randn(1, 40, generator=generator), torch.randn(1, 40, generator=generator)
    mean = torch.randn(2, 40, generator=generator) * 0.5
    spread = torch.rand(2, 40, generator=generator)
    errors = torch.stack((mean, spread**2), dim=1).flatten(0, 1)[None]
    # many quantiles of the normal distribution stand for the drawing
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20_000) + 0.5) / 20_000)[:, None]
    drawn = act(gate + mean[0] + z * spread[0]).square().mean(0), (up + mean[1] + z * spread[1]).square().mean(0)
    got, want = expected_sizes(act, gate, up, errors)[0], (drawn[0] * drawn[1]).sqrt()
    if tolerance < 1e-3:
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4)
    assert float((got - want).abs().max() / want.max()) < max(tolerance, 2e-3)
    alone = expected_sizes(act, None, gate, errors[:, :2])[0]
    assert float((alone - drawn[0].sqrt()).abs().max() / drawn[0].sqrt().max()) < max(tolerance, 2e-3)


# ---- which tokens teach


def test_all_of_the_first_tokens_teach_then_ever_fewer():
    taught = is_sampled(torch.arange(600)).nonzero()[:, 0].tolist()
    assert taught[:16] == list(range(16))
    assert taught[16:20] == [16, 20, 24, 28]
    assert taught[20:24] == [32, 40, 48, 56]
    assert taught[24:28] == [64, 80, 96, 112]
    assert taught[32:36] == [256, 320, 384, 448] and taught[36:] == [512]


def moments_by_hand(model, run, inputs, counted, layer_index):
    """Means and variances of a sequence's errors from its FFN inputs [T, H], token by token; counted: traced ones."""
    layer = describe(model).layers[layer_index]
    selector = run.layers[layer_index].selector
    taught = [x for n, x in enumerate(inputs[counted]) if bool(is_sampled(torch.tensor(n)))]
    exact = layer.products(torch.stack(taught))
    estimate = sketch_products(selector.sketch, layer, torch.stack(taught))
    out = []
    for number, (true, near) in enumerate(zip(exact, estimate, strict=True)):
        if true is None:
            continue
        error = true - near
        begin = selector._rounding[2 * (number if exact[0] is not None else 0) + 1].float() * taught[0].square().mean()
        n = PRIOR_TOKENS + len(taught)
        mean = error.sum(0) / n
        out += [mean, (error.square().sum(0) + PRIOR_TOKENS * begin) / n - mean.square()]
    return torch.stack(out)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "phi3", "opt", "gpt_neox"])
@torch.no_grad()
def test_what_a_prompt_teaches(family):
    model = FAMILIES[family]()
    ids = tokens(model, lines=2, length=40)
    x = inputs_of_ffn(model, 1, ids).reshape(2, 40, -1)
    with PRUNER(model) as run:
        cache = run.prefill(ids)
        for line, slot in enumerate(run.slots_of(cache)):
            got = run.layers[1].selector.errors[slot]
            counted = torch.arange(40) >= PRUNER.skip_first
            want = moments_by_hand(model, run, x[line], counted, 1)
            torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-6)  # held in bf16
            assert float(run.layers[1].selector.known[slot]) == PRIOR_TOKENS + 21  # of 39 traced ones: 16, 4 and 1


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
@torch.no_grad()
def test_the_forward_itself_tells_the_exact_products(family, monkeypatch):
    model = FAMILIES[family]()
    ids = tokens(model, lines=2, length=40)
    with PRUNER(model) as run:
        # were they computed again, it would be here
        monkeypatch.setattr(type(run.layers[0].parts), "products", None)
        cache = run.prefill(ids)
        known = [float(run.layers[1].selector.known[slot]) for slot in run.slots_of(cache)]
    assert known == [PRIOR_TOKENS + 21] * 2


@torch.no_grad()
def test_overheard_products_are_the_layers_own():
    for family in ("llama", "llama-bias", "phi3", "gpt_neox"):
        model = FAMILIES[family]()
        layer = describe(model).layers[0]
        x = torch.randn(2, 5, layer.hidden)
        rows = torch.tensor([7, 0, 7])
        some = x.flatten(0, 1)[rows]
        out, heard = layer.overheard(lambda layer=layer, x=x: layer.entry(x), rows)
        assert torch.equal(out, layer.entry(x)) and heard is not None
        for mine, theirs in zip(heard, layer.products(some), strict=True):
            assert (mine is None and theirs is None) or torch.allclose(mine, theirs, atol=1e-6)
        # what the FFN goes on to do in place changes nothing
        calls = [module for module in (layer.gate, layer.up) if module is not None]
        _, kept = layer.overheard(lambda calls=calls, x=x: [module(x).zero_() for module in calls][-1], rows)
        assert kept is not None and torch.equal(kept[1], heard[1])
        # a forward that goes another way tells nothing, and a failed one leaves nothing behind
        assert layer.overheard(lambda x=x: x, rows) == (x, None)
        assert layer.overheard(lambda layer=layer, x=x: (layer.up(x), layer.up(x))[0], rows)[1] is None
        with pytest.raises(ZeroDivisionError):
            layer.overheard(lambda: 1 / 0, rows)
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["errors", "means"])
@torch.no_grad()
def test_a_prompt_in_parts_and_in_a_padded_batch_teaches_the_same(name):
    model = FAMILIES["llama"]()
    ids = tokens(model, lines=1, length=37)

    def taught(run, cache):
        return run.layers[0].selector.tensors()[name][run.slots_of(cache)[0]].float().clone()

    with PRUNER(model) as run:
        cache = run.prefill(ids)
        whole = taught(run, cache)
    assert whole.any()
    with PRUNER(model) as run:
        with run.phase("prefill"):
            cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
            model(input_ids=ids[:, 5:], **handed(cache))
        parts = taught(run, cache)
    # kept in 16 bits, and rounded at each part
    torch.testing.assert_close(parts, whole, rtol=0.02, atol=1e-5)
    other = tokens(model, lines=1, length=44, seed=8)
    batch = torch.cat((F.pad(ids, (7, 0), value=1), other))
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    with PRUNER(model) as run, run.phase("prefill"):
        cache = model(input_ids=batch, attention_mask=mask, use_cache=True).past_key_values
        padded = taught(run, cache)
    torch.testing.assert_close(padded, whole, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("backend", ["masked", "cpu"])
@torch.no_grad()
def test_a_batch_writes_what_each_writes_alone(backend):
    model = FAMILIES["llama"]()
    texts = [tokens(model, lines=1, length=n, seed=n) for n in (3, 20, 45)]
    alone = []
    for text in texts:
        with PRUNER(model, backend=backend):
            alone.append(model.generate(text, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, -12:])
    width = max(text.shape[1] for text in texts)
    ids = torch.cat([F.pad(text, (width - text.shape[1], 0)) for text in texts])
    mask = torch.cat([F.pad(torch.ones_like(text), (width - text.shape[1], 0)) for text in texts])
    with PRUNER(model, backend=backend):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert out[:, -12:].tolist() == [tail.tolist() for tail in alone]


# ---- short prompts, events, and what it costs


@pytest.mark.parametrize(("length", "dense"), [(1, 1), (2, 0), (8, 0), (20, 0)])
@torch.no_grad()
def test_short_prompts_are_pruned_as_soon_as_one_token_has_taught(length, dense):
    model = FAMILIES["llama"]()
    with PRUNER(model) as run:
        model.generate(tokens(model, lines=1, length=length), max_new_tokens=10, min_new_tokens=10, do_sample=False)
        report = run.report()
    assert (report.dense_tokens, report.pruned_tokens) == (dense, 9 - dense)
    assert report.sequences[0].realised_sparsity == pytest.approx(0.4 * (9 - dense) / 9, abs=0.02)


def test_a_sketch_without_calibration_needs_no_context_at_all():
    model = FAMILIES["llama"]()
    with SketchDart(sparsity=0.4, token=Sketch(bits=2, calibrate=False))(model) as run:
        model.generate(tokens(model, lines=1, length=1), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert run.report().dense_tokens == 0
        assert "errors" not in run.layers[0].selector.tensors()


@torch.no_grad()
def test_what_no_mask_needs_is_not_measured(monkeypatch):
    model = FAMILIES["llama"]()
    ids = tokens(model, lines=1, length=12)
    counted = []
    monkeypatch.setattr(layer_hooks, "impact_terms", lambda *args, **kwargs: counted.append(args))
    with SketchDart(sparsity=0.4)(model) as run:
        cache = run.prefill(ids)
        model.generate(ids, past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=2)
        with pytest.raises(ValueError, match="SketchDart: its budget needs no impact"):
            run.impact(0)
    assert not counted
    monkeypatch.undo()
    with SketchDart(sparsity=0.4, budget=DepthAware())(model) as run:
        slot = run.slots_of(run.prefill(ids))[0]
        assert all(angle > 0 and change > 0 for angle, change in run.impact(slot))


@torch.no_grad()
def test_an_event_blends_in_what_the_last_tokens_teach(monkeypatch):
    model, seen = FAMILIES["llama"](), []
    monkeypatch.setattr("dartprune.drift.AttentionDrift.decide", lambda *args: not seen.append(1) and len(seen) == 2)
    pruner = SketchDart(
        sparsity=0.4, token=Sketch(bits=2), detector=Detector(window=4), refresh=Replay(tokens=8, memory=0.75, settle=0)
    )
    new = tokens(model, lines=1, length=12, seed=4)
    with pruner(model, backend="masked") as run:
        cache = run.prefill(tokens(model, lines=1, length=24))
        slot, layer = run.slots_of(cache)[0], run.layers[0]
        before = mean_and_square(layer.selector.errors[slot])
        inputs = []
        handle = (
            describe(model)
            .layers[0]
            .entry.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1)))
        )
        for t in range(12):
            with run.phase("decode"):
                model(input_ids=new[:, t : t + 1], **handed(cache))
            if run.report().events:
                break
            assert torch.equal(mean_and_square(layer.selector.errors[slot]), before)
        handle.remove()
        assert [event.kind for event in run.report().events] == ["replay"]
        after = mean_and_square(layer.selector.errors[slot])
        last = torch.stack(inputs[-8:])
        exact, near = layer.parts.products(last), sketch_products(layer.selector.sketch, layer.parts, last)
        fresh = torch.stack([f(p - q) for p, q in zip(exact, near, strict=True) for f in (mean_of, square_of)])
        # the ring holds 8-bit floats
        torch.testing.assert_close(after, 0.75 * before + 0.25 * fresh, rtol=0.05, atol=0.02 * float(fresh.abs().max()))


def mean_of(error):
    return error.mean(0)


def square_of(error):
    return error.square().mean(0)


@torch.no_grad()
def test_beams_take_their_errors_along():
    model = FAMILIES["llama"]()
    with PRUNER(model) as run:
        cache = run.prefill(tokens(model, lines=2, length=20))
        first, second = run.slots_of(cache)
        errors = run.layers[0].selector.errors.clone()
        cache.reorder_cache(torch.tensor([1, 1]))
        with run.phase("decode"):
            model(input_ids=tokens(model, lines=2, length=1, seed=3), **handed(cache))
        assert torch.equal(run.layers[0].selector.errors[first], errors[second])
        assert not torch.equal(errors[first], errors[second])


@pytest.mark.parametrize("backend", ["masked", "reference"])
@pytest.mark.parametrize("family", ["llama-bias", "gpt2"])
def test_statistics_keep_their_dtypes_in_a_model_of_float64_with_biases(family, backend):
    model = FAMILIES[family]().double()
    with PRUNER(model, backend=backend) as run:
        model.generate(tokens(model, lines=1, length=20), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert run.report().realised_sparsity == pytest.approx(0.4, abs=0.03)
        assert run.layers[0].selector.errors.dtype is torch.bfloat16 and run.layers[0].selector.means.any()


@torch.no_grad()
def test_heavy_tails_leave_numbers():
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight[3] = 1e4
        layer.mlp.gate_proj.weight[:, 5] *= 1e3
    with PRUNER(model) as run:
        model.generate(tokens(model, lines=1, length=20), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for layer in run.layers:
            assert torch.isfinite(layer.selector.errors).all()
            assert (layer.selector.errors[:, 1] >= 0).all()
        assert run.report().realised_sparsity == pytest.approx(0.4, abs=0.03)


@torch.no_grad()
def test_its_memory_is_in_the_report_and_its_bytes_are_counted():
    model = FAMILIES["llama"]()
    reports = []
    for calibrate in (True, False):
        with SketchDart(sparsity=0.4, token=Sketch(bits=2, calibrate=calibrate))(model) as run:
            model.generate(tokens(model, lines=1, length=20), max_new_tokens=9, min_new_tokens=9, do_sample=False)
            reports.append(run.report())
            selector, layer = run.layers[0].selector, describe(model).layers[0]
            # the norms, the moments, the means and what they give together
            beside = selector.sketch.bytes + 4 * layer.neurons * (1 + 2 * calibrate)
            beside += 2 * layer.neurons + 4 * layer.hidden
            assert selector.fixed_share(0) == pytest.approx(beside / layer.weight_bytes)
    more = reports[0].overhead_bytes_per_sequence - reports[1].overhead_bytes_per_sequence
    neurons = sum(layer.neurons for layer in describe(model).layers)
    assert more == 2 * 4 * neurons + 4 * len(describe(model).layers)
    for report in reports:
        assert report.realised_sparsity == pytest.approx(0.4, abs=0.02)
