"""The paper's three claims about frozen masks, answered for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dartprune.evaluation.stats import Array, Interval, difference, share
from dartprune.evaluation.study.detector import first_events, judge
from dartprune.evaluation.study.recovery import LEAST_TEXTS, Recovery
from dartprune.evaluation.study.results import Record, Results

YES, NO, OPEN = "reproduced", "refuted", "undecided"
RESCUED_UNTIL, LOST_FROM = 400, 500  # the paper's release times, in decoded tokens


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims. answer: reproduced, refuted or undecided.  figures: the numbers behind it."""

    claim: str
    answer: str
    figures: str


def claims(results: Results, rows: Sequence[Recovery]) -> list[Claim]:
    """The paper's three claims for this model."""
    made = [_trap(results), _early(results), _rescue(rows)]
    texts = min(record.texts for record in results.records.values())
    if texts >= LEAST_TEXTS:
        return made
    few = f"{texts} texts of a kind answer nothing: give at least {LEAST_TEXTS}; seen were: "
    return [Claim(claim.claim, OPEN, few + claim.figures) for claim in made]


def _trap(results: Results) -> Claim:
    claim = "A frozen mask traps the model: at a change of topic its trajectory leaves the dense one, and loss rises"
    frozen, steady, s = results.frozen, results.steady, results.settings
    if frozen is None or steady is None:
        return Claim(claim, OPEN, "needs a frozen arm and one-topic texts")
    cut = s.before // s.window

    def rise(record: Record) -> Array:
        excess = results.excess(record)
        return np.asarray(np.nanmean(excess[s.before :], 0) - np.nanmean(excess[: s.before], 0))

    def fall(record: Record) -> Array:
        cosine = record.measure("cosine_to_dense", results.lead)
        return np.asarray(cosine[:cut].mean(0) - cosine[cut:].mean(0))

    loss = results.interval(rise(frozen), rise(steady), statistic=difference)
    path = results.interval(fall(frozen), fall(steady), statistic=difference)
    more: list[Interval] = [loss, path]
    answer = YES if all(gain.low > 0 for gain in more) else NO if any(gain.high <= 0 for gain in more) else OPEN
    return Claim(
        claim,
        answer,
        f"loss over dense rises by {loss} nats more than on one-topic text at the same tokens, and the cosine with the "
        f"dense vectors ({results.points[results.lead].name}) falls by {path} more",
    )


def _early(results: Results) -> Claim:
    s = results.settings
    claim = f"The attention shows the change early: within {s.early} tokens, and not by chance"
    frozen, steady, detecting = results.frozen, results.steady, results.detecting
    if frozen is None or steady is None or detecting is None:
        return Claim(claim, OPEN, "needs a frozen arm, one that detects, and one-topic texts")
    detector = detecting.arm.pruner.detector.build()

    def hits(record: Record) -> Array:
        first = [at for at in first_events(record.judged, detector) if at is None or at > s.before]
        return np.array([at is not None and at - s.before <= s.early for at in first], dtype=np.float64)

    point = judge(frozen.judged, steady.judged, detector, before=s.before, steps=s.steps, early=s.early)
    changing, chance = hits(frozen), hits(steady)
    if not len(changing) or not len(chance):
        return Claim(claim, OPEN, "the detector fired before the change in every text")
    timely = share(changing)
    gain = results.interval(changing, chance, statistic=difference)
    answer = NO if gain.high <= 0 or timely.high < 0.5 else OPEN
    if gain.low > 0 and timely.low >= 0.5:
        answer = YES
    delay = "never" if point.delay is None else f"{point.delay:g} tokens"
    return Claim(
        claim,
        answer,
        f"fired within {s.early} tokens in {timely} of {len(changing)} texts, {gain} more than on one-topic text at "
        f"the same place; median delay {delay}; {point.false_alarms:.2f} first alarms for 1,000 tokens of one topic; "
        f"{point.fired_before:.0%} of the texts had fired before the change",
    )


def _rescue(rows: Sequence[Recovery]) -> Claim:
    claim = f"Release rescues the text until decoded token {RESCUED_UNTIL}, and no more from {LOST_FROM} on"
    early = [row.verdict for row in rows if row.release <= RESCUED_UNTIL]
    late = [row.verdict for row in rows if row.release >= LOST_FROM]
    figures = "; ".join(f"{row.release}: regained {row.regained}, {row.verdict}" for row in rows)
    if not early or not late:
        return Claim(claim, OPEN, figures or "needs release times up to 400 and from 500 on")
    if "does not" in early or "recovers" in late:
        return Claim(claim, NO, figures)
    whole = all(v == "recovers" for v in early) and all(v == "does not" for v in late)
    return Claim(claim, YES if whole else OPEN, figures)
