"""From the units of a comparison to its figures: means over streams, paired with dense, with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dartprune.evaluation.compare.plan import CHANGING, ONE, Material, Part, Plan
from dartprune.evaluation.compare.tuning import Tuned
from dartprune.evaluation.stats import Interval, interval

RESAMPLES = 2000
LOSS, DIVERGENCE, AGREEMENT = range(3)  # places in a unit's figures of a part


@dataclass(frozen=True)
class Case:
    """One arm on one kind of streams: the sparsity it should reach, the one it was tuned to, and its units."""

    arm: str
    kind: str
    target: float
    tuned: Tuned
    units: Sequence[Mapping[str, Any]]
    bytes_saved: float

    @property
    def streams(self) -> list[Mapping[str, Any]]:
        """What was noted of each stream."""
        return [stream for unit in self.units for stream in unit["streams"]]

    def figures(self, part: str, which: int) -> list[float]:
        """One figure of one part, for each stream."""
        return [float(stream["parts"][part][which]) for stream in self.streams]


@dataclass
class PartOutcome:
    """Figures of the tokens that are scored together; losses and divergences in nats a token.

    over_dense: loss minus the dense model's.  over_versus: loss minus that of the arm named `versus` at the same
    sparsity; None where there is none.  divergence: KL(dense || arm).  agreement: share of tokens whose likeliest
    continuation is the dense one.  events: changes of masks, of one stream.  each_over_dense: `over_dense` stream by
    stream.
    """

    over_dense: Interval
    over_versus: Interval | None
    divergence: Interval
    agreement: Interval
    perplexity: Interval
    events: float
    each_over_dense: list[float]


@dataclass
class Outcome:
    """What one arm did at one sparsity on one kind of streams.

    target: the realised sparsity it is compared at.  nominal: what it was built with.  reached: whether its realised
    sparsity is the target's.  bytes_saved: of single streams on a backend.  short_contexts: streams whose prompt was
    too short to trace.  refreshes: of one stream, settles too.  false_alarms_per_200: events in 200 tokens on one
    topic, None where the topic changes.  noticed: share of the streams with an event after the change.  delay: tokens
    until the first one, median.  ceiling: computes everything to know what it could have left out.  curve: loss over
    dense at each decoded token, mean over streams; None at those that no part holds.
    """

    arm: str
    kind: str
    target: float
    nominal: float
    reached: bool
    realised_sparsity: float
    bytes_saved: float
    dense_tokens: int
    pruned_tokens: int
    short_contexts: int
    refreshes: float
    false_alarms_per_200: float | None
    noticed: float | None
    delay: float | None
    ceiling: bool
    parts: dict[str, PartOutcome]
    curve: list[float | None]
    notes: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """All outcomes, and the settings they came from."""

    outcomes: list[Outcome]
    settings: dict[str, Any]

    def of(self, kind: str, target: float | None = None) -> list[Outcome]:
        """Outcomes of one kind of streams, at one sparsity (dense has 0), or at all."""
        return [o for o in self.outcomes if o.kind == kind and (target is None or o.target == target)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"settings": self.settings, "outcomes": [asdict(outcome) for outcome in self.outcomes]}


def assemble(cases: Sequence[Case], material: Material, plan: Plan) -> Comparison:
    """The figures of all cases; each kind must have a case of the arm `dense`."""
    outcomes = []
    for case in cases:
        dense = next(c for c in cases if c.kind == case.kind and c.arm == "dense")
        versus = [c for c in cases if (c.kind, c.target, c.arm) == (case.kind, case.target, plan.versus)]
        parts = {
            part.name: _part(
                case, dense, versus[0] if versus and case.arm != plan.versus else None, part.name, plan.seed
            )
            for part in material.parts(case.kind, plan)
        }
        _count_events(case, parts, plan)
        outcomes.append(_outcome(case, dense, parts, material.parts(case.kind, plan), plan))
    told = {
        **plan.to_dict(),
        "sparsities": list(plan.sparsities),
        "tolerance": plan.tolerance,
        "versus": plan.versus,
        "domains": material.domains,
        "domains_too_short": material.too_short,
        "separator": material.separator,
        "left_out_after_change": material.left_out,
        "texts": material.digest,
    }
    return Comparison(outcomes, told)


def _part(case: Case, dense: Case, versus: Case | None, part: str, seed: int) -> PartOutcome:
    def draw(values: Sequence[float]) -> Interval:
        return interval(values, resamples=RESAMPLES, seed=seed)

    losses, base = case.figures(part, LOSS), dense.figures(part, LOSS)
    over = [ours - theirs for ours, theirs in zip(losses, base, strict=True)]
    other = versus.figures(part, LOSS) if versus is not None else None
    return PartOutcome(
        over_dense=draw(over),
        over_versus=None if other is None else draw([a - b for a, b in zip(losses, other, strict=True)]),
        divergence=draw(case.figures(part, DIVERGENCE)),
        agreement=draw(case.figures(part, AGREEMENT)),
        perplexity=draw(losses).mapped(math.exp),
        events=0.0,
        each_over_dense=over,
    )


def _count_events(case: Case, parts: dict[str, PartOutcome], plan: Plan) -> None:
    """Events belong to the part whose tokens had been read when they happened."""
    everything = [position for stream in case.streams for position in stream["events"]]
    if case.kind == ONE:
        parts["one topic"].events = len(everything) / plan.count
        return
    before = sum(position <= plan.lengths[0] for position in everything)
    parts["before"].events = before / plan.count
    parts["after"].events = (len(everything) - before) / plan.count


def _outcome(case: Case, dense: Case, parts: dict[str, PartOutcome], scored: Sequence[Part], plan: Plan) -> Outcome:
    streams = case.streams
    firsts = [
        min((p - plan.lengths[0] for p in stream["events"] if p > plan.lengths[0]), default=None) for stream in streams
    ]
    delays = [delay for delay in firsts if delay is not None] if case.kind == CHANGING else []
    sums = [[sum(column) for column in zip(*(unit["losses"] for unit in c.units), strict=True)] for c in (case, dense)]
    over_dense = [(ours - theirs) / plan.count for ours, theirs in zip(*sums, strict=True)]
    return Outcome(
        arm=case.arm,
        kind=case.kind,
        target=case.target,
        nominal=case.tuned.nominal,
        reached=case.tuned.reached,
        realised_sparsity=statistics.fmean(stream["realised"] for stream in streams),
        bytes_saved=case.bytes_saved,
        dense_tokens=sum(stream["dense"] for stream in streams),
        pruned_tokens=sum(stream["pruned"] for stream in streams),
        short_contexts=sum(unit["short"] for unit in case.units),
        refreshes=statistics.fmean(stream["refreshes"] for stream in streams),
        false_alarms_per_200=parts["one topic"].events * 200 / plan.steps if case.kind == ONE else None,
        noticed=len(delays) / plan.count if case.kind == CHANGING else None,
        delay=statistics.median(delays) if delays else None,
        ceiling=any(unit["ceiling"] for unit in case.units),
        parts=parts,
        curve=[over if any(p.first <= at < p.last for p in scored) else None for at, over in enumerate(over_dense)],
        notes=list(dict.fromkeys(note for unit in case.units for note in unit["notes"])),
    )
