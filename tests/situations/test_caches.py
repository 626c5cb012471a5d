"""Caches that users move, crop, copy, save, and that models drop in mid-text."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM, StaticCache

from dartprune import Dart, Dense, Detector, Never, Replay, Static
from dartprune.model.caches import handed
from test_matrix import tokens
from tiny import FAMILIES

PRUNER = Static(sparsity=0.5)


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


def read(run, model, ids, cache=None):
    with torch.no_grad(), run.phase("prefill"):
        return model(input_ids=ids, use_cache=True, **handed(cache)).past_key_values


def decode(run, model, ids, cache):
    with torch.no_grad(), run.phase("decode"):
        return model(input_ids=ids, **handed(cache)).logits


def masks(run, cache):
    return [[part.tolist() for part in run.selection(slot)] for slot in run.slots_of(cache)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_slots_follow_a_beam_loop_of_the_users(llama, kind):
    ids, new = tokens(llama, lines=3), tokens(llama, lines=3, length=4, seed=2)
    order = [2, 2, 0]
    with PRUNER(llama) as run:
        cache = read(run, llama, ids, StaticCache(llama.config, 40) if kind == "static" else None)
        decode(run, llama, new[:, :1], cache)
        before = masks(run, cache)
        cache.reorder_cache(torch.tensor(order))
        assert masks(run, cache) == [before[line] for line in order] != before
        got = decode(run, llama, new[:, 1:2], cache)
        # as if the lines had stood there from the beginning
        other = read(run, llama, ids[order], StaticCache(llama.config, 40) if kind == "static" else None)
        decode(run, llama, new[order, :1], other)
        torch.testing.assert_close(decode(run, llama, new[:, 1:2], other), got)
    assert type(cache) is (StaticCache if kind == "static" else DynamicCache)


def test_selected_and_repeated_lines(llama):
    ids, new = tokens(llama, lines=3), tokens(llama, lines=6, length=2, seed=2)
    with PRUNER(llama) as run:
        cache = read(run, llama, ids)
        decode(run, llama, new[:3, :1], cache)
        before = masks(run, cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert masks(run, cache) == [before[2], before[0]]
        cache.batch_repeat_interleave(3)
        assert masks(run, cache) == [before[2]] * 3 + [before[0]] * 3
        got = decode(run, llama, new[:, 1:2], cache)
        cache.batch_select_indices(torch.tensor([False, True, False, False, False, True]))
        assert masks(run, cache) == [before[2], before[0]]
        report = run.report()
        assert len(run.slots_of(cache)) == 2
    assert report.pruned_tokens == 9 and report.prompt_tokens == ids.numel()
    alone = Dart(sparsity=0.5, budget=PRUNER.budget, refresh=Never(), compensate=None)
    with alone(llama) as run:  # the third line by itself
        cache = read(run, llama, ids[2:])
        decode(run, llama, new[2:3, :1], cache)
        torch.testing.assert_close(decode(run, llama, new[:1, 1:2], cache), got[:1])


def test_a_crop_takes_tokens_back(llama):
    ids, new = tokens(llama, lines=2, length=16), tokens(llama, lines=2, length=9, seed=2)
    with Dart(sparsity=0.5)(llama) as run:
        cache = read(run, llama, ids)
        decode(run, llama, new[:, :3], cache)
        decode(run, llama, new[:, 3:8], cache)
        cache.crop(-5)
        report = run.report()
        assert report.pruned_tokens == 6 and report.realised_sparsity == pytest.approx(0.5, abs=0.02)
        decode(run, llama, new[:, 3:4], cache)
        assert run.report().pruned_tokens == 8
        cache.crop(-100)  # everything
        assert run.report().pruned_tokens == 0 and run.report().prompt_tokens == 0


def test_a_replay_after_a_crop_reads_no_token_that_was_taken_back(llama):
    ids, new, wrong = tokens(llama, length=16), tokens(llama, length=32, seed=2), tokens(llama, length=4, seed=3)
    eager = Detector(window=8, patience=1, min_drop=0.0, delta=0.0)
    # the ring is longer than the text, so that the tokens taken back have overwritten nothing
    pruner = Dart(sparsity=0.5, detector=eager, refresh=Replay(tokens=64))
    found = []
    for cropped in (False, True):
        with pruner(llama) as run:
            cache = read(run, llama, ids)
            decode(run, llama, new[:, :3], cache)
            if cropped:
                decode(run, llama, wrong, cache)
                cache.crop(-4)
            outs = [decode(run, llama, new[:, t : t + 1], cache) for t in range(3, 32)]
            events = [(e.kind, e.sequence, e.position, e.decoded, e.changed) for e in run.report().events]
            found.append((torch.cat(outs, 1), masks(run, cache), events))
    assert found[0][2], "no replay was taken"
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_a_copied_prefix_brings_its_trace(llama):
    prefix, texts = tokens(llama, lines=1, length=20), tokens(llama, lines=2, length=5, seed=3)
    with PRUNER(llama) as run:
        cache = read(run, llama, prefix)
        outs = []
        for text in texts:
            own = copy.deepcopy(cache)
            own = read(run, llama, text[None], own)
            outs.append(decode(run, llama, text[None, :1], own))
            traced = [s.traced_tokens for s in run.report().sequences]
        report = run.report()
        assert traced[1:] == [24, 24]  # with the prefix, without its first token
        assert report.prompt_tokens == 30 and not report.notes
    for text, out in zip(texts, outs, strict=True):
        with PRUNER(llama) as run:
            cache = read(run, llama, torch.cat((prefix, text[None]), 1))
            torch.testing.assert_close(decode(run, llama, text[None, :1], cache), out, rtol=1e-4, atol=1e-5)


def test_a_followed_cache_is_saved_as_a_plain_one(llama):
    file = io.BytesIO()
    with PRUNER(llama) as run:
        cache = read(run, llama, tokens(llama))
        torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is DynamicCache and not any("dartprune" in name for name in vars(loaded))
    assert torch.equal(loaded.layers[0].keys, cache.layers[0].keys)
    assert type(cache) is DynamicCache and not any("dartprune" in name for name in vars(cache))


def test_a_prefill_through_the_decoder_alone(llama):
    ids = tokens(llama, lines=2)
    new = tokens(llama, lines=2, length=2, seed=1)
    with PRUNER(llama) as run:
        with torch.no_grad(), run.phase("prefill"):
            cache = llama.model(input_ids=ids, use_cache=True).past_key_values
        got = decode(run, llama, new[:, :1], cache)
        hidden = llama.model(input_ids=ids, use_cache=False).last_hidden_state  # without a phase: plain
        report = run.report()
        assert report.pruned_tokens == 2 and report.prompt_tokens == ids.numel() and not report.notes
        with pytest.raises(ValueError, match="needs a phase"):
            llama.model(input_ids=new[:, 1:], **handed(cache))
        other = read(run, llama, ids)
        torch.testing.assert_close(decode(run, llama, new[:, :1], other), got)
    torch.testing.assert_close(llama.model(input_ids=ids, use_cache=False).last_hidden_state, hidden)


def test_a_model_that_drops_its_cache_reads_the_text_again():
    config = Phi3Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, max_position_embeddings=96, original_max_position_embeddings=24,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 24, "factor": 4.0,
        },
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    ids = tokens(model, lines=1, length=18)
    call = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    free = model.generate(ids, **call)
    with Dense()(model) as run:
        assert torch.equal(model.generate(ids, **call), free)
    with Static(sparsity=0.5)(model) as run:
        model.generate(ids, **call)
    sequences = run.report().sequences
    # up to the border 18 are read and 6 decoded; then all 25 are read again, with a trace and masks of their own
    assert [s.prompt_tokens for s in sequences] == [18, 25]
    assert [s.pruned_tokens for s in sequences] == [6, 6]


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "linear"])
def test_texts_beyond_the_trained_positions(kind):
    model = FAMILIES["llama"]()
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 32
    config.rope_parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    model = type(model)(config).eval()
    ids = tokens(model, lines=1, length=40)
    call = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    free = model.generate(ids, **call)
    with Dense()(model) as run:
        assert torch.equal(model.generate(ids, **call), free)
    assert "longer than the model's context of 32" in run.report().notes[0]
    with Static(sparsity=0.5)(model) as run:
        model.generate(ids, **call)
    assert run.report().pruned_tokens == 4


def padded(lines, length, pads):
    mask = torch.ones(lines, length, dtype=torch.long)
    for line, count in enumerate(pads):
        mask[line, :count] = 0
    return mask


@pytest.mark.parametrize("kind", ["2d", "as long as the cache", "4d numbers", "4d bools", "4d without empty rows"])
def test_padding_in_any_mask_is_no_text(llama, kind):
    ids = tokens(llama, lines=2, length=23)
    mask = padded(2, 23, [9, 0])
    cache, given = None, mask
    if kind == "as long as the cache":
        cache = StaticCache(llama.config, 64)
        given = torch.zeros(2, 64, dtype=torch.long)
        given[:, :23] = mask
        given[:, 23:] = 1  # as users who mask nothing that is to come
    elif kind.startswith("4d"):
        sees = torch.ones(23, 23).tril().bool()[None] & mask.bool()[:, None]
        if kind == "4d without empty rows":
            sees |= ~sees.any(2, keepdim=True)
        given = sees[:, None]
        if kind == "4d numbers":
            given = torch.zeros(2, 1, 23, 23).masked_fill(~given, torch.finfo(torch.float32).min)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with PRUNER(llama) as run, torch.no_grad(), run.phase("prefill"):
        llama(input_ids=ids, attention_mask=given, position_ids=position, **handed(cache), use_cache=True)
    report = run.report()
    assert [s.prompt_tokens for s in report.sequences] == [14, 23]
    assert [s.traced_tokens for s in report.sequences] == [13, 22]


def test_attention_both_ways_is_no_padding(llama):
    ids = tokens(llama, lines=1, length=12)
    with PRUNER(llama) as run, torch.no_grad(), run.phase("prefill"):
        llama(input_ids=ids, attention_mask=torch.ones(1, 1, 12, 12).bool(), use_cache=True)
    assert run.report().prompt_tokens == 12


def test_a_tuple_with_a_loss_has_the_cache_too(llama):
    ids = tokens(llama, lines=2)
    with PRUNER(llama) as run:
        with torch.no_grad(), run.phase("prefill"):
            out = llama(input_ids=ids, labels=ids, return_dict=False, use_cache=True)
        decode(run, llama, ids[:, :1], out[2])
    assert run.report().pruned_tokens == 2 and not run.report().notes
