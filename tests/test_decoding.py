"""Every way of decoding: batches, beams, samples, caches, chunks, candidates, turns, threads."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dartprune import Clock, Dart, Dense, Detector, Griffin, Never, Relearn, Replay, Static
from dartprune.model.caches import handed
from test_matrix import tokens
from tiny import FAMILIES

EAGER = Dart(
    sparsity=0.5,
    detector=Detector(window=4, patience=1, min_drop=0.0, delta=0.0),
    refresh=Replay(tokens=8, settle=16),
)


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


def padded(first, second, pad=0):
    length = max(first.shape[1], second.shape[1])
    ids = torch.full((2, length), pad)
    mask = torch.zeros(2, length, dtype=torch.long)
    for line, text in enumerate((first, second)):
        ids[line, length - text.shape[1] :] = text[0]
        mask[line, length - text.shape[1] :] = 1
    return ids, mask


@pytest.mark.parametrize("pruner", [EAGER, Static(sparsity=0.6), Griffin(), Clock(), Dart(refresh=Relearn(tokens=6))])
@pytest.mark.parametrize("lengths", [(20, 20), (23, 9), (12, 3), (30, 1)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_a_batch_is_its_sequences_alone(family, lengths, pruner):
    model = FAMILIES[family]()
    texts = [tokens(model, lines=1, length=length, seed=seed) for seed, length in enumerate(lengths)]
    alone, masks = [], []
    for text in texts:
        cache = DynamicCache(config=model.config)
        with pruner(model) as run:
            out = model.generate(
                text,
                max_new_tokens=40,
                min_new_tokens=40,
                do_sample=False,
                **handed(cache),
                attention_mask=torch.ones_like(text),
            )
            masks.append(run.selection(run.slots_of(cache)[0]))
            alone.append((out[0, text.shape[1] :], run.report().sequences[0]))
    ids, mask = padded(*texts)
    cache = DynamicCache(config=model.config)
    with pruner(model) as run:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=40,
            min_new_tokens=40,
            do_sample=False,
            **handed(cache),
        )
        report = run.report()
        together = [run.selection(slot) for slot in run.slots_of(cache)]
    for line, (new, sequence) in enumerate(alone):
        assert torch.equal(out[line, ids.shape[1] :], new)
        same = report.sequences[line]
        assert [(e.kind, e.decoded, e.changed) for e in same.events] == [
            (e.kind, e.decoded, e.changed) for e in sequence.events
        ]
        assert same.keep == sequence.keep
        assert (same.dense_tokens, same.pruned_tokens) == (sequence.dense_tokens, sequence.pruned_tokens)
        assert same.realised_sparsity == pytest.approx(sequence.realised_sparsity, abs=1e-6)
        for kept, kept_alone in zip(together[line], masks[line], strict=True):
            assert (kept is None) == (kept_alone is None)
            assert kept is None or torch.equal(kept, kept_alone)


def test_what_follows_the_end_of_a_sequence_counts_nowhere(llama):
    texts = [tokens(llama, lines=1, length=16, seed=seed) for seed in (3, 4)]
    with EAGER(llama):
        free = llama.generate(texts[0], max_new_tokens=30, min_new_tokens=30, do_sample=False)[0, 16:]
    eos = int(free[5])
    stop = int((free == eos).nonzero()[0]) + 1
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    with EAGER(llama) as run:
        llama.generate(texts[0], **options)
        alone = run.report().sequences[0]
    assert alone.dense_tokens + alone.pruned_tokens == stop - 1
    with EAGER(llama) as run:
        llama.generate(torch.cat(texts), **options)
        both = run.report().sequences
    assert (both[0].dense_tokens, both[0].pruned_tokens) == (alone.dense_tokens, alone.pruned_tokens)
    assert [(e.kind, e.decoded) for e in both[0].events] == [(e.kind, e.decoded) for e in alone.events]
    assert both[0].realised_sparsity == pytest.approx(alone.realised_sparsity)
    assert both[1].pruned_tokens > stop - 1


def _stopping_at(token, ids, model, pruner, **options):
    """The report's sequence of a text that ends at its first `token`, and the tokens it made."""
    with pruner(model) as run:
        out = model.generate(ids, do_sample=False, eos_token_id=token, pad_token_id=0, **options)
        return run.report().sequences, out


