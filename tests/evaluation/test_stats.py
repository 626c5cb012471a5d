"""Intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from dartprune.evaluation.stats import band, difference, interval, regained, share, standard_error


def test_the_mean_of_a_sample():
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        found = interval(rng.normal(2.0, 1.0, 40), resamples=200, seed=seed)
        assert found.low <= found.value <= found.high
        inside += found.low <= 2.0 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_columns_stay_together_and_groups_do_not():
    a = np.random.default_rng(0).normal(5, 3, 50)
    paired = interval(np.stack((a / 4, a)), statistic=regained)
    assert paired.value == pytest.approx(0.75) and paired.high - paired.low < 1e-9
    apart = interval(a, a, statistic=difference)
    assert apart.value == 0 and apart.low < -0.3 and apart.high > 0.3
    assert interval(a, seed=3) == interval(a, seed=3) != interval(a, seed=4)


def test_a_share_of_all_is_not_certain():
    found = share(np.ones(20))
    assert found.value == 1 and found.high == 1 and found.low == pytest.approx(0.839, abs=0.001)
    assert share(np.array([0, 1, 0, 0])).low > 0


def test_band():
    mean, low, high = band(np.array([[1.0, 3.0], [2.0, 2.0]]))
    assert mean.tolist() == [2, 2] and low.tolist() == pytest.approx([2 - 1.96, 2]) and high[0] == pytest.approx(3.96)
    assert all(part.tolist() == [5.0] for part in band(np.array([[5.0]])))


def test_intervals_against_a_loop():
    values = np.random.default_rng(3).normal(size=13)
    found = interval(values, resamples=300, seed=4)
    rng = np.random.default_rng(4)
    means = sorted(np.mean([values[i] for i in row]) for row in rng.integers(13, size=(300, 13)))
    assert found.value == pytest.approx(np.mean(values))
    assert [found.low, found.high] == pytest.approx(list(np.percentile(means, [2.5, 97.5])))


def test_one_seed_pairs_and_constants_are_certain():
    values = np.array([0.1, 0.7, 0.3, 0.9])
    same = interval((values + 1) - values)
    assert same.high - same.low < 1e-12, "a constant difference is certain, however much the streams differ"
    for constant in (0.1, 1 / 3, 1e9 / 7):
        found = interval([constant] * 3)
        assert found.low <= found.value <= found.high
    assert interval([0.5]).mapped(np.exp).value == pytest.approx(np.exp(0.5))


def test_standard_error():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0) and standard_error([4.0]) == 0
