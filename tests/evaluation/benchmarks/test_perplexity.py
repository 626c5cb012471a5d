"""Perplexity of the second halves of windows, by hand; windows score every token once, but for the first half."""

from __future__ import annotations

import math

import pytest
import torch

from dartprune import Dense, Static
from dartprune.evaluation.benchmarks.perplexity import cut, perplexity, windows
from dartprune.evaluation.forced import forced_losses
from dartprune.evaluation.protocol import Protocol

TEXTS = ["once upon a time there was a little dog . " * 6, "the king went to the old house by the sea . " * 6]


def test_by_hand(demo):
    model, tokenizer = demo
    parts = cut(TEXTS, tokenizer, 32)
    tokens = tokenizer("\n\n".join(TEXTS))["input_ids"]
    assert [token for _, answer in parts for token in answer] == tokens[16:]
    for pruner in (Dense(), Static(sparsity=0.5)):
        done = perplexity(Protocol(model, pruner, padding=tokenizer.pad_token_id, batch=3), parts)
        losses = [forced_losses(model, pruner, torch.tensor([c + a]), len(c))[0][0] for c, a in parts]
        loss = float(torch.cat(losses).mean())
        assert done["details"]["loss"] == pytest.approx(loss, abs=1e-4)
        assert done["scores"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert done["details"]["windows"] == pytest.approx([float(x.mean()) for x in losses], abs=1e-4)
        assert done["did"]["dense_tokens"] + done["did"]["pruned_tokens"] == len(tokens) - 16
        assert done["did"]["realised_sparsity"] == pytest.approx(pruner.sparsity, abs=0.01)
        # resampling the windows gives about the same error
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(parts), (4000, len(parts)), generator=generator)
        sums = torch.tensor([float(x.sum()) for x in losses])[draws].sum(1)
        sizes = torch.tensor([float(len(x)) for x in losses])[draws].sum(1)
        assert done["details"]["loss_error"] == pytest.approx(float((sums / sizes).std()), rel=0.1)


def test_a_limit_takes_windows_from_the_whole_text(demo):
    _, tokenizer = demo
    parts = cut(TEXTS, tokenizer, 16)
    fewer = cut(TEXTS, tokenizer, 16, limit=4)
    assert len(fewer) == 4 and fewer[0] == parts[0] and fewer[2] == parts[len(parts) // 2]
    assert cut(TEXTS, tokenizer, 16, limit=1000) == parts
    with pytest.raises(ValueError, match="nothing is left to score"):
        cut(["a"], tokenizer, 16)


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 12, 13, 31])
def test_every_token_once(length):
    text = list(range(length))
    found = windows(text, 8)
    scored = [token for _, answer in found for token in answer]
    assert scored == text[length - len(scored) :]
    assert len(scored) == (length - 4 if length > 8 else length - length // 2)
    for context, answer in found:
        assert len(context) == (4 if length > 8 else length // 2) and 1 <= len(answer) <= 4
        assert context + answer == text[context[0] : context[0] + len(context) + len(answer)]


def test_no_window():
    assert windows([1], 8) == [] and windows([], 8) == []
    assert windows(list(range(10)), 5) == windows(list(range(10)), 4)
    with pytest.raises(ValueError, match="at least 2"):
        windows([1, 2, 3], 1)
