"""From records to answers: a table of arms, recovery after each release, and the paper's three claims."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dartprune.evaluation.arms import ArmAt
from dartprune.evaluation.stats import Interval, difference, interval, regained, share
from dartprune.evaluation.study.detector import CurvePoint, curve, first_events, judge
from dartprune.evaluation.study.results import Record, Results

Array = NDArray[Any]
YES, NO, OPEN = "reproduced", "refuted", "undecided"
RESCUED_UNTIL, LOST_FROM = 400, 500  # the paper's release times, in decoded tokens


@dataclass(frozen=True)
class ArmRow:
    """One arm on one kind of text. Loss over dense in nats; cosines at the leading point; events for one text.

    delay: median tokens from the change to the first event after it, over the texts that have one (noticed of them).
    false_alarms: events for 1,000 decoded tokens, on one-topic text only.
    """

    arm: str
    kind: str
    texts: int
    realised_sparsity: float
    excess_before: Interval
    excess_after: Interval
    to_first_before: float
    to_first_after: float
    to_dense_before: float
    to_dense_after: float
    events_before: float
    events_after: float
    noticed: int
    delay: float | None
    false_alarms: float | None


def arm_rows(results: Results) -> list[ArmRow]:
    """The table of arms."""
    return [_arm_row(results, record) for record in results.records.values()]


def _arm_row(results: Results, record: Record) -> ArmRow:
    s = results.settings
    excess = results.excess(record)
    windows = s.before // s.window
    first, dense = (record.measure(f"cosine_to_{what}", results.lead) for what in ("first_topic", "dense"))
    alarms = record.alarms()
    after = [[at for at in text if at > s.before] for text in alarms]
    delays = [text[0] - s.before for text in after if text]
    return ArmRow(
        arm=record.arm.name,
        kind=record.kind,
        texts=record.texts,
        realised_sparsity=float(record.realised.mean()),
        excess_before=_interval(results, excess[: s.before].mean(0)),
        excess_after=_interval(results, excess[s.before :].mean(0)),
        to_first_before=float(first[:windows].mean()),
        to_first_after=float(first[windows:].mean()),
        to_dense_before=float(dense[:windows].mean()),
        to_dense_after=float(dense[windows:].mean()),
        events_before=sum(at <= s.before for text in alarms for at in text) / record.texts,
        events_after=sum(map(len, after)) / record.texts,
        noticed=len(delays),
        delay=float(np.median(delays)) if delays and record.kind == "change" else None,
        false_alarms=1000 * sum(map(len, alarms)) / (record.texts * s.steps) if record.kind == "control" else None,
    )


def _interval(results: Results, *groups: Array, **options: Any) -> Interval:
    return interval(*groups, resamples=results.settings.resamples, seed=results.settings.seed, **options)


@dataclass(frozen=True)
class Recovery:
    """What a release brought back, beside the mask that stays.

    tokens: over which it is judged, from the release on.  static, released: loss over dense there.  regained: the share
    of static's that is gone.  similar_static, similar, similarity_regained: the same of the cosine with the dense model
    at the leading point.  half_time: tokens until a window's excess is at most half of static's, None: never.
    lost: loss over dense in the text's last tokens.  verdict: recovers, does not, undecided, nothing to regain.
    """

    release: int
    tokens: int
    static: Interval
    released: Interval
    regained: Interval
    similar_static: float
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
    arms = sorted((arm for arm in results.arms if arm.release is not None), key=lambda arm: arm.release or 0)
    return [_recovery(results, arm, frozen) for arm in arms]


def _recovery(results: Results, arm: ArmAt, frozen: Record) -> Recovery:
    s, record = results.settings, results.records[arm.name, "change"]
    assert arm.release is not None
    span = slice(arm.release, min(arm.release + s.horizon, s.steps))
    kept, freed = results.excess(frozen), results.excess(record)
    pair = np.stack((freed[span].mean(0), kept[span].mean(0)))
    # whole windows after the release
    windows = slice(-(-arm.release // s.window), span.stop // s.window)
    alike = [r.measure("cosine_to_dense", results.lead)[windows].mean(0) for r in (record, frozen)]
    gain = _interval(results, pair, statistic=regained)
    static = _interval(results, pair[1])
    blocks = [slice(i, i + s.window) for i in range(arm.release, span.stop - s.window + 1, s.window)]
    fast = [b.stop - arm.release for b in blocks if freed[b].mean() <= kept[b].mean() / 2]
    return Recovery(
        release=arm.release,
        tokens=span.stop - span.start,
        static=static,
        released=_interval(results, pair[0]),
        regained=gain,
        similar_static=float(alike[1].mean()),
        similar=float(alike[0].mean()),
        similarity_regained=_interval(results, 1 - np.stack(alike), statistic=regained),
        half_time=fast[0] if fast else None,
        lost=_interval(results, freed[-min(s.horizon, s.after) :].mean(0)),
        verdict=_recovers(static, gain, s.recovered),
    )


def _recovers(static: Interval, gain: Interval, wanted: float) -> str:
    if static.low <= 0:
        return "nothing to regain"
    if gain.low >= wanted:
        return "recovers"
    return "does not" if gain.high < wanted else "undecided"


def verdict(rows: list[Recovery], wanted: float) -> str:
    """One line: does this model recover, and until when?"""
    if not rows:
        return "No release was tried beside a frozen mask, so nothing can be said about recovery."
    if all(row.verdict == "nothing to regain" for row in rows):
        return "The frozen mask costs no loss that a release could give back."
    good = [row.release for row in rows if row.verdict == "recovers"]
    said = ", ".join(f"{row.release}: {row.regained.value:.0%}" for row in rows)
    tail = f" (share of the loss regained by release time: {said}; wanted: {wanted:.0%})."
    if not good:
        return "The model does not recover at any release time that was tried" + tail
    if all(row.verdict == "recovers" for row in rows):
        return f"The model recovers at every release time that was tried, the last is {max(good)}" + tail
    bad = [row.release for row in rows if row.verdict == "does not"]
    until = max((r for r in good if not bad or r < min(bad)), default=None)
    if until is None:
        return "Recovery follows no order of release times" + tail
    return f"The model recovers when released by decoded token {until}" + tail


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims. answer: reproduced, refuted or undecided.  figures: the numbers behind it."""

    claim: str
    answer: str
    figures: str


