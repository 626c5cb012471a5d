"""Answers are scored and texts are written as decoding with the masks in force gives them, alone or in a batch."""

from __future__ import annotations

import pytest
import torch

from dartprune import Clock, Dart, Dense, Detector, Relearn, Static
from dartprune.evaluation import protocol as module
from dartprune.evaluation.protocol import Protocol
from dartprune.model.caches import handed
from oracle import assert_untouched, masked_by_hand, masks_of, snapshot
from tiny import FAMILIES

EAGER = Dart(sparsity=0.5, detector=Detector(window=2, delta=0.0, min_drop=0.0, patience=1))


def draw(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 128, (n,), generator=generator).tolist() for n in lengths]


def by_hand(model, pruner, context, answer):
    """Log-probability of an answer: attach, prefill, decode token by token, all by the public API."""
    tokens = torch.tensor([[*context, *answer]])
    split = len(context) - 1
    total, greedy = 0.0, True
    with torch.no_grad(), pruner(model) as run:
        with run.phase("prefill"):
            cache = model(input_ids=tokens[:, :split], use_cache=True).past_key_values
        for i in range(split, tokens.shape[1] - 1):
            with run.phase("decode"):
                logits = model(input_ids=tokens[:, i : i + 1], **handed(cache)).logits[0, -1]
            total += float(logits.log_softmax(-1)[tokens[0, i + 1]])
            greedy &= int(logits.argmax()) == int(tokens[0, i + 1])
        return total, greedy, run.report()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt"])
def test_a_one_token_answer_is_pruned(family):
    model = FAMILIES[family]()
    (context,) = draw(20)
    pruner = Static(sparsity=0.5)
    before = snapshot(model)
    (result,) = Protocol(model, pruner, padding=0).score([(context, [7])])
    assert_untouched(model, before)
    (dense,) = Protocol(model, Dense(), padding=0).score([(context, [7])])
    with torch.no_grad():
        plain = model(torch.tensor([context])).logits[0, -1].log_softmax(-1)
    assert dense.logprob == pytest.approx(float(plain[7]), abs=1e-4)
    assert abs(result.logprob - dense.logprob) > 0.01

    # the same with hooks on the plain model, the masks taken from all but the last token
    tokens = torch.tensor([context])
    with torch.no_grad(), pruner(model) as run:
        with run.phase("prefill"):
            cache = model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
        with run.phase("decode"):
            model(input_ids=tokens[:, -1:], **handed(cache))
        masks = masks_of(run, run.slots_of(cache))
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
        with masked_by_hand(model, masks):
            logits = model(input_ids=tokens[:, -1:], **handed(cache)).logits[0, -1]
    assert result.logprob == pytest.approx(float(logits.log_softmax(-1)[7]), abs=1e-4)


@pytest.mark.parametrize("pruner", [EAGER, Dense(), Clock(sparsity=0.5, start=2)], ids=lambda p: p.name)
def test_answers_share_a_context_and_do_not_meet(pruner):
    """Several answers of unequal lengths in a batch of unequal contexts: each as if it were alone, events included."""
    model = FAMILIES["llama"]()
    contexts = draw(30, 24, 17)
    answers = draw(12, 1, 5, 12, seed=1)
    questions = [(context, answer) for context in contexts for answer in answers]
    questions.insert(5, (contexts[0], [*answers[0][:-1], 3]))  # differs from another answer in its last token alone
    greedy = Protocol(model, pruner, padding=0).write([contexts[1]], 4, ends=[])[0].tokens
    questions.append((contexts[1], greedy))
    together = Protocol(model, pruner, padding=0, batch=8)
    results = together.score(questions)
    events = tokens = 0
    for (context, answer), result in zip(questions, results, strict=True):
        logprob, is_greedy, report = by_hand(model, pruner, context, answer)
        assert result.logprob == pytest.approx(logprob, abs=2e-4)
        assert result.greedy == is_greedy
        events += len(report.events)
        tokens += report.dense_tokens + report.pruned_tokens
    assert results[-1].greedy and not all(result.greedy for result in results)
    counted = together.tally
    shared = by_hand(model, pruner, *questions[5])[2]  # decoded once for two answers
    assert counted.dense_tokens + counted.pruned_tokens == tokens - len(answers[0])
    assert sum(counted.events.values()) == events - len(shared.events)
    assert counted.contexts == 3 and counted.contexts_too_short == 0
    if pruner is EAGER:
        assert events > 5
        assert counted.realised_sparsity == pytest.approx(0.5, abs=0.02) and counted.dense_tokens == 0


