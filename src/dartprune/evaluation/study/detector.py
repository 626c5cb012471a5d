"""What other thresholds of the drift detector would have noticed, from recorded cosines, without the model.

A recorded series holds, window by window, the cosine with the prompt's reference and that reference's mu and sigma, as
the prompt's mask stays in force. Up to its first event a detector sees exactly that, so its first event is exact at any
threshold. What comes after would depend on the new masks and the new reference; so only first events count here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dartprune.drift import AttentionDrift
from dartprune.evaluation.stats import Array

DELTAS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
DROPS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
PATIENCES = (1, 2, 3)


@dataclass(frozen=True)
class CurvePoint:
    """One setting of the detector, and what it would have done.

    fired_before: share of the changing texts in which it fired before the change; these do not count further.
    noticed: share of the others in which it fired after it.  early: in which it did so within the early tokens.
    delay: median tokens from the change to the event, texts without one counting as never; None: never.
    false_alarms: first events on one-topic text for 1,000 tokens watched, up to the event in each text.
    """

    delta: float
    min_drop: float
    patience: int
    fired_before: float
    noticed: float
    early: float
    delay: float | None
    false_alarms: float


def first_events(judged: Array, detector: AttentionDrift) -> list[int | None]:
    """Decoded token of the first event in each text, None where there is none.

    Args:
        judged: [windows, 3, texts] of cosine, mu and sigma; NaN where nothing was judged.
        detector: its thresholds and window.
    """
    out: list[int | None] = []
    for text in judged.transpose(2, 0, 1).tolist():
        fresh = AttentionDrift(detector.window, detector.delta, detector.min_drop, detector.patience)
        fired = (i for i, figures in enumerate(text, 1) if not np.isnan(figures[0]) and fresh.decide(*figures))
        number = next(fired, None)
        out.append(None if number is None else number * detector.window)
    return out


def false_alarm_rate(first: Sequence[int | None], steps: int) -> float:
    """First events for 1,000 tokens watched; a text is watched up to its first event."""
    watched = sum(steps if at is None else at for at in first)
    return 1000 * sum(at is not None for at in first) / watched if watched else 0.0


def judge(
    changing: Array, steady: Array, detector: AttentionDrift, *, before: int, steps: int, early: int
) -> CurvePoint:
    """What one setting would have done.

    Args:
        changing: series of texts that change their topic; see `first_events`.
        steady: the same of texts on one topic.
        detector: the setting.
        before: decoded token of the change.
        steps: decoded tokens of a text.
        early: tokens after the change within which a detection is early.
    """
    first = first_events(changing, detector)
    delays = [np.inf if at is None else float(at - before) for at in first if at is None or at > before]
    median = float(np.median(delays)) if delays else np.inf
    return CurvePoint(
        delta=detector.delta,
        min_drop=detector.min_drop,
        patience=detector.patience,
        fired_before=1 - len(delays) / len(first),
        noticed=sum(d < np.inf for d in delays) / max(1, len(delays)),
        early=sum(d <= early for d in delays) / max(1, len(delays)),
        delay=median if np.isfinite(median) else None,
        false_alarms=false_alarm_rate(first_events(steady, detector), steps),
    )


def curve(changing: Array, steady: Array, window: int, *, before: int, steps: int, early: int) -> list[CurvePoint]:
    """Every combination of thresholds; arguments as in `judge`, `window` in tokens."""
    grid = itertools.product(DELTAS, DROPS, PATIENCES)
    detectors = [AttentionDrift(window=window, delta=a, min_drop=b, patience=c) for a, b, c in grid]
    return [judge(changing, steady, one, before=before, steps=steps, early=early) for one in detectors]


def frontier(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The settings that no other beats in both false alarms and delay, by falling delay."""
    known = sorted((p for p in points if p.delay is not None), key=lambda p: (p.false_alarms, p.delay))
    best: list[CurvePoint] = []
    for point in known:
        if not best or (point.delay is not None and best[-1].delay is not None and point.delay < best[-1].delay):
            best.append(point)
    return best