@pytest.mark.parametrize("pruner", [Static(sparsity=0.5, min_traced=8), Clock(sparsity=0.5, start=5)])
def test_a_line_that_ended_before_its_masks_has_none(llama, pruner):
    texts = [tokens(llama, lines=1, length=3, seed=seed) for seed in (3, 4)]
    options = {"max_new_tokens": 30}
    free = llama.generate(texts[0], do_sample=False, max_new_tokens=3)[0, 3:]
    eos = int(free[2])
    (alone,), _ = _stopping_at(eos, texts[0], llama, pruner, **options)
    assert alone.pruned_tokens == 0 and alone.dense_tokens <= 2 and alone.keep is None
    together, _ = _stopping_at(eos, torch.cat(texts), llama, pruner, **options)
    assert together[1].pruned_tokens > 10
    for name in ("dense_tokens", "pruned_tokens", "traced_tokens", "keep", "events", "realised_sparsity"):
        assert getattr(together[0], name) == getattr(alone, name), name


def test_a_second_text_forgets_what_followed_an_end(llama):
    texts = torch.cat([tokens(llama, lines=1, length=16, seed=seed) for seed in (3, 4)])
    more, new = tokens(llama, lines=2, length=8, seed=5), tokens(llama, lines=2, length=30, seed=6)
    with EAGER(llama) as run:
        free = llama.generate(texts[:1], max_new_tokens=4, do_sample=False)[0, 16:]
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), EAGER(llama) as run:
        llama.generate(
            texts, **handed(cache), max_new_tokens=30, do_sample=False, eos_token_id=int(free[3]), pad_token_id=0
        )
        ended = run.report().sequences[0]
        with run.phase("prefill"):
            llama(input_ids=more, **handed(cache))
        again = run.report().sequences[0]
        happened = []
        run.on_event(lambda event: happened.append((event.kind, event.decoded)) if event.sequence == 0 else None)
        with run.phase("decode"):
            for t in range(30):
                llama(input_ids=new[:, t : t + 1], **handed(cache))
        after = run.report().sequences[0]
    assert ended.pruned_tokens <= 3 and not ended.events
    assert again.pruned_tokens == ended.pruned_tokens and again.traced_tokens == 15 + 8
    assert after.pruned_tokens == ended.pruned_tokens + 30
    assert happened and [(event.kind, event.decoded) for event in after.events] == happened
    assert all(ended.pruned_tokens < decoded <= after.pruned_tokens for _, decoded in happened)


class _BeamsSeen:
    """A logits processor that notes, of the newest forward of a beam search, what each beam reads and is."""

    def __init__(self, run, cache):
        self.run, self.cache = run, cache
        self.texts, self.moves = None, 0

    def __call__(self, input_ids, scores):
        if self.texts is not None and not torch.equal(input_ids[:, :-1], self.texts):
            self.moves += 1
        self.texts, self.logits = input_ids.clone(), scores.clone()
        slots = self.run.slots_of(self.cache)
        self.masks = [self.run.selection(slot) for slot in slots]
        self.scores = [self.run.scores(slot) for slot in slots]
        sequences = {sequence.sequence: sequence for sequence in self.run.report().sequences}
        self.reports = [sequences[number] for number in range(len(slots))]
        return scores


