"""Alternation, medians and ratios, against hand counts."""

from __future__ import annotations

import pytest
import torch

from dartprune.bench.limits import amdahl
from dartprune.bench.timing import Spread, Turns, alternate, seconds_per_call


def test_arms_alternate_and_every_second_turn_goes_backwards():
    called = []

    def arm(name, seconds):
        def measure():
            called.append(name)
            return seconds * len(called)

        return measure

    taken = alternate({"a": arm("a", 1.0), "b": arm("b", 10.0), "c": arm("c", 100.0)}, 3)
    assert called == taken.order == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
    assert taken.seconds == {"a": [1.0, 6.0, 7.0], "b": [20.0, 50.0, 80.0], "c": [300.0, 400.0, 900.0]}
    with pytest.raises(ValueError, match="turns must be at least 1"):
        alternate({"a": lambda: 1.0}, 0)


def test_ratio_of_medians_between_the_quartiles_of_the_turns():
    turns = Turns({"dense": [4.0, 6.0, 8.0, 8.0, 10.0], "pruned": [1.0, 2.0, 4.0, 2.0, 2.0]}, [])
    ratio = turns.times_as_fast("pruned", "dense")
    assert ratio.median == 8.0 / 2.0
    assert (ratio.lower, ratio.upper) == (3.0, 4.0)  # of 4, 3, 2, 4, 5
    assert turns.times_as_fast("dense", "dense") == Spread(1.0, 1.0, 1.0)


def test_spread():
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread.of([3.0, 1.0, 2.0, 4.0, 5.0]) == Spread(2.0, 3.0, 4.0)


def test_a_call_is_warmed_and_timed_with_all_threads_of_torch():
    threads = []
    assert seconds_per_call(lambda: threads.append(torch.get_num_threads()), torch.device("cpu"), calls=3) > 0
    assert len(threads) >= 3 + 1 and set(threads) == {torch.get_num_threads()}


@pytest.mark.parametrize(
    ("share", "saved", "limit"), [(0.6, 0.7, 1 / 0.58), (0.5, 1.0, 2.0), (1.0, 0.75, 4.0), (0, 0.7, 1)]
)
def test_amdahl(share, saved, limit):
    assert amdahl(share, saved) == pytest.approx(limit)
    with pytest.raises(ValueError, match="shares must lie in"):
        amdahl(share, 1.1)
