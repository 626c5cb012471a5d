"""Repetition after a release, on texts written by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dartprune.evaluation.study.escapes import escapes
from small_study import SETTINGS, Tokenizer, arms, record, results

STEPS, RELEASE = SETTINGS.steps, 24


def written(arm, texts):
    losses = np.ones((STEPS, len(texts)))
    return replace(record(arm, "change", losses), text=np.array(texts).T)


def test_what_a_release_takes_off():
    dense, frozen, released = arms()[:3]
    # a loop of two words returns in all of its 4-grams but two; what is new never does
    fresh = [list(range(100, 100 + STEPS)), list(range(200, 200 + STEPS))]
    loop = [[7, 8] * (STEPS // 2), fresh[1]]
    freed = [[*loop[0][:RELEASE], *range(300, 300 + STEPS - RELEASE)], fresh[1]]
    made = results([written(dense, fresh), written(frozen, loop), written(released, freed)])
    (row,) = escapes(made, Tokenizer())
    assert (row.release, row.tokens) == (RELEASE, SETTINGS.horizon)
    grams = SETTINGS.horizon - 3
    stuck = (grams - 2) / grams / 2  # of the first text, over two texts
    assert row.dense.value == row.released.value == 0
    assert row.frozen.value == row.fewer.value == pytest.approx(stuck)
    assert row.fewer.low == 0 and row.fewer.high == pytest.approx(2 * stuck)


def test_a_release_near_the_end_is_judged_on_what_is_left():
    dense, frozen, released = arms()[:3]
    late = replace(released, pruner=replace(released.pruner, refresh=replace(released.pruner.refresh, at=STEPS - 6)))
    texts = [[5] * STEPS]
    (row,) = escapes(results([written(arm, texts) for arm in (dense, frozen, late)]), Tokenizer())
    assert row.tokens == 6 and row.frozen.value == pytest.approx(2 / 3)


def test_nothing_without_a_frozen_arm():
    dense, _, released = arms()[:3]
    assert escapes(results([written(dense, [[1] * STEPS]), written(released, [[1] * STEPS])]), Tokenizer()) == []