@pytest.mark.parametrize(
    "pruner", [EAGER, replace(EAGER, compensate=None, refresh=Relearn(tokens=3))], ids=["replay", "relearn"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_statistics_follow_their_beams(family, pruner):
    model = FAMILIES[family]()
    ids = tokens(model, length=20)
    cache = DynamicCache(config=model.config)
    with pruner(model) as run:
        seen = _BeamsSeen(run, cache)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **handed(cache),
            num_beams=3,
            max_new_tokens=24,
            do_sample=False,
            logits_processor=[seen],
        )
    assert seen.texts.shape == (6, 20 + 23) and seen.moves > 3, "no beam ever moved"
    assert any(report.events for report in seen.reports), "the detector never fired"
    # each beam is what its own tokens make, read one after another by themselves
    for line, text in enumerate(seen.texts):
        with torch.no_grad(), pruner(model) as run:
            own = run.prefill(text[None, :20])
            for t in range(20, text.shape[0]):
                with run.phase("decode"):
                    logits = model(input_ids=text[None, t : t + 1], **handed(own)).logits[:, -1]
            (slot,) = run.slots_of(own)
            masks, scores, (report,) = run.selection(slot), run.scores(slot), run.report().sequences
        torch.testing.assert_close(seen.logits[line], logits[0].log_softmax(-1), rtol=1e-3, atol=1e-3)
        for got, want in zip(seen.scores[line], scores, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        for got, want in zip(seen.masks[line], masks, strict=True):
            assert (got is None) == (want is None) and (got is None or torch.equal(got, want))
        got = seen.reports[line]
        assert [(e.kind, e.decoded, e.changed) for e in got.events] == [
            (e.kind, e.decoded, e.changed) for e in report.events
        ]
        assert (got.dense_tokens, got.pruned_tokens, got.keep) == (
            report.dense_tokens,
            report.pruned_tokens,
            report.keep,
        )
        assert got.realised_sparsity == pytest.approx(report.realised_sparsity, abs=1e-6)


def test_beams_are_the_same_on_every_backend(llama):
    ids = tokens(llama)
    found = []
    for backend in ("masked", "reference", "cpu"):
        with Static(sparsity=0.5)(llama, backend=backend):
            found.append(llama.generate(ids, num_beams=3, max_new_tokens=12, do_sample=False))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_reordered_slot_holds_what_its_source_held(llama):
    ids = tokens(llama, lines=3)
    with Static(sparsity=0.5)(llama) as run:
        with run.phase("prefill"):
            cache = llama(input_ids=ids, use_cache=True).past_key_values
        with run.phase("decode"):
            llama(input_ids=ids[:, :1], **handed(cache))
        slots = run.slots_of(cache)
        before = [run.selection(slot) for slot in slots]
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        after = [run.selection(slot) for slot in run.slots_of(cache)]
    for line, source in enumerate((2, 2, 0)):
        assert all(torch.equal(a, b) for a, b in zip(after[line], before[source], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before[0], before[2], strict=True))


def test_several_samples_of_one_prompt(llama):
    torch.manual_seed(0)
    with EAGER(llama) as run:
        out = llama.generate(tokens(llama, lines=1), num_return_sequences=3, do_sample=True, top_k=0, max_new_tokens=10)
        report = run.report()
    assert out.shape[0] == len(report.sequences) == 3
    assert len({tuple(row) for row in out.tolist()}) > 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_static_cache_equals_dynamic(family):
    model = FAMILIES[family]()
    ids = tokens(model)
    with EAGER(model) as run:
        dynamic = model.generate(ids, max_new_tokens=20, do_sample=False)
        first = run.report().to_dict()["events"]
    with EAGER(model) as run:
        static = model.generate(ids, max_new_tokens=20, do_sample=False, cache_implementation="static")
        second = run.report().to_dict()["events"]
    assert torch.equal(dynamic, static)
    assert [(e["kind"], e["decoded"]) for e in first] == [(e["kind"], e["decoded"]) for e in second]


@pytest.mark.parametrize("size", [5, 6])  # of which the first leaves one token for the last chunk
def test_chunked_prefill_traces_the_whole_prompt(llama, size):
    ids = tokens(llama, lines=1, length=21)
    with Static()(llama) as run:
        whole = llama.generate(ids, max_new_tokens=8, do_sample=False)
        expected = run.report().sequences[0]
    with Static()(llama) as run:
        parts = llama.generate(ids, max_new_tokens=8, do_sample=False, prefill_chunk_size=size)
        chunked = run.report().sequences[0]
    assert torch.equal(whole, parts)
    assert chunked.keep == expected.keep
    assert chunked.traced_tokens == expected.traced_tokens == 20
    assert chunked.prompt_tokens == 21


@pytest.mark.parametrize("prompt", [4, 14])
def test_prompt_lookup_equals_greedy_without_refresh(llama, prompt):
    ids = tokens(llama, lines=1, length=prompt).repeat(1, 2)
    pruner = Static(sparsity=0.5)
    with pruner(llama) as run:
        plain = llama.generate(ids, max_new_tokens=24, do_sample=False)
        expected = run.report()
    with pruner(llama) as run:
        looked_up = llama.generate(ids, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=4)
        report = run.report()
    assert torch.equal(plain, looked_up)
    assert report.sequences[0].keep == expected.sequences[0].keep
    # with candidates the last token of a block is not fed again, so at most one block's tokens may differ
    assert report.dense_tokens + report.pruned_tokens == pytest.approx(
        expected.dense_tokens + expected.pruned_tokens, abs=4
    )


def test_an_assistant_model_equals_greedy_without_refresh(llama):
    assistant = copy.deepcopy(llama)
    ids = tokens(llama, lines=1, length=20)
    with Static(sparsity=0.5)(llama) as run:
        plain = llama.generate(ids, max_new_tokens=16, do_sample=False)
        keep = run.report().sequences[0].keep
    with Static(sparsity=0.5)(llama) as run:
        assisted = llama.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=assistant)
        report = run.report()
    assert torch.equal(plain, assisted)
    assert report.sequences[0].keep == keep
    # the assistant may be pruned too
    with Static(sparsity=0.5)(llama), Static(sparsity=0.3)(assistant) as helper:
        both = llama.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=assistant)
        assert helper.report().pruned_tokens > 0
    assert torch.equal(plain, both)


