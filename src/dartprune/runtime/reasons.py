"""Why less was left out, or left unread, than was asked: from what was counted, never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dartprune.method import Method
from dartprune.runtime.slots import Slot, State

PAUSED, RELEASED, RELEARN, START, SHORT, ASKED = CAUSES = "paused", "released", "relearn", "start", "short", "asked"
_NEAR = 0.005  # a share that lies so little under what was asked needs no reason


def why_dense(slot: Slot, method: Method, *, paused: bool) -> int:
    """The number among `CAUSES` of what keeps a sequence's next token dense."""
    if paused:
        return CAUSES.index(PAUSED)
    if slot.sparsity == 0:
        return CAUSES.index(ASKED)
    if slot.state is State.RELEASED:
        return CAUSES.index(RELEASED)
    if slot.dense_left:
        return CAUSES.index(RELEARN)
    return CAUSES.index(START if slot.decoded < method.start else SHORT)


@dataclass
class StepCounts:
    """Decode forwards of a run.

    all: how many.  mixed: with dense sequences beside pruned ones, so that all weights were read.  by_rows: that read
    the chosen rows alone.  faster_dense: pruned, but run dense with masks because that was measured to be faster.
    most_lines: sequences of the largest that read rows.  seconds: host time of all; timed: of how many that is known.
    """

    all: int = 0
    mixed: int = 0
    by_rows: int = 0
    faster_dense: int = 0
    most_lines: int = 0
    timed: int = 0
    seconds: float = field(default=0.0)


def for_sparsity(
    method: Method, realised: float, pruned: int, dense: int, share: float, causes: Mapping[str, int]
) -> list[str]:
    """Why the realised sparsity is under the one asked for.

    Args:
        method: that was asked.
        realised: sparsity of all decoded tokens.
        pruned: tokens.
        dense: tokens.
        share: of the FFN that the pruned ones left out, on average.
        causes: dense tokens by `CAUSES`.
    """
    if not method.prunes or realised > method.sparsity - _NEAR or not pruned + dense:
        return []
    said = {
        PAUSED: "inside run.dense()",
        RELEASED: "after a release",
        RELEARN: "to learn anew",
        START: f"at the start, where {method.start} are to stay dense",
        ASKED: "of sequences that asked for no pruning",
        SHORT: f"until {method.least_traced} tokens were traced: the prompt was too short for masks",
    }
    reasons = []
    if dense:
        parts = ", ".join(f"{count} {said[cause]}" for cause, count in causes.items() if count)
        reasons.append(f"{dense} of {dense + pruned} decoded tokens were dense: {parts}")
    if pruned and share < method.sparsity - _NEAR:
        reasons.append(f"pruned tokens left out {share:.3f} of the FFN: the budget or the scores keep more")
    return reasons


def for_bytes(realised: float, saved: float, steps: StepCounts, replays: int) -> list[str]:
    """Why fewer bytes were saved than neurons were left out, where rows can be read at all."""
    reasons = []
    if steps.faster_dense:
        dense, pruned = steps.faster_dense, steps.faster_dense + steps.by_rows
        reasons.append(f"{dense} of {pruned} pruned steps ran dense with masks: faster for so many neurons")
    if saved > realised - _NEAR:
        return reasons
    if steps.mixed:
        reasons.append(
            f"{steps.mixed} of {steps.all} steps had dense sequences beside pruned ones, so all weights were read"
        )
    if steps.most_lines > 1:
        reasons.append(
            f"steps of {steps.most_lines} sequences read every neuron that any of them uses, each keeps its own"
        )
    if replays:
        reasons.append(f"{replays} replays read the gate and up weights of all layers once each")
    return reasons
