"""Token selectors in every way of decoding, their accounting, and the inputs that could break them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from dartprune import (
    Dart,
    Detector,
    GatedDart,
    Never,
    PerToken,
    Pruner,
    Relearn,
    Release,
    Replay,
    Sketch,
    SketchDart,
    Static,
    TokenGate,
    Uniform,
)
from dartprune.ffn.reference import ReferenceBackend
from dartprune.ffn.selector_kernels import kernels_of
from dartprune.model.caches import handed
from dartprune.selectors import Exact
from test_decoding import padded
from test_matrix import tokens
from tiny import FAMILIES

EAGER = Detector(window=4, patience=1, min_drop=0.0, delta=0.0)
GATE = GatedDart(sparsity=0.5, detector=EAGER, refresh=Replay(tokens=8, settle=16))
SKETCH = SketchDart(sparsity=0.5, token=Sketch(bits=2))
EXACT = PerToken(sparsity=0.5)


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


def test_they_are_values():
    for pruner in (
        GATE,
        SKETCH,
        EXACT,
        Dart(token=TokenGate(rate=0.5, importance="down"), compensate=None),
        SketchDart(),
    ):
        data = pruner.to_dict()
        assert data["token"]["kind"] in ("gate", "sketch", "exact")
        assert Pruner.from_dict(data) == pruner
    old = Dart().to_dict()
    assert old.pop("token") is None
    assert Pruner.from_dict(old) == Dart()
    with pytest.raises(ValueError, match="unknown token setting 'rat': did you mean 'rate'"):
        Pruner.from_dict({**GATE.to_dict(), "token": {"kind": "gate", "rat": 0.5}})
    with pytest.raises(ValueError, match="unknown token selector 'gat'"):
        Pruner.from_dict({**GATE.to_dict(), "token": {"kind": "gat"}})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Dart(token="gate"), TypeError, "token must be None or one such as TokenGate"),
        (
            lambda: SketchDart(token=Sketch(calibrate=False), compensate=None, refresh=Replay()),
            ValueError,
            "Sketch learns nothing from the context, so a replay would change nothing",
        ),
        (lambda: Sketch(calibrate=1), TypeError, "calibrate must be True or False"),
        (lambda: GatedDart(selection="threshold"), ValueError, "selection must be 'topk'"),
        (lambda: GatedDart(compensate="mean"), ValueError, "compensate must be None"),
        (lambda: PerToken(compensate="mean"), ValueError, "compensate must be None"),
        (lambda: TokenGate(rate=0.0), ValueError, r"rate must lie in \(0, 1\]"),
        (lambda: TokenGate(importance="dwn"), ValueError, "did you mean 'down'"),
        (lambda: Sketch(bits=5), ValueError, "bits must be 1, 2, 3, 4 or 'auto'"),
        (lambda: Sketch(activation_bits=1), ValueError, "activation_bits must be a whole number from 2 to 8"),
    ],
)
def test_settings_that_make_no_sense(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("gated", [True, False])
def test_the_gate_reads_what_the_budget_allows(gated, rate):
    neurons, matrices = 1000, 3 if gated else 2
    for density in (0.05, 0.3, 0.5, 0.7, 1.0):
        candidates, chosen = TokenGate(rate=rate).split(density * neurons, neurons, gated=gated)
        assert 1 <= chosen <= candidates <= neurons
        read = candidates + (matrices - 1) * chosen
        assert read == pytest.approx(density * matrices * neurons, abs=2)
        if candidates < neurons:
            assert chosen / candidates == pytest.approx(rate, abs=0.05)


@pytest.mark.parametrize("pruner", [GATE, SKETCH, EXACT], ids=["gate", "sketch", "exact"])
@pytest.mark.parametrize(("family", "lengths"), [("llama", (20, 9)), ("opt", (12, 3)), ("gpt2", (20, 20))])
def test_a_batch_is_its_sequences_alone(family, lengths, pruner):
    model = FAMILIES[family]()
    texts = [tokens(model, lines=1, length=length, seed=seed) for seed, length in enumerate(lengths)]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    alone = []
    for text in texts:
        with pruner(model) as run:
            out = model.generate(text, attention_mask=torch.ones_like(text), **options)
            alone.append((out[0, text.shape[1] :], run.report().sequences[0]))
    ids, mask = padded(*texts)
    with pruner(model) as run:
        out = model.generate(ids, attention_mask=mask, **options)
        report = run.report()
    for line, (new, sequence) in enumerate(alone):
        same = report.sequences[line]
        assert torch.equal(out[line, ids.shape[1] :], new)
        assert (same.keep, same.candidates) == (sequence.keep, sequence.candidates)
        assert [(e.kind, e.decoded) for e in same.events] == [(e.kind, e.decoded) for e in sequence.events]
        assert same.realised_sparsity == pytest.approx(sequence.realised_sparsity, abs=1e-6)


@pytest.mark.parametrize("pruner", [GATE, SKETCH], ids=["gate", "sketch"])
def test_bytes_saved_are_those_of_the_union(llama, pruner):
    ids = tokens(llama, lines=1, length=20)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    saved = {}
    for lines in (1, 3):
        with pruner(llama, backend="reference") as run:
            llama.generate(ids.repeat(lines, 1), **options)
            report = run.report()
            saved[lines] = report.bytes_saved
            replays = len({(e.kind, e.decoded) for e in report.events if e.kind in ("replay", "settle")})
        assert report.realised_sparsity == pytest.approx(0.5, abs=0.02)
    # three equal lines choose the same neurons, so that nothing more is read but what each was taught
    taught = [(2 * 4 + 2) * la.parts.neurons + 4 * la.parts.hidden if pruner is SKETCH else 0 for la in run.layers]
    more = 2 * sum(taught) / sum(la.parts.weight_bytes for la in run.layers)
    assert saved[1] - more == pytest.approx(saved[3], abs=1e-6)
    assert saved[1] == pytest.approx(report.realised_sparsity - replays * (2 / 3) / 11, abs=1e-3)
    with pruner(llama, backend="reference") as run:
        llama.generate(tokens(llama, lines=3, length=20, seed=5), **options)
        assert run.report().bytes_saved < saved[1]


@pytest.mark.parametrize("pruner", [GATE, SKETCH], ids=["gate", "sketch"])
def test_where_each_row_reads_its_own_neurons_all_of_them_count(llama, pruner, monkeypatch):
    own = replace(kernels_of(ReferenceBackend()), reads_union=False)
    monkeypatch.setattr("dartprune.runtime.selectors.build.kernels_of", lambda backend: own)
    read, fixed = [], [0.0, 0.0]
    for lines in (1, 3):
        with replace(pruner, refresh=Never())(llama, backend="reference") as run:
            llama.generate(tokens(llama, lines=1, length=20).repeat(lines, 1), max_new_tokens=6, min_new_tokens=6)
            read.append(1 - run.report().bytes_saved)
            layers = run.layers
            if pruner is SKETCH:
                whole = sum(la.parts.weight_bytes for la in layers)
                fixed = [sum(la.selector.fixed_bytes(0, n) for la in layers) / whole for n in (1, 3)]
    # three equal lines: everything three times, but for the sketch
    assert read[1] - fixed[1] == pytest.approx(3 * (read[0] - fixed[0]), rel=1e-4)


def test_the_sketch_counts_itself(llama):
    reports = {}
    for bits in (1, 4):
        with SketchDart(sparsity=0.4, token=Sketch(bits=bits))(llama) as run:
            llama.generate(tokens(llama), max_new_tokens=6, min_new_tokens=6, do_sample=False)
            reports[bits] = run.report()
    for bits, report in reports.items():
        planes = 3 * 2 * 72 * (bits * 8 + 4)  # three layers, gate and up, one word of 64 bits for 32 weights
        assert report.overhead_bytes_per_model == planes + 3 * 72 * (4 + 4 * 2)  # norms, and how errors begin
        assert report.realised_sparsity == pytest.approx(0.4, abs=0.02)
    assert reports[1].layers[0].kept > reports[4].layers[0].kept
    assert "for the model" in str(reports[1])
    with pytest.raises(ValueError, match=r"sparsity 0\.9 cannot be reached: the sketch alone reads 0\.229"):
        SketchDart(sparsity=0.9, token=Sketch(bits=4)).attach(llama)
    assert llama.generate(tokens(llama), max_new_tokens=2).shape[1] == 16  # and the model is free again


def test_the_ceiling_is_marked_and_saves_nothing(llama):
    with EXACT(llama, backend="cpu") as run:
        llama.generate(tokens(llama), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        report = run.report()
    assert report.ceiling and not report.saves_time and report.bytes_saved == 0
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.01)
    assert "ceiling" in str(report)
    with pytest.raises(ValueError, match="unknown backend 'cpux'"):
        EXACT.attach(llama, backend="cpux")


@pytest.mark.parametrize("backend", ["cpu", "masked"])
@pytest.mark.parametrize("pruner", [GATE, SKETCH], ids=["gate", "sketch"])
def test_prompt_lookup_and_blocks_equal_single_tokens(llama, pruner, backend):
    ids = tokens(llama, lines=1, length=14).repeat(1, 2)
    frozen = Pruner(sparsity=0.5, token=pruner.token, refresh=Never())
    with frozen(llama, backend=backend) as run:
        plain = llama.generate(ids, max_new_tokens=20, do_sample=False)
        expected = run.report().sequences[0]
    with frozen(llama, backend=backend) as run:
        looked_up = llama.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)
        sequence = run.report().sequences[0]
    assert torch.equal(plain, looked_up)
    # candidates that were rejected are no decoded tokens and spend nothing
    assert sequence.realised_sparsity == pytest.approx(expected.realised_sparsity, abs=1e-5)


def test_beams_and_samples(llama):
    ids = tokens(llama)
    for pruner in (GATE, SKETCH, EXACT):
        out = {}
        for backend in ("reference", "masked"):
            frozen = Pruner(sparsity=0.5, token=pruner.token, budget=Uniform())
            with frozen(llama, backend=backend) as run:
                out[backend] = llama.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False)
                assert len(run.report().sequences) == 6
        assert torch.equal(out["reference"], out["masked"])
        with pruner(llama) as run:
            llama.generate(ids[:1], num_return_sequences=3, do_sample=True, max_new_tokens=6)
            assert run.report().realised_sparsity == pytest.approx(0.5, abs=0.02)


def test_a_second_turn_dense_pauses_and_re_entry(llama):
    first, second = tokens(llama, lines=1, length=16), tokens(llama, lines=1, length=12, seed=7)
    for pruner in (GATE, SKETCH):
        reports = []
        for _ in range(2):
            cache = DynamicCache(config=llama.config)
            with pruner(llama) as run:
                out = llama.generate(first, **handed(cache), max_new_tokens=6, do_sample=False)
                turn = torch.cat((out, second), dim=1)
                llama.generate(turn, **handed(cache), max_new_tokens=6, min_new_tokens=6, do_sample=False)
                with run.dense(), torch.no_grad():
                    llama(input_ids=first[:, :2], **handed(cache))
                reports.append(run.report())
        assert (reports[0].pruned_tokens, reports[0].dense_tokens) == (10, 2)
        assert reports[0].realised_sparsity == reports[1].realised_sparsity == pytest.approx(0.5 * 10 / 12, abs=0.02)


@pytest.mark.parametrize("refresh", [Relearn(tokens=5), Release(at=6)], ids=["relearn", "release"])
@pytest.mark.parametrize("token", [TokenGate(), Sketch(bits=1), Exact()], ids=["gate", "sketch", "exact"])
def test_masks_dropped_and_made_again(llama, token, refresh):
    pruner = Pruner(sparsity=0.5, token=token, refresh=refresh, detector=EAGER)
    with pruner(llama) as run:
        llama.generate(tokens(llama), max_new_tokens=40, min_new_tokens=40, do_sample=False)
        report = run.report()
    assert report.events and report.dense_tokens > 0
    share = report.pruned_tokens / (report.pruned_tokens + report.dense_tokens)
    assert report.realised_sparsity == pytest.approx(0.5 * share, abs=0.02)


def test_a_replay_renews_the_candidates(llama):
    with GATE(llama) as run, torch.no_grad():
        with run.phase("prefill"):
            cache = llama(input_ids=tokens(llama, lines=1), use_cache=True).past_key_values
        seen = []
        with run.phase("decode"):
            for token in tokens(llama, lines=1, length=30, seed=3).T:
                llama(input_ids=token[:, None], **handed(cache))
                seen.append(run.selection(0)[1])
        report = run.report()
    assert report.events and any(event.changed for event in report.events)
    assert not torch.equal(seen[0], seen[-1])
    assert len(seen[-1]) == report.sequences[0].candidates[1] > report.sequences[0].keep[1]


@pytest.mark.parametrize("backend", ["cpu", "reference", "masked"])
@pytest.mark.parametrize("pruner", [GATE, SKETCH, EXACT], ids=["gate", "sketch", "exact"])
def test_inputs_that_could_break_a_selector(pruner, backend):
    """One dimension a hundred times the others, as large models have; a layer whose neurons are all silent."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] *= 100
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[2].post_attention_layernorm.weight.zero_()
    ids = tokens(model)
    with pruner(model, backend=backend) as run:
        out = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, return_dict_in_generate=True,
                             output_logits=True)  # fmt: skip
        report = run.report()
    assert all(bool(torch.isfinite(logits).all()) for logits in out.logits)
    # what is silent is not computed: two of three layers spend less than their budget allows
    assert report.realised_sparsity > 0.5


