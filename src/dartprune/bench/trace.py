"""What tracing adds to the reading of a prompt: unattached, attached but paused, and traced, at several lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.benchmark import timer

from dartprune.bench.models import Subject, prompts
from dartprune.bench.result import Result, Row
from dartprune.bench.stepping import read
from dartprune.bench.timing import Spread, Turns, alternate
from dartprune.errors import UserError
from dartprune.pruner import Pruner
from dartprune.run import Run

ARMS = ("unattached", "attached, paused", "attached, traced")


class LazyRun:
    """Attaches a pruner when an arm needs it, and detaches it when one does not."""

    def __init__(self, model: torch.nn.Module, pruner: Pruner, backend: str) -> None:
        self.model, self.pruner, self.backend = model, pruner, backend
        self._run: Run | None = None

    def on(self) -> Run:
        """The run, attached now if it was not."""
        if self._run is None:
            self._run = self.pruner.attach(self.model, backend=self.backend)
        return self._run

    def off(self) -> None:
        """The model as it is without us."""
        if self._run is not None:
            self._run.detach()
            self._run = None


def check(pruner: Pruner, lengths: Sequence[int], batch: int) -> None:
    """ValueError, before a model is built, for what cannot be measured."""
    if not lengths or min(*lengths, batch) < 1:
        raise UserError(f"prompt and batch must be at least 1, got {list(lengths)} and {batch}")
    if not pruner.prunes:
        raise UserError(f"{pruner.name} traces nothing: there is no overhead to measure; use 'dart'")


@torch.no_grad()
def measure(
    what: Subject,
    pruner: Pruner,
    lengths: Sequence[int] = (128, 512),
    *,
    batch: int = 1,
    turns: int = 5,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Seconds of reading prompts of several lengths.

    Attached but paused (`run.dense()`), a model differs from an unattached one in the layout of its weights alone; the
    rest of the overhead is tracing, by far the most of which the report counts itself.

    Args:
        what: the model.
        pruner: what is attached.
        lengths: tokens of the prompts.
        batch: prompts read together.
        turns: how often the three are measured in turn.
        backend: how the pruned FFN would be computed; it decides the layout.
        progress: told of each length.

    Raises:
        ValueError: a length that is no length, or longer than the context.
    """
    check(pruner, lengths, batch)
    texts = [prompts(what.model, batch, length) for length in lengths]
    held = LazyRun(what.model, pruner, backend)
    rows: list[Row] = []
    notes: list[str] = list(what.notes)
    try:
        for number, tokens in enumerate(texts):
            progress(f"{number + 1} of {len(texts)}: {tokens.shape[1]} tokens")
            rows += _length(what, tokens, held, turns, notes)
    finally:
        held.off()
    settings = what.settings(backend, turns) | {"batch": batch, "prompts": list(lengths), "method": pruner.to_dict()}
    return Result("trace", what.model.device, settings, rows, None, list(dict.fromkeys(notes)))


def _length(what: Subject, tokens: torch.Tensor, held: LazyRun, turns: int, notes: list[str]) -> list[Row]:
    counted: list[float] = []

    def unattached() -> float:
        held.off()
        return _seconds(lambda: read(what.model, tokens, None))

    def paused() -> float:
        run = held.on()
        with run.dense():
            return _seconds(lambda: read(what.model, tokens, None))

    def traced() -> float:
        run = held.on()
        before = run.report().seconds["tracing"]
        seconds = _seconds(lambda: read(what.model, tokens, run))
        counted.append(run.report().seconds["tracing"] - before)
        return seconds

    arms = dict(zip(ARMS, (unattached, paused, traced), strict=True))
    for arm in arms.values():
        arm()
    counted.clear()
    taken = alternate(arms, turns)
    notes += held.on().report().notes
    case = f"{what.name} {what.dtype}, {tokens.shape[0]} x {tokens.shape[1]} tokens"
    return [_row(case, arm, taken, counted) for arm in ARMS]


def _seconds(work: Callable[[], object]) -> float:
    began = timer()
    work()
    return timer() - began


def _row(case: str, arm: str, taken: Turns, counted: list[float]) -> Row:
    plain, paused, seconds = (taken.seconds[name] for name in (ARMS[0], ARMS[1], arm))
    extra: dict[str, float] = {"overhead": taken.spread(arm).median / taken.spread(ARMS[0]).median - 1}
    if arm == ARMS[2]:
        extra["overhead_of_tracing"] = Spread.of(
            [(s - q) / p for s, q, p in zip(seconds, paused, plain, strict=True)]
        ).median
        extra["overhead_of_tracing_as_reported"] = Spread.of(
            [c / p for c, p in zip(counted, plain, strict=True)]
        ).median
    return Row(case, arm, taken.spread(arm), taken.times_as_fast(arm, ARMS[0]), extra=extra)