def test_rejected_candidates_leave_no_trace(llama):
    ids = tokens(llama, lines=1, length=16)
    assistant = FAMILIES["llama-bias"]()  # guesses badly
    assistant.generation_config.num_assistant_tokens, assistant.generation_config.assistant_confidence_threshold = 4, 0
    pruner = Dart(sparsity=0.5, detector=Detector(window=4), refresh=Replay(tokens=8))
    drafted, found = 0, []

    def drafts(module, args, out):
        nonlocal drafted
        drafted += 1

    assistant.register_forward_hook(drafts)
    for helper in ({"assistant_model": assistant}, {}):
        cache = DynamicCache(config=llama.config)
        with pruner(llama) as run:
            out = llama.generate(ids, **handed(cache), max_new_tokens=14, do_sample=False, **helper)
            cache.crop(28 - cache.get_seq_length())
            (slot,) = run.slots_of(cache)
            places = torch.arange(16 + 12)[-8:] % 8  # of the newest inputs
            rings = [layer.ring.read(torch.tensor([slot]), places[None]) for layer in run.layers]
            report = run.report()
            found.append((out, run.scores(slot), rings, report.pruned_tokens, report.sequences[0].similarities))
    assert drafted > 24, "hardly a candidate was rejected"
    (one, scores, rings, *counts), (other, plain_scores, plain_rings, *plain_counts) = found
    assert torch.equal(one, other) and counts[0] == plain_counts[0] == 12
    assert [where for where, *_ in counts[1]] == [where for where, *_ in plain_counts[1]]
    torch.testing.assert_close(scores, plain_scores)
    torch.testing.assert_close(rings, plain_rings, rtol=1e-3, atol=1e-3)


def test_a_second_turn_renews_the_masks(llama):
    first, second = tokens(llama, lines=1, length=16), tokens(llama, lines=1, length=12, seed=7)
    cache = DynamicCache(config=llama.config)
    with Dart(sparsity=0.5)(llama) as run:
        out = llama.generate(first, **handed(cache), max_new_tokens=6, do_sample=False)
        slot = run.slots_of(cache)[0]
        before = run.selection(slot)
        turn = torch.cat((out, second), dim=1)
        llama.generate(turn, **handed(cache), max_new_tokens=6, do_sample=False)
        assert run.slots_of(cache) == (slot,)
        after = run.selection(slot)
        report = run.report()
    assert len(report.sequences) == 1
    # the last token of the first answer was not in the cache, so the second turn's dense part is 12 + 1 tokens
    assert report.sequences[0].prompt_tokens == 16 + 13
    assert report.sequences[0].traced_tokens == 15 + 13
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert report.pruned_tokens == 10 and report.dense_tokens == 0


def test_a_cache_from_outside_is_noted(llama):
    ids = tokens(llama, lines=1, length=20)
    cache = llama(input_ids=ids, use_cache=True).past_key_values
    more = torch.cat((ids, tokens(llama, lines=1, length=12, seed=5)), dim=1)
    with Static()(llama) as run:
        llama.generate(more, **handed(cache), max_new_tokens=6, do_sample=False)
        report = run.report()
    assert report.sequences[0].traced_tokens == 12
    assert any("outside of the block" in note and "20 tokens" in note for note in report.notes)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_short_prompt_stays_dense_until_enough_is_traced(llama, length):
    with Static()(llama) as run:
        out = llama.generate(
            tokens(llama, lines=1, length=length), max_new_tokens=20, min_new_tokens=20, do_sample=False
        )
        report = run.report()
    assert out.shape[1] == length + 20
    assert report.dense_tokens == 8 - (length - 1)
    assert report.pruned_tokens == 19 - report.dense_tokens


