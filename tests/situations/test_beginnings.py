"""Models that need their begin-of-text token at the head of every window: it is there where the tokenizer puts it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dartprune import Dense
from dartprune.cache import cache_folder
from dartprune.evaluation.benchmarks import perplexity
from dartprune.evaluation.calibration import cut
from dartprune.evaluation.protocol import Protocol
from dartprune.evaluation.study.layout import forced_texts
from dartprune.evaluation.study.settings import Settings
from dartprune.evaluation.texts import headed, opening
from letters import Letters, documents, tiny

GEMMA = cache_folder() / "real" / "gemma3"


class Beginning(Letters):
    """Puts its token before a text, as Gemma's and Llama's do."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        tokens = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *tokens] if add_special_tokens else tokens}


class Endless(Letters):
    """Has no such token at all."""

    bos_token_id = None


def test_only_what_the_tokenizer_adds_itself_begins_a_window():
    assert opening(Beginning()) == [1]
    assert opening(Letters()) == opening(Endless()) == []


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17, 40])
@pytest.mark.parametrize("size", [8, 9])
def test_every_window_has_it_and_it_is_never_scored(tokens, size):
    text = list(range(10, 10 + tokens))
    with_it = perplexity.windows([1, *text], size, [1])
    assert with_it == perplexity.windows(text, size, [1])
    for context, answer in with_it:
        assert context[0] == 1 and 1 not in context[1:] and 1 not in answer
        assert len(context) <= size // 2 and len(answer) <= size // 2
    scored = [token for _, answer in with_it for token in answer]
    first = scored[0] - 10 if scored else tokens
    assert scored == text[first:] and first <= size // 2
    # each context is what stands before its answer
    for context, answer in with_it:
        at = answer[0] - 10
        assert context[1:] == text[at - len(context) + 1 : at]


@torch.no_grad()
def test_perplexity_is_that_of_windows_by_hand():
    model, text = tiny().eval(), documents(60)["low"]
    parts = perplexity.cut(text, Beginning(), 16)
    done = perplexity.perplexity(Protocol(model, Dense(), padding=0, batch=4), parts, head=[1])
    body = Letters()("\n\n".join(text))["input_ids"]
    losses = []
    for i in range(7, len(body), 8):
        row = torch.tensor([[1, *body[i - 7 : i], *body[i : i + 8]]])
        logits = model(row).logits[0, 7:-1]
        losses += F.cross_entropy(logits, row[0, 8:], reduction="none").tolist()
    assert done["scores"]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert done["details"]["begins_with"] == [1] and done["details"]["tokens"] == len(losses)


def test_a_context_that_is_cut_keeps_its_beginning():
    assert headed([1, 5, 6, 7, 8], [1], 3) == [1, 7, 8]
    assert headed([5, 6, 7, 8], [1], 3) == [1, 7, 8]
    assert headed([1, 5], [1], 8) == [1, 5]
    assert headed([5, 6, 7], [], 2) == [6, 7]
    assert headed([1, 5, 6], [1], 1) == [1]


def test_calibration_pieces_and_the_studys_texts_begin_with_it():
    assert all(piece[0] == 1 for piece in cut(list(range(2, 600)), [1]))
    settings = Settings(prompt=16, before=20, after=20)
    for tokenizer, first in ((Beginning(), True), (Letters(), False)):
        texts = forced_texts(documents(), tokenizer, settings, 2, 1, separator=False)
        assert all((text.prompt[0] == 1) == first for group in texts.values() for text in group)


@pytest.mark.slow
def test_gemma_reads_windows_as_it_was_trained():
    if not (GEMMA / "config.json").is_file():
        pytest.skip(f"needs Gemma 3 270M in {GEMMA}")
    from dartprune.demo import passages
    from dartprune.loading import load

    model, tokenizer = load(str(GEMMA))
    assert opening(tokenizer) == [tokenizer.bos_token_id]
    texts = passages()["wiki"] + passages()["novels"]
    figures = []
    for head in ([tokenizer.bos_token_id], []):
        tokens = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"][:480]
        parts = perplexity.windows(tokens, 96, head)
        figures.append(
            perplexity.perplexity(Protocol(model, Dense(), padding=0, batch=8), parts)["scores"]["perplexity"]
        )
    assert figures[0] < 0.7 * figures[1]