def claims(results: Results, rows: list[Recovery]) -> list[Claim]:
    """The paper's three claims for this model."""
    return [_trap(results), _early(results), _rescue(rows)]


def _answer(gains: list[Interval]) -> str:
    if all(gain.low > 0 for gain in gains):
        return YES
    return NO if any(gain.high <= 0 for gain in gains) else OPEN


def _trap(results: Results) -> Claim:
    claim = "A frozen mask traps the model: at a change of topic its trajectory leaves the dense one, and loss rises"
    frozen, s = results.frozen, results.settings
    steady = results.get(frozen.arm.name, "control") if frozen is not None else None
    if frozen is None or steady is None:
        return Claim(claim, OPEN, "needs a frozen arm and one-topic texts")
    cut = s.before // s.window

    def rise(record: Record) -> Array:
        excess = results.excess(record)
        return np.asarray(excess[s.before :].mean(0) - excess[: s.before].mean(0))

    def fall(record: Record) -> Array:
        cosine = record.measure("cosine_to_dense", results.lead)
        return np.asarray(cosine[:cut].mean(0) - cosine[cut:].mean(0))

    loss = _interval(results, rise(frozen), rise(steady), statistic=difference)
    path = _interval(results, fall(frozen), fall(steady), statistic=difference)
    return Claim(
        claim,
        _answer([loss, path]),
        f"loss over dense rises by {loss} nats more than on one-topic text at the same tokens, and the cosine with the "
        f"dense vectors ({results.points[results.lead].name}) falls by {path} more",
    )


def _early(results: Results) -> Claim:
    s = results.settings
    claim = f"The attention shows the change early: within {s.early} tokens, and not by chance"
    frozen = results.frozen
    steady = results.get(frozen.arm.name, "control") if frozen is not None else None
    shown = results.detecting
    if frozen is None or steady is None or shown is None:
        return Claim(claim, OPEN, "needs a frozen arm, one that detects, and one-topic texts")
    detector = shown.arm.pruner.detector.build()

    def hits(record: Record) -> Array:
        first = [at for at in first_events(record.judged, detector) if at is None or at > s.before]
        return np.array([at is not None and at - s.before <= s.early for at in first], dtype=np.float64)

    found = judge(frozen.judged, steady.judged, detector, before=s.before, steps=s.steps, early=s.early)
    changing, chance = hits(frozen), hits(steady)
    if not len(changing) or not len(chance):
        return Claim(claim, OPEN, "the detector fired before the change in every text")
    timely = share(changing)
    gain = _interval(results, changing, chance, statistic=difference)
    answer = NO if gain.high <= 0 or timely.high < 0.5 else OPEN
    if gain.low > 0 and timely.low >= 0.5:
        answer = YES
    delay = "never" if found.delay is None else f"{found.delay:g} tokens"
    return Claim(
        claim,
        answer,
        f"fired within {s.early} tokens in {timely} of {len(changing)} texts, {gain} more than on one-topic text at "
        f"the same place; median delay {delay}; {found.false_alarms:.2f} first alarms for 1,000 tokens of one topic; "
        f"{found.fired_before:.0%} of the texts had fired before the change",
    )


def _rescue(rows: list[Recovery]) -> Claim:
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


def detector_curve(results: Results) -> list[CurvePoint]:
    """Delay against false alarms over thresholds; empty without a frozen arm on both kinds of text."""
    frozen, s = results.frozen, results.settings
    steady = results.get(frozen.arm.name, "control") if frozen is not None else None
    if frozen is None or steady is None or not frozen.judged.shape[0]:
        return []
    window = frozen.arm.pruner.detector.window
    return curve(frozen.judged, steady.judged, window, before=s.before, steps=s.steps, early=s.early)


def neuron_rows(results: Results) -> list[dict[str, Any]]:
    """For each arm and layer: mean neurons added and dropped at an event, and own best neurons kept."""
    out: list[dict[str, Any]] = []
    cut = results.settings.before // results.settings.window
    for record in results.records.values():
        if not record.arm.pruner.prunes:
            continue
        for layer, count in enumerate(results.neurons):
            moved = [(row["added"][layer], row["dropped"][layer]) for row in record.neurons]
            shares = record.overlap[:, :, layer].mean(2)
            out.append(
                {
                    "arm": record.arm.name,
                    "kind": record.kind,
                    "layer": layer,
                    "neurons": count,
                    "events": len(moved),
                    "added": float(np.mean([a for a, _ in moved])) if moved else 0.0,
                    "dropped": float(np.mean([d for _, d in moved])) if moved else 0.0,
                    "first_topic_before": float(shares[:cut, 0].mean()),
                    "second_topic_before": float(shares[:cut, 1].mean()),
                    "first_topic_after": float(shares[cut:, 0].mean()),
                    "second_topic_after": float(shares[cut:, 1].mean()),
                }
            )
    return out


def as_data(value: Any) -> Any:
    """Rows of this file as plain data."""
    if isinstance(value, list):
        return [as_data(item) for item in value]
    return asdict(value)