def test_start_keeps_the_first_tokens_dense(llama):
    with Static(start=5)(llama) as run:
        llama.generate(tokens(llama, lines=1), max_new_tokens=20, min_new_tokens=20, do_sample=False)
        report = run.report()
    assert (report.dense_tokens, report.pruned_tokens) == (5, 14)
    assert report.sequences[0].traced_tokens == 13 + 5


def test_several_calls_in_one_block(llama):
    with Static()(llama) as run:
        for seed in range(3):
            llama.generate(tokens(llama, seed=seed), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        report = run.report()
    assert [s.sequence for s in report.sequences] == list(range(6))
    assert report.pruned_tokens == 6 * 4


def test_several_models_at_once(llama):
    other = FAMILIES["gpt2"]()
    with Static()(llama) as first, Static(sparsity=0.3)(other) as second:
        llama.generate(tokens(llama), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        other.generate(tokens(other), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert first.report().pruned_tokens == 8
        assert second.report().pruned_tokens == 14


def test_threads_on_one_model_and_on_two(llama):
    other = FAMILIES["qwen2"]()
    expected = {}
    for name, model in (("llama", llama), ("qwen2", other)):
        with Static(sparsity=0.5)(model):
            for seed in (1, 2):
                expected[name, seed] = model.generate(tokens(model, seed=seed), max_new_tokens=12, do_sample=False)
    got, failures = {}, []
    with Static(sparsity=0.5)(llama) as run, Static(sparsity=0.5)(other):

        def work(name, model, seed):
            try:
                for _ in range(3):
                    got[name, seed] = model.generate(tokens(model, seed=seed), max_new_tokens=12, do_sample=False)
            except Exception as error:
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=(name, model, seed))
            for name, model in (("llama", llama), ("qwen2", other))
            for seed in (1, 2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert run.report().realised_sparsity == pytest.approx(0.5, abs=0.02)
    assert not failures
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_block_of_decode_tokens_equals_single_tokens(llama):
    ids, new = tokens(llama), tokens(llama, length=32, seed=3)
    logits, reports = [], []
    for block in (1, 4):
        parts = []
        with torch.no_grad(), EAGER(llama) as run:
            with run.phase("prefill"):
                cache = llama(input_ids=ids, use_cache=True).past_key_values
            with run.phase("decode"):
                for first in range(0, 32, block):
                    parts.append(llama(input_ids=new[:, first : first + block], **handed(cache)).logits)
            reports.append(run.report())
        logits.append(torch.cat(parts, dim=1))
    assert reports[0].events, "the detector never fired: the test shows nothing"
    assert [(e.kind, e.decoded) for e in reports[0].events] == [(e.kind, e.decoded) for e in reports[1].events]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_static_caches_can_be_given(llama):
    ids = tokens(llama)
    with Static()(llama) as run:
        cache = StaticCache(config=llama.config, max_cache_len=40)
        out = llama.generate(ids, **handed(cache), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert run.report().pruned_tokens == 10
    with Static()(llama):
        assert torch.equal(llama.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False), out)


def test_dense_counts_and_changes_nothing(llama):
    ids = tokens(llama)
    plain = llama.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with Dense()(llama) as run:
        assert torch.equal(llama.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False), plain)
        report = run.report()
    assert (report.dense_tokens, report.pruned_tokens, report.realised_sparsity) == (10, 0, 0.0)
    assert report.overhead_bytes == 0


def test_paused_tokens_are_dense_and_counted(llama):
    ids = tokens(llama, lines=1)
    with Dart(sparsity=0.5, refresh=Never())(llama) as run, torch.no_grad():
        with run.phase("prefill"):
            cache = llama(input_ids=ids, use_cache=True).past_key_values
        with run.phase("decode"):
            llama(input_ids=ids[:, :1], **handed(cache))
        saved = copy.deepcopy(cache)
        with run.dense():
            got = llama(input_ids=ids[:, 1:2], **handed(cache)).logits
            free = llama(input_ids=ids, use_cache=True).logits  # no phase needed
        report = run.report()
        assert (report.dense_tokens, report.pruned_tokens) == (1, 1)
    # to rounding: the down projection may lie in memory the other way round while attached
    torch.testing.assert_close(got, llama(input_ids=ids[:, 1:2], **handed(saved)).logits)
    torch.testing.assert_close(free, llama(input_ids=ids, use_cache=True).logits)
