"""Beginnings of prompts that came before: the same answer with and without them, and masks of the whole prompt."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart, Dense, Detector, Replay, SketchDart, Static
from dartprune.loading import load
from dartprune.serving.engine import Limits
from serving.conftest import PROMPTS, asked, engine_of, served_by

CHUNK = 16
SYSTEM = "You are a king who lives in a very old castle by the sea, and you like to tell long stories about dragons. "
MANY = 64 << 20


def limits(prefix_bytes=MANY, **more):
    return Limits(batch=8, chunk=CHUNK, prefix_bytes=prefix_bytes, **more)


def figures(heard):
    report = heard.ended[0].report
    return heard.text, report.realised_sparsity, report.pruned_tokens, [event.decoded for event in report.events]


def chances(heard):
    return [chance for piece in heard.pieces for chance in piece.chances]


@pytest.mark.parametrize(
    "method",
    [
        Dense(),
        Static(sparsity=0.5),
        SketchDart(sparsity=0.5),
        Dart(sparsity=0.5, detector=Detector(window=4), refresh=Replay(tokens=8, settle=8)),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_answer_is_that_of_a_prompt_read_whole(method, dtype):
    """Bit by bit: chunks are cut at the same places."""
    torch.set_num_threads(1)
    small = load(dtype=dtype)
    asks = [SYSTEM + prompt for prompt in (*PROMPTS[:3], PROMPTS[0])]
    with engine_of(small, method, limits(0)) as engine:
        whole = [asked(engine, prompt, 30, logprobs=1).wait() for prompt in asks]
        assert all(heard.ended[0].cached == 0 for heard in whole)
    with engine_of(small, method, limits()) as engine:
        shared = [asked(engine, prompt, 30, logprobs=1).wait() for prompt in asks]
        slots = len(engine.run._pool.live)
    one, other = (engine.tokenizer(prompt)["input_ids"] for prompt in asks[:2])
    same = next(n for n, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    common = same // CHUNK * CHUNK
    assert shared[0].ended[0].cached == 0 and shared[1].ended[0].cached == common >= CHUNK
    assert shared[3].ended[0].cached >= shared[1].ended[0].cached
    assert [chances(heard) for heard in shared] == [chances(heard) for heard in whole]
    assert [figures(heard) for heard in shared] == [figures(heard) for heard in whole]
    assert (slots > 0) == method.prunes, "a trace is kept for those who are pruned"


def test_another_sparsity_shares_what_was_read(small):
    """A dense request needs no trace; one that is pruned does not take a beginning that has none."""
    method = Dart(sparsity=0.4)
    with engine_of(small, method, limits()) as engine:
        dense = asked(engine, SYSTEM + PROMPTS[0], sparsity=0.0).wait()
        pruned = asked(engine, SYSTEM + PROMPTS[0]).wait()
        more = asked(engine, SYSTEM + PROMPTS[1], sparsity=0.7).wait()
        again = asked(engine, SYSTEM + PROMPTS[0], sparsity=0.0).wait()
    assert [heard.ended[0].cached > 0 for heard in (dense, pruned, more, again)] == [False, False, True, True]
    sparsities = [heard.ended[0].report.realised_sparsity for heard in (dense, pruned, more, again)]
    assert sparsities == pytest.approx([0.0, 0.4, 0.7, 0.0], abs=0.01)
    assert again.text == dense.text
    with engine_of(small, method, limits(0)) as engine:
        assert asked(engine, SYSTEM + PROMPTS[1], sparsity=0.7).wait().text == more.text


def test_choices_and_company(small):
    with engine_of(small, limits=limits()) as engine:
        alone = [asked(engine, SYSTEM + prompt, 20).wait().text for prompt in PROMPTS]
        together = [asked(engine, SYSTEM + prompt, 20, choices=2) for prompt in PROMPTS]
        for one, other in zip(alone, together, strict=True):
            assert other.wait().text == {0: one[0], 1: one[0]}
            assert other.ended[0].cached > 0 == other.ended[1].cached


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(small):
    with engine_of(small, limits=limits()) as engine:
        asked(engine, SYSTEM + PROMPTS[0], 4).wait()
        store = engine._reader.prefixes
        most, pieces = store.bytes, len(store._chunks)
    assert pieces > 1
    with engine_of(small, limits=limits(most)) as engine:
        store = engine._reader.prefixes
        first = asked(engine, SYSTEM + PROMPTS[0], 4).wait()
        assert store.bytes == most
        asked(engine, PROMPTS[2] * 8, 4).wait()
        assert 0 < store.bytes <= most and len(engine.run._pool.live) == len(store._chunks)
        for ids in store._chunks:
            assert len(ids) == CHUNK or ids[:-CHUNK] in store._chunks, "a chunk whose beginning was forgotten"
        again = asked(engine, SYSTEM + PROMPTS[0], 4).wait()
        assert again.text == first.text and again.ended[0].cached < pieces * CHUNK


def test_an_error_forgets_everything(small):
    with engine_of(small, limits=limits()) as engine:
        asked(engine, SYSTEM, 4).wait()
        assert asked(engine, SYSTEM + PROMPTS[0], sparsity=0.1).wait().failed.kind == "internal"
        after = asked(engine, SYSTEM, 4).wait()
        assert after.ended[0].cached == 0


def test_the_answer_says_how_much_was_known():
    from openai import OpenAI

    with served_by(load(dtype="float32"), limits=limits()) as served:
        client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        told = [
            client.completions.create(model="small", prompt=SYSTEM + PROMPTS[0], max_tokens=3, temperature=0).usage
            for _ in range(2)
        ]
    first, second = (usage.prompt_tokens_details.cached_tokens for usage in told)
    assert first == 0 < second < told[1].prompt_tokens and told[0].prompt_tokens == told[1].prompt_tokens
