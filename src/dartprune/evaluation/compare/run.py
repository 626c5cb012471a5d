"""Compares arms at equal realised sparsity: the same streams, the same teacher-forced decoding, paired with dense.

The work is cut into units (one arm, one nominal sparsity, one batch of streams) that a journal keeps, so that a
comparison that was killed goes on where it was, and one that is asked for another arm computes that arm alone.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dartprune
from dartprune.errors import UserError
from dartprune.evaluation.arms import Arm, check_once
from dartprune.evaluation.arms import arm as arm_named
from dartprune.evaluation.compare.measures import BatchMeasures, Reference, check_masks, measure, reference
from dartprune.evaluation.compare.outcomes import Case, Comparison, assemble
from dartprune.evaluation.compare.plan import Material, Part, Plan
from dartprune.evaluation.compare.tuning import Tuned, tune
from dartprune.evaluation.forced import forced_losses
from dartprune.evaluation.texts import batch
from dartprune.model.sizes import fingerprint
from dartprune.pruner import Pruner
from dartprune.reporting.journal import Journal
from dartprune.reporting.progress import Watcher

HELD = 2 << 30  # bytes of dense distributions kept between units; the rest is computed again for every unit
BACKEND = "masked"  # quality is the same on every backend, and masks are the quickest way through a batch


def compare(
    model: nn.Module,
    arms: Sequence[Arm],
    material: Material,
    plan: Plan,
    *,
    journal: Journal | None = None,
    backend: str = "auto",
    watcher: Watcher | None = None,
) -> Comparison:
    """Run every arm at every sparsity on every kind of streams.

    Args:
        model: a decoder in evaluation mode, not attached.
        arms: what is compared, see `dartprune.evaluation.arms`; dense is always added.
        material: the streams, see `dartprune.evaluation.compare.plan.material`.
        plan: the settings they were made with.
        journal: made with `journal_settings`, for work that can be interrupted; None keeps everything in memory.
        backend: whose bytes are counted; quality is measured with masks.
        watcher: told of the decoded steps.

    Raises:
        ValueError: two arms of one name, an arm that does not prune though it says so, or dense distributions that
            would not fit.
    """
    check_once([a.name for a in arms])
    if not any(a.prunes for a in arms):
        raise UserError("there is nothing to compare: name an arm that prunes beside dense")
    journal = Journal(None, {}) if journal is None else journal
    work = _Work(model, material, plan, journal, backend, watcher)
    pruning = [a for a in arms if a.prunes]
    batches = -(-plan.count // plan.batch)
    each = batches + 1  # and one stream alone, for the bytes saved
    work.expect(len(plan.kinds) * plan.steps * (2 * batches + len(pruning) * len(plan.sparsities) * each))
    cases: list[Case] = []
    for kind in plan.kinds:
        cases.append(work.dense(kind))
        cases += [work.case(kind, a, target) for target in plan.sparsities for a in pruning]
        work.forget()
    comparison = assemble(cases, material, plan)
    versions = {"dartprune": dartprune.__version__, "torch": torch.__version__}
    comparison.settings |= {"weights": fingerprint(model), **versions}
    return comparison


def journal_settings(model: nn.Module, material: Material, plan: Plan, backend: str) -> dict[str, Any]:
    """What the units of a comparison depend on; arms, sparsities and kinds may change between two calls."""
    return {
        "dartprune": dartprune.__version__,
        "model": fingerprint(model),
        "texts": material.digest,
        **plan.to_dict(),
        "backend": backend,
    }


class _Work:
    """Computes units, or finds them in the journal."""

    def __init__(
        self, model: nn.Module, material: Material, plan: Plan, journal: Journal, backend: str, watcher: Watcher | None
    ) -> None:
        self.model, self.material, self.plan = model, material, plan
        self.journal, self.backend, self.watcher = journal, backend, watcher
        self.dtype = next(model.parameters()).dtype
        self._left = 0  # steps that were announced and are not done
        self._told: set[str] = set()  # finished units that the watcher knows of
        self._references: dict[int, Reference] = {}
        self._firsts = list(range(0, plan.count, plan.batch))
        vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0))
        needed = min(plan.batch, plan.count) * plan.steps * vocabulary * 2
        if needed > HELD:
            raise UserError(
                f"the dense distributions of a batch of {plan.batch} streams take {needed / 1e9:.1f} GB, more than "
                f"{HELD / 1e9:.1f} GB: a batch of {max(1, plan.batch * HELD // needed)} would do, or shorter streams"
            )

    def expect(self, steps: int) -> None:
        """Announce work."""
        self._left += steps
        if self.watcher is not None:
            self.watcher.expect(steps)

    def _step(self, label: str, steps: int) -> None:
        if self._left < steps:  # tuning takes more than was announced
            self.expect(steps - self._left)
        self._left -= steps
        if self.watcher is not None:
            self.watcher.step(label, steps)

    def _count_once(self, key: str, label: str, steps: int) -> None:
        """A unit is in the journal: it counts as done once, however often it is asked for."""
        if key not in self._told:
            self._told.add(key)
            self._step(label, steps)

    def forget(self) -> None:
        """Let the dense distributions of the last kind go."""
        self._references.clear()

    def dense(self, kind: str) -> Case:
        """The plain model, decoded and compared with itself like any arm."""
        units = self._all(kind, arm_named("dense"), 0.0)
        return Case("dense", kind, 0.0, Tuned(0.0, 0.0, True, 0.0), units, 0.0)

    def case(self, kind: str, arm: Arm, target: float) -> Case:
        """One arm at one realised sparsity: tuned on the first batch, verified on all."""
        tolerance = self.plan.tolerance
        first = tune(lambda nominal: _realised([self._unit(kind, arm, nominal, 0)]), target, tolerance=tolerance / 2)
        hopeless = first.most < target - tolerance
        tuned = tune(
            lambda nominal: _realised(self._all(kind, arm, nominal)),
            target,
            tolerance=tolerance,
            first=first.nominal,
            tries=1 if hopeless else 4,
        )
        units = self._all(kind, arm, tuned.nominal)
        return Case(arm.name, kind, target, tuned, units, self._saved(kind, arm, tuned.nominal))

    def _all(self, kind: str, arm: Arm, nominal: float) -> list[dict[str, Any]]:
        return [self._unit(kind, arm, nominal, number) for number in range(len(self._firsts))]

    def _unit(self, kind: str, arm: Arm, nominal: float, number: int) -> dict[str, Any]:
        pruner = arm.build(nominal)
        key = f"{kind}/{arm.name}/{settings_digest(pruner)}/{nominal!r}/{number}"
        label = f"{kind}, {arm.name} at {nominal:.3f}"
        if key in self.journal:
            self._count_once(key, label, self.plan.steps)
        else:
            dense = self._reference(kind, number)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                measured = measure(
                    self.model, pruner, self._tokens(kind, number), self.plan.prompt, dense,
                    backend=BACKEND, progress=lambda n: self._step(label, n), block=self.plan.block,
                )  # fmt: skip
            check_masks(arm.name, nominal, measured, dense, self.dtype)
            remarks = list(dict.fromkeys(str(warning.message) for warning in caught))
            self.journal.add(key, _unit_data(measured, self.material.parts(kind, self.plan), remarks))
            self._told.add(key)
        return dict(self.journal[key])

    def _saved(self, kind: str, arm: Arm, nominal: float) -> float:
        pruner = arm.build(nominal)
        key = f"{kind}/{arm.name}/{settings_digest(pruner)}/{nominal!r}/bytes"
        row = batch(self.material.streams[kind][:1])
        if key not in self.journal:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the same as those of the batches
                share = forced_losses(self.model, pruner, row, self.plan.prompt, backend=self.backend)[1].bytes_saved
            self.journal.add(key, share)
        self._count_once(key, f"{kind}, {arm.name} alone", self.plan.steps)
        return float(self.journal[key])

    def _tokens(self, kind: str, number: int) -> Tensor:
        first = self._firsts[number]
        return batch(self.material.streams[kind][first : first + self.plan.batch])

    def _reference(self, kind: str, number: int) -> Reference:
        if number in self._references:
            return self._references[number]
        tokens = self._tokens(kind, number)
        told = f"{kind}, dense distributions"
        made = reference(self.model, tokens, self.plan.prompt, lambda n: self._step(told, n), block=self.plan.block)
        if sum(held.nbytes for held in self._references.values()) + made.nbytes <= HELD:
            self._references[number] = made
        return made


def settings_digest(pruner: Pruner) -> str:
    """Short name of a pruner's settings: a unit of other settings under the same arm's name is another unit."""
    return f"{zlib.crc32(json.dumps(pruner.to_dict(), sort_keys=True).encode()):08x}"


def _realised(units: Sequence[dict[str, Any]]) -> float:
    shares = [stream["realised"] for unit in units for stream in unit["streams"]]
    return float(sum(shares) / len(shares))


def _unit_data(measured: BatchMeasures, parts: Sequence[Part], remarks: list[str]) -> dict[str, Any]:
    """A unit as plain data: means of each part of each stream, and the loss at each token summed over streams."""
    streams = []
    for line, told in enumerate(measured.report.sequences):
        figures = {}
        for part in parts:
            at = (line, slice(part.first, part.last))
            figures[part.name] = [
                float(t[at].double().mean()) for t in (measured.losses, measured.divergence, measured.agreement)
            ]
        streams.append(
            {
                "parts": figures,
                "realised": told.realised_sparsity,
                "dense": told.dense_tokens,
                "pruned": told.pruned_tokens,
                # a settle follows a replay by itself and notices nothing
                "events": [event.position for event in told.events if event.kind != "settle"],
                "refreshes": len(told.events),
            }
        )
    return {
        "streams": streams,
        "losses": measured.losses.double().sum(0).tolist(),
        "short": measured.short,
        "ceiling": measured.report.ceiling,
        "notes": [*measured.report.notes, *remarks],
    }
