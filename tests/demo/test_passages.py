"""The texts inside the package: whole, in the manner of their domains, and nobody else's sentences."""

from __future__ import annotations

import lzma
import math
import re

import pytest
import torch

from dartprune.demo import model_folder, pairs, passages
from dartprune.loading import load

# what the embedded model shows on held-out text of each domain, as its card says
PERPLEXITY = {
    domain: float(figure)
    for domain, figure in re.findall(
        r"^\| (\w+) \| [^|]+ \| ([\d.]+) \|", (model_folder() / "MODEL_CARD.md").read_text(encoding="utf-8"), re.M
    )
}


def test_every_domain_is_first_once_and_second_once():
    texts = passages()
    assert texts.keys() == PERPLEXITY.keys() and len(texts) == 6
    assert len({text for both in texts.values() for text in both}) == sum(map(len, texts.values()))
    chosen = pairs()
    assert sorted(pair[0] for pair in chosen) == sorted(pair[2] for pair in chosen) == sorted(texts)
    for first, text, second, other in chosen:
        assert first != second and text == texts[first][0] and other in texts[second][1:]


@torch.no_grad()
def test_each_domain_reads_like_its_domain():
    model, tokenizer = load(dtype="float32")
    for domain, texts in passages().items():
        losses = []
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
            tokens = torch.tensor([[tokenizer.eos_token_id, *ids]])
            losses.append(float(model(tokens, labels=tokens).loss))
        ratio = math.exp(sum(losses) / len(losses)) / PERPLEXITY[domain]
        assert 0.25 < ratio < 2.5, f"{domain}: {ratio:.2f} times the perplexity of its held-out text"


@pytest.mark.parametrize("domain", sorted(PERPLEXITY))
def test_no_line_or_sentence_was_taken_from_the_training_texts(domain, shared):
    data = ""
    for part in ("train", "valid"):
        packed = (shared / "data" / "domains" / f"{domain}.{part}.txt.xz").read_bytes()
        data += lzma.decompress(packed).decode("utf-8")
    pieces = [
        piece.strip()
        for text in passages()[domain]
        for line in text.splitlines()
        for piece in re.split(r"(?<=[.!?]) +", line)
        if len(piece.split()) >= 8
    ]
    assert pieces
    assert not [piece for piece in pieces if piece in data]
