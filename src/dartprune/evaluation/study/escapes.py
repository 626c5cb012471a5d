"""Whether a release leads a text that the model writes out of its loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dartprune.evaluation.stats import Array, Interval
from dartprune.evaluation.study.quality import repetition
from dartprune.evaluation.study.results import Record, Results


@dataclass(frozen=True)
class Escape:
    """Share of 4-grams of words that return, in the first tokens that are written after a release.

    tokens: how many these are.  dense, frozen, released: the share in each arm's text at that place.  fewer: what the
    release takes off the frozen arm's, over the same texts.
    """

    release: int
    tokens: int
    dense: Interval
    frozen: Interval
    released: Interval
    fewer: Interval


def escapes(results: Results, tokenizer: Any) -> list[Escape]:
    """One for each release time, earliest first; empty without a frozen arm. Loss does not tell: loops are easy."""
    dense, frozen = results.get("dense"), results.frozen
    if dense is None or frozen is None:
        return []
    rows = []
    for arm in results.releases:
        first = arm.release or 0
        last = min(first + results.settings.horizon, results.settings.steps)
        arms = (dense, frozen, results.records[arm.name, "change"])
        whole, stuck, freed = (_returning(record, first, last, tokenizer) for record in arms)
        shares = [results.interval(part) for part in (whole, stuck, freed, stuck - freed)]
        rows.append(Escape(first, last - first, *shares))
    return rows


def _returning(record: Record, first: int, last: int, tokenizer: Any) -> Array:
    """The share in each text's decoded tokens first:last, [texts]."""
    texts = record.text[first:last].T.tolist()
    return np.array([repetition(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in texts])