def test_prefilled_once(monkeypatch):
    model = FAMILIES["llama"]()
    seen = []
    original = module.Lines.__init__
    monkeypatch.setattr(
        module.Lines,
        "__init__",
        lambda self, m, run, contexts, pad: (seen.extend(contexts), original(self, m, run, contexts, pad))[1],
    )
    contexts = draw(20, 22)
    Protocol(model, Static(), padding=0, batch=1).score(
        [(c, a) for _ in range(3) for c in contexts for a in ([5], [6, 7])]
    )
    assert sorted(map(len, seen)) == [20, 22]


def test_contexts_too_short_run_dense_and_are_counted():
    model = FAMILIES["llama"]()
    contexts = draw(1, 9, 10)  # nine leaves eight before the last, of which the first does not count
    answers = ([5], [6, 7, 8])
    pruner = Static(sparsity=0.5)
    protocol = Protocol(model, pruner, padding=0)
    results = protocol.score([(c, a) for c in contexts for a in answers])
    dense = Protocol(model, Dense(), padding=0).score([(c, a) for c in contexts for a in answers])
    near = [abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(results, dense, strict=True)]
    assert near == [True, True, True, True, False, False]
    tally = protocol.tally
    assert tally.contexts == 3 and tally.contexts_too_short == 2
    assert tally.dense_tokens == 8 and tally.pruned_tokens == 4
    assert tally.realised_sparsity == pytest.approx(0.5 * 4 / 12, abs=0.01)
    written = protocol.write(contexts, 3, ends=[])
    plain = Protocol(model, Dense(), padding=0).write(contexts, 3, ends=[])
    assert [w.tokens for w in written[:2]] == [w.tokens for w in plain[:2]]
    assert [w.dense_tokens for w in written] == [3, 3, 0] and written[2].pruned_tokens == 3


@pytest.mark.parametrize("pruner", [EAGER, Dart(sparsity=0.5, refresh=Relearn(tokens=3))], ids=["replay", "relearn"])
def test_writing_in_a_batch_is_writing_alone(pruner):
    model = FAMILIES["llama"]()
    contexts = draw(30, 12, 21, 12)
    stop = lambda tokens: tokens[-1] % 7 == 0  # noqa: E731
    together = Protocol(model, pruner, padding=0, batch=3)
    written = together.write(contexts, 12, ends=[1], stop=stop)
    for context, text in zip(contexts, written, strict=True):
        alone = Protocol(model, pruner, padding=0).write([context], 12, ends=[1], stop=stop)[0]
        assert alone == text
        expected, _, report = by_hand(model, pruner, context, text.tokens)
        assert by_hand(model, pruner, context, text.tokens)[1], "every token is the most probable one"
        assert text.pruned_tokens == report.pruned_tokens and text.events == len(report.events)
        assert expected < 0 and all(t % 7 for t in text.tokens[:-1])
    assert len({len(w.tokens) for w in written}) > 1, "lines end at different times"
    assert together.tally.contexts == 4


def test_end_tokens_end_a_text_and_a_choice_can_be_made():
    model = FAMILIES["llama"]()
    (context,) = draw(20)
    protocol = Protocol(model, Static(sparsity=0.5), padding=0)
    (free,) = protocol.write([context], 6, ends=[])
    (ended,) = protocol.write([context], 6, ends=[free.tokens[3]])
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[3])]
    (least,) = protocol.write([context], 6, ends=[], choose=lambda logits: logits.argmin(-1))
    assert least.tokens[0] != free.tokens[0]


def test_a_long_evaluation_takes_several_runs(monkeypatch):
    model = FAMILIES["llama"]()
    contexts = draw(20, 21, 22, 23)
    questions = [(c, a) for c in contexts for a in ([5], [6, 7])]
    whole = Protocol(model, EAGER, padding=0, batch=1)
    expected = whole.score(questions)
    monkeypatch.setattr(module, "PER_RUN", 1)
    parts = Protocol(model, EAGER, padding=0, batch=1)
    assert parts.score(questions) == expected
    assert parts.tally.events == whole.tally.events and whole.tally.events["replay"] > 0
    for name in ("contexts", "pruned_tokens", "realised_sparsity", "bytes_saved"):
        assert getattr(parts.tally, name) == pytest.approx(getattr(whole.tally, name))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p.score([([], [1])]), "at least one token each"),
        (lambda p: p.score([([1], [])]), "question 0"),
        (lambda p: p.write([[1]], 0, ends=[]), "at least one token must be written"),
        (lambda p: p.write([[]], 1, ends=[]), "a context needs"),
        (lambda p: Protocol(p.model, p.pruner, padding=0, batch=0), "at least 1 context"),
    ],
)
def test_what_cannot_be(call, said):
    with pytest.raises(ValueError, match=said):
        call(Protocol(FAMILIES["llama"](), Static(), padding=0))
