"""The log of masks agrees with the run's own counts."""

from __future__ import annotations

import torch

from dartprune import Dart, Replay, Static
from dartprune.evaluation.masks import kept_masks
from dartprune.evaluation.study.neurons import NeuronLog, own_neurons
from dartprune.model.caches import handed
from small_study import EAGER, arms, model


def decode(tiny, pruner, tokens, prompt, own):
    with torch.no_grad(), pruner(tiny, backend="masked") as run:
        with run.phase("prefill"):
            cache = tiny(input_ids=tokens[:, :prompt], use_cache=True).past_key_values
        log = NeuronLog(run, run.slots_of(cache), [72] * 3, own)
        for step in range(tokens.shape[1] - prompt):
            with run.phase("decode"):
                tiny(input_ids=tokens[:, prompt + step : prompt + step + 1], **handed(cache))
            log.step(step + 1)
        return log, run.report(), kept_masks(run, run.slots_of(cache), [72] * 3)


def test_exchanged_neurons_are_the_reports():
    tiny, tokens = model(), torch.randint(2, 120, (3, 80))
    pruner = Dart(sparsity=0.5, detector=EAGER, refresh=Replay(tokens=8, settle=16))
    log, report, masks = decode(tiny, pruner, tokens, 20, [own_neurons(tiny, tokens[:, :21].tolist(), 0.5)])
    told = {(e.sequence, e.decoded): e.changed for e in report.events}
    assert {(r["stream"], r["decoded"]): sum(r["added"]) for r in log.rows} == told and len(told) > 3
    assert all(r["added"] == r["dropped"] for r in log.rows), "budgets stay"
    by_hand = [
        (mask & own).sum(1) / own.sum(1)
        for mask, own in zip(masks, own_neurons(tiny, tokens[:, :21].tolist(), 0.5), strict=True)
    ]
    assert torch.equal(log.overlap()[0], torch.stack(by_hand))


def test_a_relearn_drops_the_masks_and_makes_new_ones():
    tiny, tokens = model(), torch.randint(2, 120, (2, 80))
    log, report, _ = decode(tiny, arms()[4].pruner, tokens, 20, [own_neurons(tiny, tokens[:, :21].tolist(), 0.5)])
    of_stream = [[row for row in log.rows if row["stream"] == stream] for stream in range(2)]
    for rows in of_stream:
        assert [row["kind"] for row in rows] == (["relearn", "relearned"] * len(rows))[: len(rows)]
    pairs = [pair for rows in of_stream for pair in zip(rows[::2], rows[1::2], strict=False)]
    assert pairs, "no detector fired early enough"
    for row in log.rows:
        opened = row["kind"] == "relearn"
        assert not any(row["dropped"] if opened else row["added"]) and any(row["added"] if opened else row["dropped"])
    # masks act again in the forward after the last of the eight dense tokens
    assert all(second["decoded"] - first["decoded"] == 9 for first, second in pairs)
    assert len([e for e in report.events if e.kind == "relearn"]) == sum(r["kind"] == "relearn" for r in log.rows)


def test_own_neurons_are_the_prompts_mask():
    tiny, tokens = model(), torch.randint(2, 120, (2, 30))
    own = own_neurons(tiny, tokens.tolist(), 0.5)
    log, _, masks = decode(tiny, Static(sparsity=0.5), tokens, 29, [own])
    assert all(torch.equal(a, b) for a, b in zip(own, masks, strict=True))
    assert bool((log.overlap() == 1).all())


def test_own_neurons_of_texts_of_several_lengths():
    tiny, tokens = model(), torch.randint(2, 120, (3, 30)).tolist()
    together = own_neurons(tiny, [tokens[0], tokens[1][:12], tokens[2]], 0.5)
    alone = [own_neurons(tiny, [text], 0.5) for text in (tokens[0], tokens[1][:12], tokens[2])]
    assert all(
        torch.equal(mask, torch.cat(parts)) for mask, parts in zip(together, zip(*alone, strict=True), strict=True)
    )
