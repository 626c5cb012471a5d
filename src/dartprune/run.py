"""Run: everything live while a pruner is attached to one model."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dartprune.errors import UserError
from dartprune.method import Method
from dartprune.model.apart import apart
from dartprune.model.attached import claim, claimed, release
from dartprune.model.caches import cache_of
from dartprune.model.changes import Changes
from dartprune.model.families import Decoder, describe
from dartprune.model.layer_site import sites_of
from dartprune.model.lookup import core_of
from dartprune.model.model_site import model_site
from dartprune.model.patch import Refuses
from dartprune.model.rows import Phase
from dartprune.model.step import own_step
from dartprune.report import Event, Report
from dartprune.runtime.account import Account
from dartprune.runtime.build import LiveParts, build
from dartprune.runtime.events import Events
from dartprune.runtime.forward import Forwards
from dartprune.runtime.invariance import make_invariant
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.masks import Masks
from dartprune.runtime.model_hooks import LiveModel
from dartprune.runtime.sequences import Sequences
from dartprune.runtime.slot_pool import SlotPool
from dartprune.runtime.slots import Detection, LoggedEvent, Slot, State
from dartprune.runtime.tokens import Tokens
from dartprune.runtime.trace import MeanImpact
from dartprune.runtime.whole_steps import WholeSteps
from dartprune.runtime.windows import Detectors
from dartprune.selectors.sketches import Progress

UNKNOWN_TRANSFORMERS = (5, 25)  # the first release that is not supported


class Run(Refuses):
    """A pruner at work on one model. Made by `Pruner.attach` or by a `with` block; ended by `detach`.

    sequences: what a loop needs that moves lines between caches itself.
    """

    def __init__(
        self, method: Method, model: nn.Module, *, backend: str = "auto", progress: Progress | None = None
    ) -> None:
        """Attach. Raises ValueError or TypeError, with the model untouched, for what cannot be pruned."""
        began = time.perf_counter()
        self.method = method
        check_transformers(transformers.__version__)
        with apart():
            decoder = describe(model)
            self._core = core_of(model)
            if self._core.training:
                raise UserError("the model is in training mode: call model.eval() before attaching")
            self._attached = False
            self._callbacks: list[Callable[[Event], None]] = []
            claim(self._core, method.name, self)
            try:
                self._parts = parts = build(method, self._core, decoder, backend, progress)
                try:
                    self._connect(parts, decoder)
                    self._install()
                except BaseException:
                    parts.layout.undo()
                    raise
            except BaseException:
                release(self._core)
                raise
        compiling = self._parts.preparation.seconds
        self._account.seconds["compiling"] = compiling
        self._account.seconds["attaching"] = time.perf_counter() - began - compiling

    def _connect(self, parts: LiveParts, decoder: Decoder) -> None:
        """The loop: forwards, the tokens they gave, the events that follow, the masks that those make."""
        method, refresh = self.method, self.method.refresh
        recent = refresh.replay_tokens // method.detector.window
        self._account = Account(method, parts)
        self._masks = Masks(method, parts.layers, parts.counters, parts.facts)
        self._events = Events(method, self._masks, self._announce)
        self._tokens = Tokens(method, parts.counters, Detectors(parts.windows, refresh.settle_tokens, recent))
        self._forwards = Forwards(method, parts.layers, self._tokens, self._events, parts.spending)
        self._pool = SlotPool(parts.holders, self._new_slot, self._account.close)
        self._sites = sites_of(self._core, decoder)
        self._door = model_site(self._core)
        changes = Changes(self._core, self._sites, self._door, [layer.backend.gathers for layer in parts.layers])
        self._live = LiveModel(
            method,
            self._core,
            parts.layers,
            self._pool,
            self._forwards,
            self._account,
            self._masks,
            changes,
            parts.facts,
        )
        self._step = own_step(self._core, decoder.layers, prunes=method.prunes)
        self._whole = WholeSteps(parts.layers, self._live, self._door, parts.spending, prunes=method.prunes)
        with parts.preparation("the decode step"):
            self._step.prepare(self._whole.example())
        self._account.step = lambda steps: self._step.said(self._whole.steps, steps)
        self.sequences = Sequences(method, self._pool, self._masks, self._events, self._account, self._live.state)

    def _install(self) -> None:
        try:
            self._step.install(self._whole)
            if self.method.prunes:
                for site, layer in zip(self._sites.layers, self._parts.layers, strict=True):
                    site.install(layer)
            self._door.install(self._live)
            self._attached = True
        finally:
            if not self._attached:
                self._remove()

    def _remove(self) -> None:
        kept = self._door.remove()
        for site in self._sites.layers:
            kept += site.remove()
        kept += self._step.remove()
        for where in kept:
            self._account.note(f"{where} was patched by somebody else while attached; that was left in place")
        self._parts.layout.undo()
        for layer in self._parts.layers:
            layer.weights = "the run is detached"  # no view of ours keeps the memory of the weights

    # ---- what the user calls

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        if not self._attached:
            return
        began = time.perf_counter()
        with self._live.lock, apart():
            self._attached = False
            self._live.settle()
            self._forwards.abort()
            self._pool.release()
            self._remove()
            release(self._core)
        self._account.seconds["detaching"] = time.perf_counter() - began

    def report(self) -> Report:
        """What happened so far; also after `detach`."""
        with self._live.state, apart():
            if self._live.lock.acquire(blocking=False):  # else another thread is in the middle of a text
                try:
                    self._live.settle()
                    self._pool.sweep()
                finally:
                    self._live.lock.release()
            self._account.seconds |= {"detecting": self._tokens.seconds, "refreshing": self._events.seconds}
            states = {id(layer.state): layer.state for layer in self._parts.layers}
            self._account.seconds["tracing"] = sum(state.tracing_seconds for state in states.values())
            self._account.refresh_flops, self._account.replays = self._masks.flops, self._masks.replays
            self._account.seconds["decoding"] = self._account.steps.seconds
            return self._account.report(list(self._pool.live.values()))

    def __repr__(self) -> str:
        if "_live" not in vars(self):
            return f"<Run of {self.method.name}: not attached>"
        state = ("paused" if self._live.phases.paused else "attached") if self._attached else "detached"
        so_far = self._account.report(list(self._pool.live.values()))
        decoded = so_far.dense_tokens + so_far.pruned_tokens
        what = f"Run of {self.method.name} on {type(self._core).__name__}"
        return f"<{what}: {state}, {decoded} tokens decoded, {so_far.pruned_tokens} of them pruned>"

    @contextmanager
    def phase(self, phase: str, slots: Sequence[int] | None = None) -> Iterator[None]:
        """Say what the tokens of direct `model(...)` calls of this thread are; `generate()` knows by itself.

        Args:
            phase: `prefill` for given text (dense and traced), `decode` for new tokens that are known to stay (pruned
                with the masks made from what came before the call; events act after it).
            slots: for a cache that the run has not seen grow: slots of its lines, from `slots_of` or `sequences`.

        Raises:
            ValueError: unknown phase.
        """
        if phase not in ("prefill", "decode"):
            raise UserError(f"unknown phase {phase!r}: write 'prefill' or 'decode'")
        with self._live.phases.say((Phase(phase), tuple(slots) if slots is not None else None)):
            yield

    def make_batch_invariant(self) -> str | None:
        """From now on a decoded token has the same bits alone and in a batch of any size; or why that cannot be.

        Meant for direct calls of one token a line inside `phase("decode", slots=...)`, in forwards that hold either
        sequences that are pruned or others (`sequences.will_prune` tells), on a CPU, in bf16 or fp16, for models of
        Llama's kind with the cpu backend. Prompts are as they are read: one by one they are the same too. Such steps
        are slower from some five sequences on.

        Returns:
            None, or the reason why this model cannot be decoded so; nothing is changed then.
        """
        with self._live.state, apart():
            return make_invariant(self._core, self._step, self._parts.layers, self._forwards, self._events)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """Read given text dense and traced, without a `phase`; no logits are made but those of the last position.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T] of 0 and 1, where lines are padded on the left; None: all tokens count.
            inputs: further arguments of the model's forward, such as a cache to read on.

        Returns:
            the cache, to decode on with `run.phase("decode")` or `generate()`.
        """
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if "logits_to_keep" in inspect.signature(self._core.forward).parameters:
            inputs.setdefault("logits_to_keep", 1)
        with self.phase("prefill"):
            return cache_of(self._core(input_ids=input_ids, use_cache=True, **inputs))

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Pause pruning: inside, the model is the plain one; decoded tokens of known sequences count as dense.

        Reaches this thread and threads that are started inside the block (a `generate()` that feeds a streamer); others
        that run already go on as they are.
        """
        with self._live.phases.pause():
            yield

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes that each live sequence holds, beside its cache."""
        return sum(holder.bytes_per_slot() for holder in self._parts.holders)

    @property
    def layers(self) -> list[LiveLayer]:
        """What the run holds of each layer, for extensions and tests: trace, selection, ring, backend, selector."""
        return self._parts.layers

    def on_event(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with each Event as it happens (this reads the event's figures from the device)."""
        self._callbacks.append(callback)

    def slots_of(self, cache: Any) -> tuple[int, ...]:
        """The slots of a cache's lines; ValueError if the run does not know it."""
        ids = self._pool.of(cache)
        if ids is None:
            raise UserError("this cache was not filled inside the block, so it has no slots yet")
        return ids

    def quiet_tokens(self, slots: Sequence[int], most: int) -> int:
        """How many tokens these slots may decode in one forward so that no mask changes inside it, 1 to `most`.

        Given tokens that are decoded in blocks of that many see the masks that they would see one by one.
        """
        return self._events.quiet_tokens([self._pool.live[slot] for slot in slots], most)

    def selection(self, slot: int) -> list[Tensor | None]:
        """Kept neurons of each layer for a slot, int32 [k_l] on the layer's device; None where nothing is pruned.

        With a token selector these are the candidates, among which each token finds its own.
        """
        keep = self._pool.live[slot].masks.keep
        if keep is None:
            return [None] * len(self._parts.layers)
        return [
            layer.selection.kept(slot, count).clone() for layer, count in zip(self._parts.layers, keep, strict=True)
        ]

    def impact(self, slot: int) -> list[tuple[float, float]]:
        """Mean impact terms of each layer's FFN on a slot's traced tokens: `1 - cos(y, z)` and `|z - y| / |y|`.

        Raises:
            ValueError: a method whose masks do not follow from the context: it does not measure them.
        """
        if not self.method.uses_context:
            raise UserError(f"{self.method.name}: its budget needs no impact of the layers, so none is measured")
        means = [MeanImpact.of(layer.trace.impact[slot]) for layer in self._parts.layers]
        return [(float(mean.angle), float(mean.change)) for mean in means]

    def scores(self, slot: int) -> list[Tensor]:
        """The score of every neuron as a slot's trace stands now, float32 [I] of each layer on the layer's device."""
        with apart():
            return [self._masks.scores(layer, [self._pool.live[slot]])[0].clone() for layer in self._parts.layers]

    def _new_slot(self, slot: int, sequence: int) -> Slot:
        state = State.LEARNING if self.method.prunes else State.DENSE
        return Slot(slot, sequence, state, Detection(self.method.detector.build()), self.method.least_traced)

    def _announce(self, logged: LoggedEvent) -> None:
        if self._callbacks:
            event = logged.told()
            for callback in self._callbacks:
                callback(event)


def check_transformers(version: str) -> None:
    """ValueError for a release of transformers that nobody tried: doors that moved would leave a model unpruned."""
    if tuple(map(int, version.split(".")[:2])) >= UNKNOWN_TRANSFORMERS:
        raise UserError(
            f"transformers {version} is newer than this version of dartprune knows, and might be left unpruned: "
            f"pip install 'transformers<{'.'.join(map(str, UNKNOWN_TRANSFORMERS))}', or a newer dartprune"
        )


def run_of(model: nn.Module) -> Run | None:
    """The run that a model is attached to; None where it is free. TypeError for what is no transformers model."""
    held: Run | None = claimed(core_of(model))
    return held


def detach(model: nn.Module) -> None:
    """Detach whatever run a model is attached to, also where its handle was lost; nothing happens if there is none.

    Raises:
        TypeError: no transformers model.
    """
    run = run_of(model)
    if run is not None:
        run.detach()
