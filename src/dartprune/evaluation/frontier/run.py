"""Measures the frontier: every format of the weights alone and with each method, all against the model in bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import dartprune
from dartprune.errors import UserError
from dartprune.evaluation.arms import Arm, arm, check_arms
from dartprune.evaluation.compare.plan import CHANGING, Material, Plan, material
from dartprune.evaluation.compare.run import settings_digest
from dartprune.evaluation.forced import forced_losses
from dartprune.evaluation.frontier.formats import BASE, Load, Loaded, check_formats, has_rows, loaded
from dartprune.evaluation.stats import Interval, interval
from dartprune.evaluation.texts import batch
from dartprune.model.families import describe
from dartprune.model.sizes import fingerprint
from dartprune.pruner import Dense, Pruner
from dartprune.refresh import Action
from dartprune.reporting.journal import Journal
from dartprune.reporting.progress import Watcher

DENSE = "dense"
RESAMPLES = 2000
PARTS = ("before", "after")
ALIKE = 1.005  # bits that differ by less are the same
REPLAYS = (Action.REPLAY.value, Action.SETTLE.value)


@dataclass
class Measured:
    """One format of the weights, with a method or without; losses in nats a token over the bfloat16 model.

    bits: read for each FFN weight and decoded token, scales, selectors and replays counted.  sparsity: asked for.
    realised: dense tokens counted.  loss: over all scored tokens.  best: nothing that reads as little loses less.
    """

    weights: str
    method: str
    sparsity: float
    realised: float
    bits: float
    ceiling: bool
    loss: Interval
    parts: dict[str, Interval]
    best: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class Frontier:
    """All points, the settings they came from, and what could not be measured and why."""

    points: list[Measured]
    settings: dict[str, Any]
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        points = [asdict(point) for point in self.points]
        return {"settings": self.settings, "points": points, "left_out": self.left_out}


def frontier(
    source: str | None,
    documents: Mapping[str, Sequence[str]],
    plan: Plan,
    *,
    formats: Sequence[str],
    methods: Sequence[str],
    journal: Callable[[dict[str, Any]], Journal] | None = None,
    backend: str = "auto",
    watcher: Watcher | None = None,
    read: Load | None = None,
) -> Frontier:
    """Decode streams that change their topic, teacher-forced, with each format and each method on it.

    Args:
        source: of the model, as `dartprune.loading.load` takes it; it is read anew for each format.
        documents: texts of each domain, see `dartprune.evaluation.texts.read_texts`.
        plan: of the streams; its sparsities are asked of each method.
        formats: see `dartprune.evaluation.frontier.formats.check_formats`; bfloat16 is always measured.
        methods: arms by name, on formats whose rows can be left unread.
        journal: makes the journal from what the points depend on, for work that can be interrupted.
        backend: how the pruned FFN is computed.
        watcher: told of the decoded steps.
        read: instead of `dartprune.loading.load`.

    Raises:
        ValueError: unknown formats or methods, or what loading and cutting the texts raise.
    """
    names = check_formats(formats)
    check_arms(methods, calibrated=False)
    arms = [arm(name) for name in methods if name != DENSE]
    base = loaded(source, BASE, read)
    given = material(documents, base.tokenizer, plan)
    told = {
        "dartprune": dartprune.__version__,
        "model": fingerprint(base.model),
        "texts": given.digest,
        **plan.to_dict(),
        "backend": backend,
        "counted": "replays",  # since bits count them
    }
    work = _Work(given, plan, Journal(None, told) if journal is None else journal(told), backend, watcher)
    cases = {name: _cases(name, arms, plan) for name in names}
    work.expect(sum(len(each) for each in cases.values()))
    units = [(case, work.unit(base, case)) for case in cases[BASE]]
    del base
    for name in names[1:]:
        form = None if all(case.key in work.journal for case in cases[name]) else loaded(source, name, read)
        if form is not None and material(documents, form.tokenizer, plan).streams != given.streams:
            raise UserError(f"{name}: its tokenizer cuts the texts otherwise, so that losses cannot be compared")
        units += [(case, work.unit(form, case)) for case in cases[name]]
        form = None  # one model at a time
    reference = units[0][1]
    points = [_point(case, unit, reference, plan) for case, unit in units if "why" not in unit]
    left_out = [
        f"{case.method} at {case.sparsity:g} on {case.weights}: {unit['why']}" for case, unit in units if "why" in unit
    ]
    settings = told | {"domains": given.domains, "left_out_after_change": given.left_out, "formats": names}
    settings |= {"torch": torch.__version__, "methods": [a.name for a in arms], "sparsities": list(plan.sparsities)}
    return Frontier(_marked(points), settings, left_out)


@dataclass(frozen=True)
class _Case:
    """What is measured at one point; pruner: None for the format alone."""

    weights: str
    method: str
    sparsity: float
    pruner: Pruner

    @property
    def key(self) -> str:
        """In the journal."""
        return f"{self.weights}/{self.method}/{settings_digest(self.pruner)}/{self.sparsity!r}"


def _cases(name: str, arms: Sequence[Arm], plan: Plan) -> list[_Case]:
    alone = _Case(name, DENSE, 0.0, Dense())
    if not has_rows(name):
        return [alone]
    return [alone, *(_Case(name, a.name, share, a.build(share)) for a in arms for share in plan.sparsities)]


class _Work:
    """Computes units, or finds them in the journal."""

    def __init__(self, material: Material, plan: Plan, journal: Journal, backend: str, watcher: Watcher | None) -> None:
        self.journal, self._backend, self._watcher = journal, backend, watcher
        drawn, self._plan = material.streams[CHANGING], plan
        self._batches = [batch(drawn[first : first + plan.batch]) for first in range(0, plan.count, plan.batch)]
        self._parts = material.parts(CHANGING, plan)

    def expect(self, units: int) -> None:
        """Announce work."""
        if self._watcher is not None:
            self._watcher.expect(units * len(self._batches) * self._plan.steps)

    def unit(self, form: Loaded | None, case: _Case) -> dict[str, Any]:
        """Losses of each part of each stream and what was realised; or why it cannot be had."""
        label, done = f"{case.weights}, {case.method} at {case.sparsity:g}", 0

        def step(tokens: int) -> None:
            nonlocal done
            done += tokens
            if self._watcher is not None:
                self._watcher.step(label, tokens)

        if case.key not in self.journal:
            assert form is not None
            self.journal.add(case.key, self._measured(form, case, step))
        step(len(self._batches) * self._plan.steps - done)  # where the journal had it, or it cannot be had
        return dict(self.journal[case.key])

    def _measured(self, form: Loaded, case: _Case, step: Callable[[int], None]) -> dict[str, Any]:
        streams, notes, ceiling = [], [], False
        for tokens in self._batches:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    losses, report = forced_losses(
                        form.model, case.pruner, tokens, self._plan.prompt,
                        block=None, backend=self._backend, progress=step,
                    )  # fmt: skip
                except UserError as error:
                    if case.method == DENSE:
                        raise
                    return {"why": str(error)}
            ceiling = report.ceiling
            notes += [*report.notes, *(str(warning.message) for warning in caught)]
            for line, told in enumerate(report.sequences):
                means = [float(losses[line, part.first : part.last].double().mean()) for part in self._parts]
                replays = sum(event.kind in REPLAYS for event in told.events)
                streams.append({"losses": means, "realised": told.realised_sparsity, "replays": replays})
        matrices = describe(form.model).layers[0].matrices
        return {
            "bits": form.bits,
            "replayed": (matrices - 1) / matrices,  # a replay reads gate and up
            "streams": streams,
            "ceiling": ceiling,
            "notes": list(dict.fromkeys(notes)),
        }


def _point(case: _Case, unit: Mapping[str, Any], reference: Mapping[str, Any], plan: Plan) -> Measured:
    pairs = zip(unit["streams"], reference["streams"], strict=True)
    over = [[ours - base for ours, base in zip(a["losses"], b["losses"], strict=True)] for a, b in pairs]
    change = plan.lengths[0] - plan.prompt
    share = change / plan.steps  # of the scored tokens, to a few after the join

    def draw(values: Sequence[float]) -> Interval:
        return interval(values, resamples=RESAMPLES, seed=plan.seed)

    realised = sum(stream["realised"] for stream in unit["streams"]) / len(unit["streams"])
    replays = sum(stream["replays"] for stream in unit["streams"]) / len(unit["streams"]) / plan.steps
    return Measured(
        weights=case.weights,
        method=case.method,
        sparsity=case.sparsity,
        realised=realised,
        bits=unit["bits"] * (1.0 if unit["ceiling"] else 1 - realised + replays * unit["replayed"]),
        ceiling=unit["ceiling"],
        loss=draw([share * before + (1 - share) * after for before, after in over]),
        parts={name: draw([each[place] for each in over]) for place, name in enumerate(PARTS)},
        notes=list(unit["notes"]),
    )


def _marked(points: list[Measured]) -> list[Measured]:
    """Mark those that no other point beats in both bits and loss; a ceiling is no competitor."""
    rivals = [point for point in points if not point.ceiling]
    for point in rivals:
        point.best = not any(
            other.bits <= ALIKE * point.bits and other.loss.value < point.loss.value
            for other in rivals
            if other is not point
        )
    return points
