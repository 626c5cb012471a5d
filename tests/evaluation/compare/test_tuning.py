"""The search ends at the nominal sparsity that realises the wanted one, and says when there is none."""

from __future__ import annotations

import pytest
import torch

from dartprune.evaluation.compare.tuning import HIGHEST, tune


def asked(function):
    seen = []

    def realised(nominal):
        seen.append(nominal)
        return function(nominal)

    return realised, seen


def test_an_arm_that_keeps_its_word_is_asked_once():
    realised, seen = asked(lambda nominal: nominal + 0.001)
    found = tune(realised, 0.7, tolerance=0.005)
    assert seen == [0.7] and found.nominal == 0.7 and found.reached and found.realised == pytest.approx(0.701)


def test_a_constant_share_of_dense_tokens_takes_one_step_more():
    realised, seen = asked(lambda nominal: 0.77 * nominal)
    found = tune(realised, 0.7, tolerance=0.005)
    assert found.reached and found.nominal == pytest.approx(0.7 / 0.77) and len(seen) == 2


@pytest.mark.parametrize("seed", range(20))
def test_any_rising_function_that_passes_the_target(seed):
    g = torch.Generator().manual_seed(seed)
    bend = 0.3 + 3 * float(torch.rand((), generator=g))
    top = 0.75 + 0.2 * float(torch.rand((), generator=g))
    realised, seen = asked(lambda nominal: top * (nominal / HIGHEST) ** bend)
    found = tune(realised, 0.6, tolerance=0.004)
    assert found.reached and abs(found.realised - 0.6) <= 0.004
    assert found.realised == realised(found.nominal)
    assert len(set(seen)) == len(seen) - 1 <= 8, "asked twice for the same"


def test_steps_that_jump_over_the_target_end_in_the_closest():
    found = tune(lambda nominal: 0.5 if nominal < 0.72 else 0.8, 0.6, tolerance=0.005)
    assert not found.reached and found.realised == 0.5 and found.most == 0.8


def test_what_cannot_be_reached_is_shown_as_it_was_begun():
    realised, seen = asked(lambda nominal: 0.5 * nominal)
    found = tune(realised, 0.7, tolerance=0.005)
    assert (found.nominal, found.reached) == (0.7, False)
    assert found.realised == pytest.approx(0.35) and found.most == pytest.approx(0.475) and seen == [0.7, HIGHEST]
    never = tune(lambda nominal: 0.0, 0.5, tolerance=0.005)
    assert (never.nominal, never.realised, never.reached) == (0.5, 0.0, False)


def test_one_try_is_one_try():
    realised, seen = asked(lambda nominal: 0.9 * nominal)
    found = tune(realised, 0.5, tolerance=0.005, first=0.6, tries=1)
    assert seen == [0.6] and found.nominal == 0.6 and not found.reached


def test_a_target_beyond_the_usual_highest():
    assert tune(lambda nominal: nominal, 0.98, tolerance=0.005).reached
