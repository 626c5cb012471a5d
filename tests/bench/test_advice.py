"""Advice: figures that are measured, and sentences that follow from them."""

from __future__ import annotations

import pytest
import torch

from dartprune import Dart, Dense, SketchDart, Static
from dartprune.bench import advice
from dartprune.bench.advice import INSTRUCTIONS, Advice, Allowance, Finding, Trial, advise, prompts_of, work_of
from dartprune.bench.stepping import TokenClock
from dartprune.errors import UserError
from dartprune.evaluation.forced import forced_losses
from dartprune.evaluation.stats import Interval
from dartprune.loading import load


def found(*findings, share=0.6, limit=2.5):
    return Advice(10.0, share, limit, 3, 90, Allowance(1.05, 0.1), list(findings))


def one(arm="dart", times=1.5, loss=0.05, **more):
    return Finding(arm, 0.5, times=Interval(times, times, times), loss=Interval(loss, loss, loss), **more)


def test_the_quickest_that_is_worth_it_is_advised():
    told = found(one(times=1.2), one("sketch-dart", times=1.4), one("static", times=2.0, loss=0.3))
    assert told.best.arm == "sketch-dart"
    assert told.sentences[0] == "Use sketch-dart at 0.5: 1.40 times as fast, 0.050 nats a token lost."
    assert told.to_dict()["best"]["arm"] == "sketch-dart" and told.to_dict()["advice"] == told.sentences


def test_pruning_must_win_more_than_the_kernels_alone():
    whole = Finding("dense", 0.0, times=Interval(1.4, 1.4, 1.4))
    told = found(whole, one(times=1.43))
    assert told.best is whole
    assert told.sentences[0].startswith("Attach dense alone: 1.40 times as fast by the kernels for the rest of a step;")
    assert found(whole, one(times=1.5)).best.arm == "dart"
    slow = Finding("dense", 0.0, times=Interval(1.0, 1.0, 1.0))
    assert found(slow, one(times=1.06)).best.arm == "dart" and found(slow).best is None


@pytest.mark.parametrize(
    ("findings", "because"),
    [
        (
            [one(loss=0.4), one("static", loss=0.2)],
            "What is faster loses more than 0.1 nats a token: the least,",
        ),
        ([one(times=1.01)], "Nothing is 1.05 times as fast: the FFN takes 60% of a dense step, so 2.50 is the most."),
        ([one(times=0.9, slow_because="no rows")], "No time is saved: no rows."),
        ([one(refused="too much")], "No method could be attached."),
    ],
)
def test_where_nothing_is_worth_it_the_reason_is_told(findings, because):
    told = found(*findings)
    assert told.best is None and told.sentences[0] == "Leave this model dense."
    assert told.sentences[1].startswith(because)


def test_figures_are_those_of_the_model():
    torch.set_num_threads(1)
    model, tokenizer = load(dtype="float32")
    prompts = prompts_of(tokenizer, ["once upon a time there was a little dog", "the king said to the queen"])
    refused = SketchDart(sparsity=0.99)
    trials = [Trial("dart", 0.5, Dart(sparsity=0.5, min_traced=4)), Trial("sketch-dart", 0.99, refused)]
    done = []
    told = advise(model, prompts, trials, new=16, turns=2, progress=done.append)
    mine, other = told.findings
    assert mine.refused is None and mine.realised == pytest.approx(0.5, abs=0.01)
    assert 0 < mine.times.low <= mine.times.value <= mine.times.high and mine.tokens_per_second > 0
    assert 0 < told.ffn_share < 1 and told.limit == pytest.approx(1 / (1 - told.ffn_share))
    assert "cannot be reached" in other.refused and not other.pays(told.allowed)
    assert sum(done) <= work_of(2, 2, 16, 2)
    losses = []
    for prompt in prompts:
        text = model.generate(prompt, max_new_tokens=16, do_sample=False)
        if text.shape[1] - prompt.shape[1] >= advice.SHORTEST:
            pair = [
                forced_losses(model, method, text, prompt.shape[1])[0].mean() for method in (trials[0].pruner, Dense())
            ]
            losses.append(float(pair[0] - pair[1]))
    assert told.answers == len(losses) and mine.loss.value == pytest.approx(sum(losses) / len(losses), abs=1e-3)
    assert mine.loss.value != 0


def test_what_saves_no_time_says_why():
    model, tokenizer = load(dtype="float32")
    prompts = prompts_of(tokenizer, ["once upon a time there was a little dog"])
    trial = Trial("static", 0.5, Static(sparsity=0.5, min_traced=4))
    told = advise(model, prompts, [trial], new=12, turns=1, backend="masked", allowed=Allowance(0.0, 9.0))
    assert told.findings[0].slow_because and told.best is told.findings[0], "it is asked for nothing else"


def test_a_chat_model_is_asked_and_another_goes_on():
    _, tokenizer = load()
    plain = prompts_of(tokenizer, ["a b c d"])
    assert [prompt.shape[0] for prompt in plain] == [1]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    asked = prompts_of(tokenizer, [])
    assert len(asked) == len(INSTRUCTIONS) and "blue" in tokenizer.decode(asked[0][0])


def test_answers_that_end_at_once_measure_nothing(monkeypatch):
    model, tokenizer = load(dtype="float32")
    prompts = prompts_of(tokenizer, ["once upon a time there was a little dog"])
    first = int(model.generate(prompts[0], max_new_tokens=1, do_sample=False)[0, -1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", first)
    with pytest.raises(UserError, match="ends every answer within 8 tokens"):
        advise(model, prompts, [Trial("dart", 0.5, Dart(sparsity=0.5))], new=16)


def test_an_end_does_not_end_the_timing(monkeypatch):
    model, tokenizer = load(dtype="float32")
    (prompt,) = prompts_of(tokenizer, ["once upon a time there was a little dog"])
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(model.config.vocab_size)))
    clocks = []
    monkeypatch.setattr(advice, "TokenClock", lambda: clocks.append(TokenClock()) or clocks[-1])
    assert advice._rate(model, prompt, 6) > 0
    assert len(clocks[0].times) == 7  # the prompt and six tokens
