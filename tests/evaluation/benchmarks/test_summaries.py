"""Prompts whose instruction is never cut, summaries that are greedy continuations, and ROUGE by hand."""

from __future__ import annotations

import json

import pytest

from dartprune import Dart, Dense
from dartprune.evaluation.benchmarks.sources import summaries
from dartprune.evaluation.benchmarks.summaries import INSTRUCTION, prompts, rouge, summarise
from dartprune.evaluation.protocol import Protocol

pytestmark = pytest.mark.usefixtures("no_network")
DOCUMENT = "The old king went to the sea with his dog and came back in the evening. " * 8


def test_the_document_is_cut_and_never_the_instruction(demo):
    _, tokenizer = demo
    long, short = prompts([DOCUMENT, "A dog barked."], tokenizer, most=64)
    before, after = INSTRUCTION.split("{document}")
    head, tail = tokenizer(before)["input_ids"], tokenizer(after, add_special_tokens=False)["input_ids"]
    assert len(long) == 64 and long[: len(head)] == head and long[-len(tail) :] == tail
    document = tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"]
    assert long[len(head) : -len(tail)] == document[: 64 - len(head) - len(tail)]
    assert tokenizer.decode(short) == tokenizer.decode(
        tokenizer(INSTRUCTION.format(document="A dog barked."))["input_ids"]
    )
    with pytest.raises(ValueError, match="no room for the document"):
        prompts([DOCUMENT], tokenizer, most=10)
    with pytest.raises(ValueError, match="no chat template"):
        prompts([DOCUMENT], tokenizer, chat=True)


def test_a_chat_template_is_put_around(demo):
    import copy

    tokenizer = copy.deepcopy(demo[1])
    tokenizer.chat_template = "nothing of it"
    with pytest.raises(ValueError, match="does not hold the message"):
        prompts([DOCUMENT], tokenizer, chat=True)
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m['content'] }} <end>{% endfor %} <answer>"
    (tokens,) = prompts([DOCUMENT], tokenizer, most=80, chat=True)
    text = tokenizer.decode(tokens)
    assert len(tokens) == 80 and text.startswith("<user> Summarize") and text.endswith("Summary: <end> <answer>")


def test_rouge_by_hand():
    pytest.importorskip("rouge_score", reason="needs the extra eval")
    pairs = [
        ("the cats sat on the mat", "the cat sat"),  # stemmed: three words of three, of six
        ("alpha beta gamma", "gamma beta alpha"),
        ("one two", ""),
    ]
    first, second, third = rouge(pairs)
    assert first == pytest.approx({"ROUGE-1": 2 * 1 * 0.5 / 1.5, "ROUGE-2": 2 * 1 * 0.4 / 1.4, "ROUGE-L": 2 / 3})
    assert second == pytest.approx({"ROUGE-1": 1, "ROUGE-2": 0, "ROUGE-L": 1 / 3})
    assert set(third.values()) == {0}


def test_summaries_are_greedy_and_counted_one_by_one(demo, tmp_path):
    pytest.importorskip("rouge_score", reason="needs the extra eval")
    model, tokenizer = demo
    path = tmp_path / "texts.jsonl"
    rows = [{"document": DOCUMENT, "summary": "a king and the sea"}, {"document": "A dog.", "summary": "the dog"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    pairs = summaries(str(path))
    assert pairs == [(row["document"], row["summary"]) for row in rows]
    for pruner in (Dense(), Dart(sparsity=0.5)):
        done = summarise(Protocol(model, pruner, padding=0, batch=2), tokenizer, pairs, most=96, written=24)
        documents = done["details"]["documents"]
        contexts = prompts([d for d, _ in pairs], tokenizer, most=96)
        for context, one in zip(contexts, documents, strict=True):
            protocol = Protocol(model, pruner, padding=0)
            (text,) = protocol.write([context], 24, ends=[tokenizer.eos_token_id])
            assert one["text"] == tokenizer.decode(text.tokens, skip_special_tokens=True).strip()
            assert one["events"] == text.events and one["pruned_tokens"] == text.pruned_tokens
            assert one["realised_sparsity"] == pytest.approx(pruner.sparsity, abs=0.01)
        assert done["scores"]["ROUGE-1"] == pytest.approx(sum(one["ROUGE-1"] for one in documents) / 2)
        assert done["did"]["contexts"] == 2
        spread = abs(documents[0]["ROUGE-1"] - documents[1]["ROUGE-1"]) / 2
        assert done["errors"]["ROUGE-1"] == pytest.approx(spread)
