"""Finds the nominal sparsity at which an arm's realised sparsity is the wanted one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

HIGHEST = 0.95  # beyond it an arm has nothing left to choose
TRIES = 8


@dataclass(frozen=True)
class Tuned:
    """nominal: what to build the arm with.  realised: what it gave.  reached: whether that is close enough.

    most: the greatest realised sparsity that was seen.
    """

    nominal: float
    realised: float
    reached: bool
    most: float


def tune(
    realised: Callable[[float], float],
    target: float,
    *,
    tolerance: float,
    first: float | None = None,
    highest: float = HIGHEST,
    tries: int = TRIES,
) -> Tuned:
    """Search by proportion, then by secant inside a bracket, halving it where the secant does not help.

    Args:
        realised: nominal sparsity -> realised sparsity; need not be smooth, and is asked once per nominal.
        target: what is wanted.
        tolerance: how far off is close enough.
        first: nominal to begin with; the target itself by default, so that arms that keep their word cost one try.
        highest: greatest nominal that may be tried; never less than the target.
        tries: most evaluations.

    Returns:
        the closest nominal that was tried; for an arm that cannot reach the target the one it was begun with.
    """
    highest = max(highest, target)
    start = target if first is None else first
    known: dict[float, float] = {start: realised(start)}
    low, high = (0.0, 0.0), (highest, float("inf"))  # the value at `highest` is not known yet
    nominal = start
    for _ in range(tries - 1):
        value = known[nominal]
        if abs(value - target) <= tolerance:
            break
        if value < target:
            low = max(low, (nominal, value))
        else:
            high = min(high, (nominal, value))
        if low[0] >= highest:
            break
        nominal = _next(low, high, target)
        if nominal in known:
            break
        known[nominal] = realised(nominal)
    best = min(known, key=lambda n: abs(known[n] - target))
    reached = abs(known[best] - target) <= tolerance
    # an arm that was asked for all it has and stays below is shown as it is, not at its utmost
    nominal = start if not reached and max(known.values()) < target else best
    return Tuned(nominal, known[nominal], reached, max(known.values()))


def _next(low: tuple[float, float], high: tuple[float, float], target: float) -> float:
    """A nominal between two brackets whose realised sparsities lie below and above the target."""
    if high[1] == float("inf"):
        # only values below are known: realised sparsity is nearly a constant share of the nominal one
        guess = low[0] * target / low[1] if low[1] > 0 else high[0]
        return min(guess, high[0])
    (a, fa), (b, fb) = low, high
    guess = a + (b - a) * (target - fa) / (fb - fa)
    margin = 0.05 * (b - a)
    return guess if a + margin <= guess <= b - margin else (a + b) / 2
