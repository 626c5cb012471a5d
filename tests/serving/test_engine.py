"""The engine: a request gets the tokens it gets alone, whoever decodes beside it, and nothing is left of it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dartprune import Dart, Dense, Detector, Replay, SketchDart, Static
from dartprune.loading import load
from dartprune.serving import pace
from dartprune.serving.engine import Limits
from dartprune.serving.pace import dense_above
from dartprune.serving.request import Refusal, Sampling
from serving.conftest import METHOD, PROMPTS, asked, engine_of
from tiny import FAMILIES

SEED = Sampling(temperature=1.0, seed=3)


@pytest.mark.parametrize(
    "method",
    [
        Static(sparsity=0.5, min_traced=4),
        Dart(sparsity=0.5, min_traced=4, detector=Detector(window=4), refresh=Replay(tokens=8, settle=8)),
        SketchDart(sparsity=0.5),
        Dense(),
    ],
    ids=lambda method: method.name,
)
def test_a_request_gets_the_tokens_it_gets_alone(small, method):
    with engine_of(small, method) as engine:
        alone = [asked(engine, prompt, 20 + 4 * n).wait() for n, prompt in enumerate(PROMPTS)]
        together = [asked(engine, prompt, 20 + 4 * n) for n, prompt in enumerate(PROMPTS)]
        for one, other in zip(alone, together, strict=True):
            other.wait()
            assert one.text == other.text
            left, right = one.ended[0], other.ended[0]
            assert (left.reason, left.tokens) == (right.reason, right.tokens)
            assert left.report.events == right.report.events or [e.decoded for e in left.report.events] == [
                e.decoded for e in right.report.events
            ]
            assert left.report.realised_sparsity == pytest.approx(right.report.realised_sparsity, abs=1e-6)


def test_alone_it_is_what_generate_gives(small):
    model, tokenizer = small
    ids = tokenizer(PROMPTS[3], return_tensors="pt")["input_ids"]
    with METHOD(model):
        whole = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    with engine_of(small) as engine:
        heard = asked(engine, PROMPTS[3], 24).wait()
    assert heard.text[0] == tokenizer.decode(whole, skip_special_tokens=True)
    assert heard.ended[0].report.pruned_tokens == 23


def test_choices_share_a_prompt_and_go_apart(small):
    with engine_of(small) as engine:
        first = asked(engine, PROMPTS[0], choices=3, sampling=SEED).wait()
        again = asked(engine, PROMPTS[0], choices=3, sampling=SEED)
        beside = [asked(engine, prompt) for prompt in PROMPTS]
        assert again.wait().text == first.text and len(set(first.text.values())) == 3
        assert all(ended.report.pruned_tokens == 23 for ended in first.ended.values())
        for heard in beside:
            heard.wait()


def test_each_request_has_a_sparsity_of_its_own(small):
    with engine_of(small) as engine:
        asks = [asked(engine, PROMPTS[0], sparsity=sparsity) for sparsity in (None, 0.0, 0.7, 0.4)]
        figures = [heard.wait().ended[0].report for heard in asks]
    assert [round(f.realised_sparsity, 2) for f in figures] == [0.4, 0.0, 0.7, 0.4]
    assert figures[1].dense_tokens == 23 and figures[1].dense_because == {"asked": 23}
    assert asks[0].text == asks[3].text


def test_a_sparsity_that_has_no_room_is_refused(small):
    with engine_of(small, start=False) as engine:
        with pytest.raises(ValueError, match=r"can take 0 or 0\.4"):
            engine.run.sequences.open(sparsity=0.2)
        with pytest.raises(ValueError, match="slot 7 is not open"):
            engine.run.sequences.close([7])


def test_sequences_open_and_closed_leave_nothing_in_the_report(small):
    model, _ = small
    with METHOD(model) as run:
        slots = run.sequences.open(2)
        (copy,) = run.sequences.fork(slots[:1])
        assert run.sequences.report(copy).pruned_tokens == 0
        assert len(run.sequences.close([*slots, copy])) == 3
        assert run.report().sequences == []


def test_a_temperature_next_to_nothing_is_greedy_and_harms_nobody(small):
    with engine_of(small) as engine:
        greedy = asked(engine, PROMPTS[0])
        asks = [
            asked(engine, PROMPTS[0], sampling=Sampling(t, top_p, 3, 1))
            for t in (5e-324, 2e-4)
            for top_p in (1, 5e-324)
        ]
        assert all(heard.wait().text == greedy.wait().text for heard in asks)


def test_what_cannot_be_asked_for_ends_that_request(small):
    """Nobody waits for ever, and the next one is served."""
    with engine_of(small) as engine:
        assert asked(engine, PROMPTS[0], sparsity=0.1).wait().failed.kind == "internal"
        assert asked(engine, PROMPTS[0]).wait().ended[0].tokens == 24


def test_stop_strings_end_a_choice_and_are_not_part_of_it(small):
    with engine_of(small) as engine:
        whole = asked(engine, PROMPTS[3], 30).wait().text[0]
        stop = whole[10:14]
        heard = asked(engine, PROMPTS[3], 30, stop=(stop, "never")).wait()
        assert heard.text[0] == whole[: whole.index(stop)] and heard.ended[0].reason == "stop"
        assert heard.ended[0].tokens < 30


def test_the_end_token_ends_a_choice(small):
    _model, tokenizer = small
    with engine_of(small) as engine:
        ids = tokenizer(asked(engine, PROMPTS[3], 8).wait().text[0])["input_ids"]
        engine._ends = frozenset([ids[-1]])
        heard = asked(engine, PROMPTS[3], 30).wait()
        assert heard.ended[0].reason == "stop" and heard.ended[0].tokens < 8


def test_chances_are_the_models_own(small):
    with engine_of(small) as engine:
        heard = asked(engine, PROMPTS[0], 4, logprobs=2).wait()
    chances = [chance for piece in heard.pieces for chance in piece.chances]
    assert len(chances) == 4
    for chance in chances:
        assert chance.likeliest[0] == (chance.token, pytest.approx(chance.logprob)) and chance.logprob < 0
        assert chance.likeliest[1][1] <= chance.likeliest[0][1]


def test_figures_of_a_watched_request(small):
    method = Dart(sparsity=0.4, min_traced=4, detector=Detector(window=4))
    with engine_of(small, method) as engine:
        heard = asked(engine, PROMPTS[0], 60, watch=True).wait()
        unwatched = asked(engine, PROMPTS[0], 60).wait()
    last = heard.pieces[-1].figures
    assert last.decoded == 59 and last.similarities and len(last.active) == len(engine.run.layers)
    assert all(0 <= share <= 1 for share in last.active)
    assert heard.text == unwatched.text and unwatched.pieces[-1].figures is None


def test_a_full_queue_refuses_and_says_when_to_come_again(small):
    with engine_of(small, limits=Limits(batch=1, queue=2), start=False) as engine:
        for _ in range(2):
            asked(engine, PROMPTS[0])
        with pytest.raises(Refusal, match="2 requests are waiting") as refused:
            asked(engine, PROMPTS[0])
        assert refused.value.after >= 1


def test_clients_come_in_turn(small):
    with engine_of(small, limits=Limits(batch=1), start=False) as engine:
        for client, count in (("a", 4), ("b", 2), ("c", 1)):
            for _ in range(count):
                asked(engine, PROMPTS[0], client=client)
        order = [engine._queue.pop().ask.client for _ in range(7)]
    assert order == ["a", "b", "c", "a", "b", "a", "a"]


def test_cancelled_and_late_requests_end_and_the_others_go_on(small):
    with engine_of(small) as engine:
        stays = asked(engine, PROMPTS[0], 60)
        gone = asked(engine, PROMPTS[1], 1000)
        late = asked(engine, PROMPTS[2], 1000, seconds=0.4)
        while not gone.pieces:
            time.sleep(0.01)
        gone.ticket.cancel()
        assert gone.wait().failed.kind == "cancelled"
        assert late.wait().failed.kind == "timeout" and "0.4 seconds" in late.failed.message
        alone = asked(engine, PROMPTS[0], 60)
        assert stays.wait().text == alone.wait().text


def test_a_failing_step_is_told_and_the_next_request_served(small, monkeypatch):
    with engine_of(small) as engine:
        step = engine._step

        def broken():
            monkeypatch.setattr(engine, "_step", step)
            raise RuntimeError("a fault")

        monkeypatch.setattr(engine, "_step", broken)
        assert asked(engine, PROMPTS[0]).wait().failed.kind == "internal"
        assert asked(engine, PROMPTS[0]).wait().ended[0].tokens == 24


def test_closing_finishes_what_was_taken(small):
    with engine_of(small, limits=Limits(batch=2)) as engine:
        asks = [asked(engine, prompt) for prompt in PROMPTS]
        closer = threading.Thread(target=engine.close)
        closer.start()
        while engine.well:
            time.sleep(0.005)
        with pytest.raises(Refusal, match="shutting down"):
            asked(engine, PROMPTS[0])
        closer.join(120)
        assert all(heard.ended and heard.ended[0].tokens == 24 for heard in asks)


def test_long_prompts_are_read_between_the_steps_of_others(small):
    with engine_of(small, limits=Limits(batch=4, chunk=8)) as engine:
        running = asked(engine, PROMPTS[0], 200)
        while not running.pieces:
            time.sleep(0.005)
        before = len(running.pieces)
        long = asked(engine, list(range(5, 205)), 2)
        long.wait()
        # 25 chunks were read, and after each of them the other got a token
        assert len(running.pieces) - before >= 20
        running.wait()


def test_steps_of_many_may_be_dense_and_the_report_says_so(small):
    with engine_of(small) as engine:
        engine.dense_above = 1
        first = asked(engine, PROMPTS[0], 60)
        while not first.pieces:
            time.sleep(0.005)
        others = [asked(engine, prompt, 12) for prompt in PROMPTS[1:3]]
        for heard in others:
            report = heard.wait().ended[0].report
            assert report.pruned_tokens == 0 and sum(report.dense_because.values()) == 11
        report = first.wait().ended[0].report
        # pruned as long as it was alone, and again afterwards
        assert report.dense_because.keys() == {"paused"} and report.pruned_tokens >= 20
        assert asked(engine, PROMPTS[0]).wait().ended[0].report.pruned_tokens == 23


def test_the_batch_from_which_dense_is_faster_is_found(small, monkeypatch):

    ratios = {1: 0.5, 2: 0.7, 4: 1.0, 6: 1.3}
    monkeypatch.setattr(pace, "_ratio", lambda model, run, lines: ratios[lines])
    model, _ = small
    with METHOD(model) as run:
        assert dense_above(model, run, 6) == 4 and dense_above(model, run, 4) is None
        ratios[1] = 2.0
        assert dense_above(model, run, 4) == 0
    monkeypatch.undo()
    with METHOD(model) as run:
        assert pace._ratio(model, run, 2) > 0 and not run._pool.live
    with Dense()(model) as run:
        assert dense_above(model, run, 8) is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3"])
def test_families(family, small):
    """Where caches can be joined requests share forwards, elsewhere each has its own; with the same tokens."""
    model, (_, tokenizer) = FAMILIES[family](), small
    prompts = [torch.randint(5, 120, (9 + n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(3)]
    with engine_of((model, tokenizer), Static(sparsity=0.5, min_traced=4)) as engine:
        assert engine.separate == ("this model's caches cannot be joined" if family == "gemma3" else None)
        assert engine.together == (1 if engine.separate else 8)
        alone = [asked(engine, prompt, 8, logprobs=0).wait() for prompt in prompts]
        together = [asked(engine, prompt, 8, logprobs=0) for prompt in prompts]
        for one, other in zip(alone, together, strict=True):
            other.wait()
            assert [p.chances[0].token for p in one.pieces if p.chances] == [
                p.chances[0].token for p in other.pieces if p.chances
            ]


def test_choices_of_a_model_whose_caches_cannot_be_joined(small):
    """Each goes on from a copy."""
    model, (_, tokenizer) = FAMILIES["gemma3"](), small
    with engine_of((model, tokenizer), Static(sparsity=0.5, min_traced=4)) as engine:
        prompt = list(range(5, 40))  # longer than the window
        one = asked(engine, prompt, 12, logprobs=0).wait()
        three = asked(engine, prompt, 12, logprobs=0, choices=3)
        beside = asked(engine, prompt[:9], 12, logprobs=0)
        three.wait(), beside.wait()
    for choice in range(3):
        tokens = [p.chances[0].token for p in three.pieces if p.choice == choice and p.chances]
        assert tokens == [p.chances[0].token for p in one.pieces if p.chances]


def test_logits_that_are_no_numbers_end_that_request_alone(small):
    """Greedy or drawn; the others go on."""
    model, _ = small
    with engine_of(small) as engine:
        fine = asked(engine, PROMPTS[0], 30).wait()

        def broken(module, inputs, logits):
            if logits.shape[0] == 3:
                logits[1:] = float("nan")

        hook = model.lm_head.register_forward_hook(broken)
        asks = [asked(engine, PROMPTS[0], 30, sampling=sampling) for sampling in (Sampling(), Sampling(), SEED)]
        for heard in asks:
            heard.wait()
        hook.remove()
        assert asks[0].text == fine.text and asks[0].failed is None
        assert [heard.failed.kind for heard in asks[1:]] == ["internal"] * 2
        assert asks[1].failed.message == "the model's logits for this request were not finite"
        assert asked(engine, PROMPTS[0], 30).wait().text == fine.text


def test_a_model_of_4_bits(small):
    """Its embedding has no float weights, and its attention packed ones."""
    model, tokenizer = load(dtype="int4")
    with engine_of((model, tokenizer), SketchDart(sparsity=0.3)) as engine:
        reports = [asked(engine, prompt, 8).wait().ended[0].report for prompt in PROMPTS[:2]]
        assert all(report.realised_sparsity == pytest.approx(0.3, abs=0.02) for report in reports)
        assert pace._ratio(model, engine.run, 1) > 0
