"""The report says why a figure is under what was asked, and how fast decoding was; from what was counted."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dartprune import Clock, Dart, Dense, Detector, Pruner, Relearn, Release, Static
from dartprune.model.caches import handed
from dartprune.runtime.preparation import Preparation
from test_matrix import tokens
from tiny import FAMILIES

DOCS = Path(__file__).resolve().parents[1] / "docs" / "report.md"
REALISED, BYTES = "realised sparsity", "FFN bytes saved"


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


def decoded(model, pruner, *texts, new=13, backend="cpu", **options):
    """The report of a greedy generation; shorter texts are padded."""
    width = max(text.shape[1] for text in texts)
    ids = torch.cat([F.pad(text, (width - text.shape[1], 0)) for text in texts])
    mask = torch.cat([F.pad(torch.ones_like(text), (width - text.shape[1], 0)) for text in texts])
    with pruner(model, backend=backend) as run:
        model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
        return run.report()


def text(model, length, seed=0):
    return tokens(model, lines=1, length=length, seed=seed)


def test_nothing_is_said_where_nothing_is_amiss(llama):
    report = decoded(llama, Static(sparsity=0.5), text(llama, 20))
    assert report.reasons == {} and "because" not in str(report)
    assert decoded(llama, Dense(), text(llama, 20)).reasons == {}


def test_a_short_prompt(llama):
    report = decoded(llama, Static(sparsity=0.5), text(llama, 3))
    # two of the prompt's tokens are traced, six decoded ones make eight
    assert report.dense_tokens == 6 and report.sequences[0].dense_because == {"short": 6}
    assert report.reasons[REALISED] == [
        "6 of 12 decoded tokens were dense: 6 until 8 tokens were traced: the prompt was too short for masks"
    ]
    assert f"because            {report.reasons[REALISED][0]}" in str(report)


def test_the_start_a_relearn_a_release_and_a_pause(llama, monkeypatch):
    seen = []
    monkeypatch.setattr("dartprune.drift.AttentionDrift.decide", lambda *args: not seen.append(1) and len(seen) == 1)
    fast = Detector(window=4)
    why = {}
    for name, pruner in {
        "start": Clock(sparsity=0.5),
        "relearn": Dart(sparsity=0.5, detector=fast, refresh=Relearn(tokens=5)),
        "released": Static(sparsity=0.5, refresh=Release(at=6)),
    }.items():
        seen.clear()
        report = decoded(llama, pruner, text(llama, 20), new=21)
        why[name] = report.sequences[0].dense_because
        assert sum(why[name].values()) == report.dense_tokens > 0
        assert report.reasons[REALISED][0].startswith(f"{report.dense_tokens} of 20 decoded tokens were dense: ")
    assert why == {"start": {"start": 8}, "relearn": {"relearn": 5}, "released": {"released": 14}}
    with Static(sparsity=0.5)(llama) as run:
        cache = run.prefill(text(llama, 20))
        for t in range(8):
            with torch.no_grad(), run.phase("decode"):
                if t < 3:
                    with run.dense():
                        llama(input_ids=text(llama, 1, seed=t), **handed(cache))
                else:
                    llama(input_ids=text(llama, 1, seed=t), **handed(cache))
        report = run.report()
    assert report.sequences[0].dense_because == {"paused": 3}
    assert report.reasons[REALISED] == ["3 of 8 decoded tokens were dense: 3 inside run.dense()"]


def test_masks_that_keep_more_than_asked(llama):
    report = decoded(llama, Pruner(sparsity=0.85, selection="threshold"), text(llama, 20))
    assert report.dense_tokens == 0
    (why,) = report.reasons[REALISED]
    assert (
        why == f"pruned tokens left out {report.realised_sparsity:.3f} of the FFN: the budget or the scores keep more"
    )


def test_a_batch_reads_the_union(llama, monkeypatch):
    monkeypatch.setattr("dartprune.runtime.rows_or_dense.RowsOrDense.gathers", lambda *args: True)
    report = decoded(llama, Static(sparsity=0.5), text(llama, 20), text(llama, 20, seed=5))
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.01) and report.bytes_saved < 0.45
    assert report.reasons == {
        BYTES: ["steps of 2 sequences read every neuron that any of them uses, each keeps its own"]
    }


def test_a_dense_line_in_a_batch(llama, monkeypatch):
    monkeypatch.setattr("dartprune.runtime.rows_or_dense.RowsOrDense.gathers", lambda *args: True)
    report = decoded(llama, Static(sparsity=0.5), text(llama, 20), text(llama, 3, seed=5))
    assert [s.dense_because for s in report.sequences] == [{}, {"short": 6}]
    assert report.reasons[BYTES][0] == "6 of 12 steps had dense sequences beside pruned ones, so all weights were read"
    assert report.reasons[REALISED][0].startswith("6 of 24 decoded tokens were dense: 6 until 8")


def test_a_line_that_ended_has_no_more_reasons(llama):
    """What follows the end is padding: it was not decoded dense, and nothing explains it."""
    first, second = text(llama, 3), text(llama, 20, seed=5)
    plain = llama.generate(first, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    llama.generation_config.eos_token_id = int(plain[0, -1])
    ids = torch.cat((F.pad(first, (17, 0)), second))
    mask = torch.cat((F.pad(torch.ones_like(first), (17, 0)), torch.ones_like(second)))
    with Static(sparsity=0.5)(llama) as run:
        llama.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, pad_token_id=0)
        report = run.report()
    for sequence in report.sequences:
        assert sum(sequence.dense_because.values()) == sequence.dense_tokens
    assert report.sequences[0].dense_tokens <= 2


def test_candidates_that_were_rejected_have_no_reasons(llama):
    ids = text(llama, 3).repeat(1, 2)[:, :4]
    with Static(sparsity=0.5)(llama) as run:
        llama.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        report = run.report()
    assert report.sequences[0].dense_because == {"short": report.dense_tokens}


def test_layers_that_cannot_be_read_by_rows(llama):
    report = decoded(llama, Static(sparsity=0.5), text(llama, 20), backend="masked")
    assert report.reasons == {BYTES: ["every layer computes all neurons and zeroes the rest"]}
    handle = llama.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: None)
    report = decoded(llama, Static(sparsity=0.5), text(llama, 20), backend="auto")
    handle.remove()
    assert report.bytes_saved == 0 and report.reasons[BYTES] == [
        "1 of 3 layers cannot be read by rows: every layer computes all neurons and zeroes the rest"
    ]


def test_replays_are_named(llama, monkeypatch):
    monkeypatch.setattr("dartprune.drift.AttentionDrift.decide", lambda *args: True)
    report = decoded(llama, Dart(sparsity=0.5, detector=Detector(window=4)), text(llama, 24), new=30)
    replays = sum(event.kind in ("replay", "settle") for event in report.events)
    assert report.reasons[BYTES] == [f"{replays} replays read the gate and up weights of all layers once each"]


# ---- speed


def test_the_rate_is_that_of_decode_forwards(llama, monkeypatch):
    report = decoded(llama, Static(sparsity=0.5), text(llama, 20), text(llama, 20, seed=3))
    assert report.tokens_per_second == pytest.approx(24 / report.seconds["decoding"])
    assert f"{report.tokens_per_second:.1f} tokens/s in decode forwards" in str(report)
    with Static(sparsity=0.5)(llama) as run:
        began = time.perf_counter()
        llama.generate(text(llama, 20), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        took = time.perf_counter() - began
        assert 0 < run.report().seconds["decoding"] < took
        time.sleep(0.2)
        assert run.report().seconds["decoding"] < took  # what lies between forwards is not in it


def test_what_was_not_timed_has_no_rate(llama):
    with Static(sparsity=0.5)(llama) as run:
        cache = run.prefill(text(llama, 20))
        assert run.report().tokens_per_second is None
        with torch.no_grad(), run.phase("decode"):
            llama(input_ids=text(llama, 1), **handed(cache))
        assert run.report().tokens_per_second > 0
        run._account.steps.all += 1  # as a compiled forward counts
        report = run.report()
    assert report.tokens_per_second is None and "not timed" in str(report)


def test_long_preparation_is_told_once_and_is_no_cost_of_attaching(llama, monkeypatch, caplog):
    monkeypatch.setattr("dartprune.runtime.preparation.LONG", 0.01)
    monkeypatch.setattr("dartprune.ffn.cpu.backend.CpuBackend.prepare", lambda self, weights: time.sleep(0.1))
    with caplog.at_level(logging.WARNING, "dartprune"):
        run = Static(sparsity=0.5).attach(llama, backend="cpu")
        run.detach()
    seconds = run.report().seconds
    assert [record.getMessage() for record in caplog.records] == [
        "compiling kernels for float32 weights, once: this may take half a minute"
    ]
    assert seconds["compiling"] >= 0.3 > seconds["attaching"]


def test_quick_preparation_says_nothing(caplog):
    preparation = Preparation()
    with preparation("nothing"):
        pass
    assert not caplog.records and preparation.seconds < 1


# ---- the page that explains it


def test_every_row_is_explained(llama):
    report = decoded(llama, Static(sparsity=0.5), text(llama, 3))
    report.notes.append("something")
    explained = re.findall(r"^\| `([^`]+)` \|", DOCS.read_text(), flags=re.M)
    printed = [re.split(r"  +|: ", line)[0] for line in str(report).splitlines()]
    assert sorted(set(printed)) == sorted(explained)
