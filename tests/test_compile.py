"""torch.compile: the same tokens, no graph break in a decode step, no recompilation at re-entry or at a mask change."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from dartprune import Dart, Detector, Replay, Static, presets
from dartprune.model.caches import handed
from test_matrix import tokens
from tiny import FAMILIES

EAGER = Dart(
    sparsity=0.5,
    detector=Detector(window=4, patience=1, min_drop=0.0, delta=0.0),
    refresh=Replay(tokens=8, settle=16),
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def decode(model, forward, run, prompt, new):
    logits = []
    with torch.no_grad():
        with run.phase("prefill"):
            cache = model(input_ids=prompt, use_cache=True).past_key_values
        with run.phase("decode"):
            for t in range(new.shape[1]):
                logits.append(forward(input_ids=new[:, t : t + 1], **handed(cache)).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("family", "backend"), [("llama", "masked"), ("llama", "cpu"), ("opt", "reference"), ("gemma2", "cpu")]
)
def test_compiled_forward_gives_the_same(family, backend):
    model = FAMILIES[family]()
    prompt, new = tokens(model), tokens(model, length=24, seed=3)
    with EAGER(model, backend=backend) as run:
        want = decode(model, model, run, prompt, new)
        events = [(e.kind, e.decoded) for e in run.report().events]
    assert events
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=True)
    with EAGER(model, backend=backend) as run:
        got = decode(model, model, run, prompt, new)
        assert [(e.kind, e.decoded) for e in run.report().events] == events
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["masked", "cpu"])
def test_entering_twenty_times_recompiles_nothing(backend):
    model = FAMILIES["llama"]()
    prompt, new = tokens(model), tokens(model, length=12, seed=3)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=True)
    frames = []
    for entry in range(21):
        with EAGER(model, backend=backend) as run:
            decode(model, model, run, prompt, tokens(model, length=12, seed=entry))
        frames.append(counters["stats"]["unique_graphs"])
    # the first entries see prefill and decode, and learn which sizes change
    assert frames[-1] == frames[2], frames
    assert frames[-1] <= 4, frames
    assert new.shape[1] == 12


def test_generate_compiles_the_call_with_a_static_cache():
    from transformers import CompileConfig

    model = FAMILIES["llama"]()
    prompt = tokens(model)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    options = {
        "max_new_tokens": 20,
        "min_new_tokens": 20,
        "do_sample": False,
        "cache_implementation": "static",
    }
    with EAGER(model, backend="masked") as run:
        want = model.generate(prompt, **options, disable_compile=True)
        expected = run.report()
    assert expected.events
    graphs = []
    for _ in range(3):
        with EAGER(model, backend="masked") as run:
            got = model.generate(prompt, **options, compile_config=config)
            report = run.report()
        graphs.append(counters["stats"]["unique_graphs"])
        assert torch.equal(got, want)
        assert [(e.kind, e.decoded) for e in report.events] == [(e.kind, e.decoded) for e in expected.events]
        assert (report.dense_tokens, report.pruned_tokens) == (expected.dense_tokens, expected.pruned_tokens)
    assert graphs[0] >= 1, "nothing was compiled: the test shows nothing"
    assert graphs[1] == graphs[2], graphs


def test_a_compiled_module_is_pruned_not_silently_dense():
    model = FAMILIES["llama"]()
    prompt, new = tokens(model), tokens(model, length=6, seed=3)
    with Static(sparsity=0.6)(model) as run:
        want = decode(model, model, run, prompt, new)
    compiled = torch.compile(model, backend="eager")
    with Static(sparsity=0.6)(compiled) as run:
        got = decode(compiled, compiled, run, prompt, new)
        assert run.report().pruned_tokens == 12
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "backend", "preset"),
    [("llama", "cpu", "gated-dart"), ("opt", "masked", "sketch-dart")],
)
def test_token_selectors_compile_once(family, backend, preset):
    model = FAMILIES[family]()
    pruner = presets.get(preset)(sparsity=0.5)
    prompt, new = tokens(model), tokens(model, length=10, seed=3)
    with pruner(model, backend=backend) as run:
        want = decode(model, model, run, prompt, new)
        spared = run.report().realised_sparsity
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=True)
    frames = []
    for _ in range(4):
        with pruner(model, backend=backend) as run:
            got = decode(model, model, run, prompt, new)
            assert run.report().realised_sparsity == pytest.approx(spared, abs=1e-3)
        frames.append(counters["stats"]["unique_graphs"])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert frames[-1] == frames[2], frames
