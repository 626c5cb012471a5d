"""What releasing the prompt's mask brings back, beside the mask that stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dartprune.evaluation.arms import ArmAt
from dartprune.evaluation.stats import Interval, regained
from dartprune.evaluation.study.results import Record, Results

LEAST_TEXTS = 10  # fewer answer nothing: an interval over two texts knows two values
UNDECIDED = "undecided"


@dataclass(frozen=True)
class Recovery:
    """What a release brought back, beside the mask that stays.

    tokens: over which it is judged, from the release on.  frozen, released: loss over dense there.  regained: the share
    of the frozen arm's that is gone.  similar_frozen, similar, similarity_regained: the same of the cosine with the
    dense model at the leading point.  half_time: tokens until a window's excess is at most half of the frozen arm's,
    None: never.  lost: loss over dense in the text's last tokens.  verdict: recovers, does not, undecided (the interval
    allows both, or fewer than `LEAST_TEXTS` texts), nothing to regain.
    """

    release: int
    tokens: int
    frozen: Interval
    released: Interval
    regained: Interval
    similar_frozen: float
    similar: float
    similarity_regained: Interval
    half_time: int | None
    lost: Interval
    verdict: str


def recoveries(results: Results) -> list[Recovery]:
    """Recovery for each release time, earliest first; empty without a frozen arm."""
    frozen = results.frozen
    if frozen is None:
        return []
    return [_recovery(results, arm, arm.release or 0, frozen) for arm in results.releases]


def _recovery(results: Results, arm: ArmAt, release: int, frozen: Record) -> Recovery:
    s, record = results.settings, results.records[arm.name, "change"]
    span = slice(release, min(release + s.horizon, s.steps))
    stays, freed = results.excess(frozen), results.excess(record)
    pair = np.stack([np.nanmean(losses[span], 0) for losses in (freed, stays)])
    # whole windows after the release
    windows = slice(-(-release // s.window), span.stop // s.window)
    alike = [r.measure("cosine_to_dense", results.lead)[windows].mean(0) for r in (record, frozen)]
    gain, loss = results.interval(pair, statistic=regained), results.interval(pair[1])
    blocks = [slice(i, i + s.window) for i in range(release, span.stop - s.window + 1, s.window)]
    blocks = [b for b in blocks if np.isfinite(stays[b]).any()]
    halved = [b.stop - release for b in blocks if np.nanmean(freed[b]) <= np.nanmean(stays[b]) / 2]
    return Recovery(
        release=release,
        tokens=span.stop - span.start,
        frozen=loss,
        released=results.interval(pair[0]),
        regained=gain,
        similar_frozen=float(alike[1].mean()),
        similar=float(alike[0].mean()),
        similarity_regained=results.interval(1 - np.stack(alike), statistic=regained),
        half_time=halved[0] if halved else None,
        lost=results.interval(np.nanmean(freed[-min(s.horizon, s.after) :], 0)),
        verdict=_recovers(loss, gain, s.recovered) if record.texts >= LEAST_TEXTS else UNDECIDED,
    )


def _recovers(loss: Interval, gain: Interval, wanted: float) -> str:
    if loss.low <= 0:
        return "nothing to regain"
    if gain.low >= wanted:
        return "recovers"
    return "does not" if gain.high < wanted else UNDECIDED


def verdict(rows: Sequence[Recovery], wanted: float) -> str:
    """One line: does this model recover, and until when?"""
    if not rows:
        return "No release was tried beside a frozen mask, so nothing can be said about recovery."
    if all(row.verdict == "nothing to regain" for row in rows):
        return "The frozen mask costs no loss that a release could give back."
    good = [row.release for row in rows if row.verdict == "recovers"]
    said = ", ".join(f"{row.release}: {row.regained.value:.0%}" for row in rows)
    tail = f" (share of the loss regained by release time: {said}; wanted: {wanted:.0%})."
    open_ = ", ".join(str(row.release) for row in rows if row.verdict == UNDECIDED)
    if not good and open_:
        why = f"intervals allow both, or there are fewer than {LEAST_TEXTS} texts"
        return f"Whether the model recovers when released at {open_} is undecided: {why}" + tail
    if not good:
        return "The model does not recover at any release time that was tried" + tail
    if len(good) == len(rows):
        return f"The model recovers at every release time that was tried, the last is {max(good)}" + tail
    bad = [row.release for row in rows if row.verdict == "does not"]
    until = max((r for r in good if not bad or r < min(bad)), default=None)
    if until is None:
        return "Recovery follows no order of release times" + tail
    return f"The model recovers when released by decoded token {until}" + tail
