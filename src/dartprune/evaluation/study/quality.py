"""Quality of written text beside the text that the dense model wrote: ROUGE, BLEU, distinct-n, repetition."""

from __future__ import annotations

from collections.abc import Sequence

from dartprune.errors import require

LIBRARIES = ("rouge_score", "sacrebleu")
NGRAM = 4  # words whose return counts as repetition


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


def text_quality(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All figures of written texts, means over texts; the references are what the dense arm wrote."""
    count = len(texts)
    return {
        **overlap_scores(texts, references),
        "distinct1": sum(distinct(text, 1) for text in texts) / count,
        "distinct2": sum(distinct(text, 2) for text in texts) / count,
        "repetition": sum(repetition(text) for text in texts) / count,
    }