def test_one_large_dimension_leaves_the_sketch_its_ranking():
    from dartprune.ffn.sketch import build_planes, quantise_input, sketch_dots

    weight, x = torch.randn(256, 128), torch.randn(8, 128)
    x[:, 7] *= 100
    exact = x @ weight.t()
    guarded = sketch_dots(quantise_input(x, 4, 4), build_planes(weight, 4))
    plain = sketch_dots(quantise_input(x, 4, 0), build_planes(weight, 4))
    # without the exact entries the large one takes all the levels, or is clipped
    assert (guarded - exact).norm() < 0.12 * exact.norm()
    assert (plain - exact).norm() > 3 * (guarded - exact).norm()


def test_static_masks_are_what_they_were(llama):
    ids = tokens(llama)
    with Static(sparsity=0.5)(llama) as run:
        llama.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        report = run.report()
    assert report.overhead_bytes_per_model == 0 and report.layers[0].candidates is None
    assert not report.ceiling


def test_what_is_taught_is_renewed_and_nothing_else():
    assert SketchDart().refresh.replay_tokens == 16 and SketchDart().detector == Dart().detector
    assert SketchDart(token=Sketch(calibrate=False)).refresh == SketchDart().refresh  # the means are taught
    assert SketchDart(compensate=None).refresh == SketchDart().refresh  # so are the errors
    nothing = SketchDart(token=Sketch(calibrate=False), compensate=None)
    assert nothing.refresh == Never() and Pruner.from_dict(nothing.to_dict()) == nothing
