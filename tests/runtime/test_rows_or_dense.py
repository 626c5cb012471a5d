"""A batch is computed by rows or dense with masks, whichever was measured as faster; results and counts agree."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("numba")

from dartprune import Dart, Static
from dartprune.ffn.timing import BATCHES, Timing
from dartprune.runtime import rows_or_dense as choice
from test_compile import EAGER, decode
from test_matrix import tokens
from tiny import FAMILIES

ROWS = Timing((1.0,) * len(BATCHES), 0.0, 0.0)
DENSE = Timing((0.0,) * len(BATCHES), 1.0, 1.0)


@pytest.fixture
def measured(monkeypatch):
    """Decide what was measured; small layers may choose too."""
    calls = []

    def set_to(timing):
        def kept(folder, weights, dense):
            calls.append(len(weights))
            for layer, work in zip(weights, dense, strict=True):
                assert work(torch.zeros(2, layer.hidden)).shape == (2, layer.hidden)
            return timing

        monkeypatch.setattr(choice, "SMALL", 0)
        monkeypatch.setattr(choice, "kept_timing", kept)
        return calls

    return set_to


def run_of(model, lines, pruner=None, **options):
    prompt = tokens(model, lines=lines)
    with (pruner or Static(sparsity=0.5))(model, backend="cpu") as run:
        out = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
        return out, run.report()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gemma2"])
def test_both_ways_give_the_same_tokens(measured, family):
    model = FAMILIES[family]()
    measured(ROWS)
    want, rows = run_of(model, 3)
    measured(DENSE)
    got, dense = run_of(model, 3)
    assert torch.equal(got, want)
    assert rows.realised_sparsity == dense.realised_sparsity > 0.4
    assert rows.bytes_saved > 0 and dense.bytes_saved == 0
    assert any("5 of 5 pruned steps ran dense with masks" in why for why in dense.reasons["FFN bytes saved"])
    assert not any("dense with masks" in why for why in rows.reasons.get("FFN bytes saved", []))


def test_one_sequence_always_reads_rows(measured):
    calls = measured(DENSE)
    _, report = run_of(FAMILIES["llama"](), 1)
    assert report.bytes_saved > 0 and not calls


def test_small_layers_are_not_measured(monkeypatch):
    monkeypatch.setattr(choice, "kept_timing", lambda *given: pytest.fail("measured"))
    _, report = run_of(FAMILIES["llama"](), 3)
    assert report.bytes_saved > 0


def test_the_union_decides(measured):
    model = FAMILIES["llama"]()
    neurons = model.config.intermediate_size
    # two alike lines have a union of half the neurons, which costs less than the dense FFN; two different ones more
    measured(Timing((0.55 * neurons,) * len(BATCHES), 1.0, 0.0))
    text = tokens(model, lines=2)
    for prompt, saves in ((text[:1].repeat(2, 1), True), (text, False)):
        with Static(sparsity=0.5)(model, backend="cpu") as run:
            model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
            assert (run.report().bytes_saved > 0) is saves


def test_decided_anew_only_when_masks_change(measured):
    model = FAMILIES["llama"]()
    calls = measured(ROWS)
    with EAGER(model, backend="cpu") as run:
        compared = []
        compare = run._forwards.rows_or_dense._compare
        run._forwards.rows_or_dense._compare = lambda slots: compared.append(len(slots)) or compare(slots)
        decode(model, model, run, tokens(model), tokens(model, length=24, seed=3))
        changes = {event.decoded for event in run.report().events}
    assert changes and len(compared) == 1 + len(changes)
    assert calls == [3]  # one shape, three layers of it


def test_compiled_steps_take_the_choice(measured):
    torch._dynamo.reset()
    model = FAMILIES["llama"]()
    prompt, new = tokens(model), tokens(model, length=12, seed=3)
    measured(ROWS)
    with EAGER(model, backend="cpu") as run:
        want = decode(model, model, run, prompt, new)
    measured(DENSE)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=True)
    graphs = []
    for _ in range(4):
        with EAGER(model, backend="cpu") as run:
            got = decode(model, model, run, prompt, new)
            assert run.report().bytes_saved <= 0
        graphs.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert graphs[-1] == graphs[1], graphs
    torch._dynamo.reset()


def test_masks_of_a_dart_run_follow_its_replays(measured):
    model = FAMILIES["llama"]()
    pruner = Dart(sparsity=0.5, detector=EAGER.detector, refresh=EAGER.refresh)
    prompt = tokens(model, lines=2)
    outs = []
    for timing in (ROWS, DENSE):
        measured(timing)
        with pruner(model, backend="cpu") as run:
            outs.append(model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False))
            assert run.report().events
    assert torch.equal(*outs)
