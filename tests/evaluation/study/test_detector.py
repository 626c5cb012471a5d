"""Other thresholds replayed on series made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dartprune.drift import AttentionDrift
from dartprune.evaluation.study.detector import CurvePoint, curve, false_alarm_rate, first_events, frontier, judge

MU, SIGMA, WINDOW = 0.8, 0.1, 4


def series(*texts):
    """Cosines of each text, [windows, 3, texts], with one mu and sigma."""
    cosines = np.array(texts, dtype=np.float64).T
    return np.stack((cosines, np.full_like(cosines, MU), np.full_like(cosines, SIGMA)), axis=1)


def detector(delta=1.0, patience=1):
    return AttentionDrift(window=WINDOW, delta=delta, min_drop=0.0, patience=patience)


def test_first_events_by_hand():
    # at delta 1 a window has drifted at 0.7 and below
    judged = series([0.8, 0.6, 0.8, 0.6, 0.6], [0.8, 0.8, 0.8, 0.8, 0.71], [0.5] * 5)
    assert first_events(judged, detector()) == [8, None, 4]
    assert first_events(judged, detector(patience=2)) == [20, None, 8]
    assert first_events(judged, detector(delta=2.5)) == [None, None, 4]
    judged[0] = np.nan  # nothing was judged while the reference was too short
    assert first_events(judged, detector()) == [8, None, 8]


def test_rate_watches_up_to_the_event():
    assert false_alarm_rate([8, None, 4], 20) == pytest.approx(1000 * 2 / 32)
    assert false_alarm_rate([None], 20) == 0


def test_one_setting_by_hand():
    changing = series(
        [0.8, 0.8, 0.5, 0.5, 0.5],  # noticed 4 tokens after the change at 8
        [0.8, 0.8, 0.8, 0.8, 0.5],  # 12 tokens after
        [0.5, 0.8, 0.8, 0.8, 0.8],  # fired before
        [0.8, 0.8, 0.8, 0.8, 0.8],  # never
    )
    steady = series([0.8, 0.8, 0.5, 0.8, 0.8], [0.8] * 5)
    got = judge(changing, steady, detector(), before=8, steps=20, early=6)
    assert got.fired_before == pytest.approx(0.25) and got.noticed == pytest.approx(2 / 3)
    assert got.early == pytest.approx(1 / 3) and got.delay == 12
    assert got.false_alarms == pytest.approx(1000 / 32)
    late = judge(series([0.8] * 5), steady, detector(), before=8, steps=20, early=6)
    assert late.delay is None and late.noticed == 0


def test_higher_thresholds_fire_less():
    rng = np.random.default_rng(0)
    points = curve(
        series(*(0.8 - 0.2 * rng.random((30, 10)))), series(*(0.8 - 0.2 * rng.random((30, 10)))), WINDOW,
        before=8, steps=40, early=8,
    )  # fmt: skip
    by = {(p.delta, p.min_drop, p.patience): p for p in points}
    assert len(by) == len(points)
    for (delta, drop, patience), point in by.items():
        if (delta, drop, patience + 1) in by:
            assert by[delta, drop, patience + 1].false_alarms <= point.false_alarms
        assert 0 <= point.fired_before <= 1 and 0 <= point.early <= point.noticed <= 1


def test_frontier():
    def point(alarms, delay):
        return CurvePoint(0, 0, 1, 0, 1, 1, delay, alarms)

    points = [point(3, 4), point(1, 9), point(2, 9), point(2, 5), point(4, None)]
    assert [(p.false_alarms, p.delay) for p in frontier(points)] == [(1, 9), (2, 5), (3, 4)]
