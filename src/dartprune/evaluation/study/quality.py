"""Quality of written text beside the text that the dense model wrote: ROUGE, BLEU, distinct-n, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dartprune.errors import require

LIBRARIES = ("rouge_score", "sacrebleu")
NGRAM = 4  # words whose return counts as repetition
NAMING = 4  # letters of a word that can name a topic
# words in topics' names, without their plural s, that say little about what a text speaks of
GENERAL = frozenset(
    {"animal", "city", "computer", "first", "history", "language", "life", "long", "making", "music", "personal"}
    | {"rule", "second", "small", "system", "topic", "treatment", "world"}
)


def check_libraries() -> None:
    """ValueError, in one line, if the libraries for ROUGE and BLEU are not there."""
    for name in LIBRARIES:
        require(name, "text quality")


def overlap_scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, -2 and -L (F-measures, 0 to 1) of each text with its reference, and BLEU of all (0 to 100)."""
    check_libraries()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    out = {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
    return out | {"bleu": float(corpus_bleu(list(texts), [list(references)]).score)}


def distinct(text: str, n: int) -> float:
    """Share of a text's n-grams of words that are different ones; 0 for a text of fewer than n words."""
    grams = ngrams(text, n)
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str) -> float:
    """Share of a text's 4-grams of words that stood in it before; 0 for a text of fewer than 4 words."""
    return 1 - distinct(text, NGRAM) if ngrams(text, NGRAM) else 0.0


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words, in order."""
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def names(text: str, topic: str) -> bool:
    """Whether a text names a topic: a word of the topic's name stands in it, in the singular or the plural.

    Words of three letters and fewer do not count, nor do those that any text may hold (`GENERAL`).
    """
    return bool(_stems(text) & (_stems(topic) - GENERAL))


def _stems(text: str) -> set[str]:
    return {word.removesuffix("s") for word in re.findall(r"\w+", text.lower()) if len(word) >= NAMING}


def naming(texts: Sequence[str], topics: Sequence[Sequence[str]]) -> dict[str, float]:
    """Shares of texts that name their first topic, and their second; the topics of each text in order.

    Nothing where a topic has no name that could be looked for.
    """
    if not all(_stems(topic) - GENERAL for pair in topics for topic in pair):
        return {}
    places = {"names_first": 0, "names_second": 1}
    return {
        key: sum(names(text, pair[place]) for text, pair in zip(texts, topics, strict=True)) / len(texts)
        for key, place in places.items()
    }


def text_quality(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All figures of written texts, means over texts; the references are what the dense arm wrote."""
    count = len(texts)
    return {
        **overlap_scores(texts, references),
        "distinct1": sum(distinct(text, 1) for text in texts) / count,
        "distinct2": sum(distinct(text, 2) for text in texts) / count,
        "repetition": sum(repetition(text) for text in texts) / count,
    }
