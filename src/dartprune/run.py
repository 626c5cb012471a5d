"""Run: everything live while a pruner is attached to one model."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.account import Account
from dartprune.method import Method
from dartprune.model.attach import Refuses, claim, release, sites_of
from dartprune.model.entry import model_site
from dartprune.model.families import describe
from dartprune.model.rows import Phase, Rows
from dartprune.model.taking import core_of
from dartprune.pool import SlotPool
from dartprune.renew import Renewal
from dartprune.report import Event, Report
from dartprune.setup import build, place
from dartprune.slots import Slot, State
from dartprune.stepper import Stepper
from dartprune.token.sketching import Progress
from dartprune.watch import Watch

NO_CACHE = "use_cache=False would rerun the whole text at every step: pruned decoding needs a cache"
WHAT_PHASE = (
    "this forward needs a phase: wrap it in `with run.phase('prefill'):` for given text or "
    "`with run.phase('decode'):` for new tokens, or use model.generate()"
)


class Run(Refuses):
    """A pruner at work on one model. Made by `Pruner.attach` or by a `with` block; ended by `detach`."""

    def __init__(
        self, method: Method, model: nn.Module, *, backend: str = "auto", progress: Progress | None = None
    ) -> None:
        """Attach. Raises ValueError or TypeError, with the model untouched, for what cannot be pruned."""
        began = time.perf_counter()
        self.method = method
        self.lock = threading.RLock()
        self.armed = False
        self.split = 0  # prompt tokens at the head of a forward whose rest are candidates
        decoder = describe(model)
        self._core = core_of(model)
        if self._core.training:
            raise ValueError("the model is in training mode: call model.eval() before attaching")
        self._attached = False
        self._paused = False
        self._phase: tuple[Phase, tuple[int, ...] | None] | None = None
        self._callbacks: list[Callable[[Event], None]] = []
        self._cache: Any = None  # of the forward under way
        self._length = 0
        self._unbound: tuple[int, ...] | None = None
        self._generating = False
        self._prompt: int | None = None
        self._ended: Tensor | None = None
        claim(self._core, method.name)
        try:
            self._parts = parts = build(method, self._core, decoder, backend, progress)
            replay = method.refresh.replay_tokens
            self._account = Account(method, parts)
            self._renewal = Renewal(method, parts.layers, parts.counters, parts.facts)
            self._pool = SlotPool(parts.holders, self._new_slot, self._account.close)
            self._stepper = Stepper(
                method,
                parts.layers,
                parts.counters,
                Watch(parts.windows, method.refresh.settle_tokens, replay // method.detector.window),
                self._renewal,
                self._happened,
                parts.tally,
            )
            self._sites = sites_of(self._core, decoder)
            self._door = model_site(self._core)
            for name in ("begin", "candidates", "finish", "abort"):
                setattr(self, name, torch.compiler.disable(getattr(self, name)))
            self._install()
        except BaseException:
            if hasattr(self, "_parts"):
                self._parts.layout.undo()
            release(self._core)
            raise
        self._account.seconds["attaching"] = time.perf_counter() - began

    def _install(self) -> None:
        try:
            if self.method.prunes:
                for site, layer in zip(self._sites.layers, self._parts.layers, strict=True):
                    site.install(layer)
            self._door.install(self)
            self._attached = True
        finally:
            if not self._attached:
                self._remove()

    def _remove(self) -> None:
        self._door.remove()
        for site in self._sites.layers:
            site.remove()
        self._parts.layout.undo()

    # ---- what the user calls

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        if not self._attached:
            return
        began = time.perf_counter()
        with self.lock:
            self._attached = False
            self._settle_candidates()
            self._stepper.abort()
            self._remove()
            release(self._core)
        self._account.seconds["detaching"] = time.perf_counter() - began

    def report(self) -> Report:
        """What happened so far; also after `detach`."""
        with self.lock:
            self._settle_candidates()
            self._pool.sweep()
            self._account.seconds |= self._stepper.seconds
            states = {id(layer.state): layer.state for layer in self._parts.layers}
            self._account.seconds["tracing"] = sum(state.tracing_seconds for state in states.values())
            self._account.refresh_flops, self._account.replays = self._renewal.flops, self._renewal.replays
            return self._account.report(list(self._pool.live.values()))

    @contextmanager
    def phase(self, phase: str, slots: Sequence[int] | None = None) -> Iterator[None]:
        """Say what the tokens of direct `model(...)` calls are.

        Args:
            phase: `prefill` for given text (dense and traced), `decode` for new tokens that are known to stay (pruned
                with the masks made from what came before the call; events act after it).
            slots: for a cache that the run has not seen grow: slots of its lines, from `slots_of`.

        Raises:
            ValueError: unknown phase.
        """
        if phase not in ("prefill", "decode"):
            raise ValueError(f"unknown phase {phase!r}: write 'prefill' or 'decode'")
        before = self._phase
        self._phase = (Phase(phase), tuple(slots) if slots is not None else None)
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Pause pruning: inside, the model is the plain one; decoded tokens of known sequences count as dense."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def on_event(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with each Event as it happens (this reads the event's figures from the device)."""
        self._callbacks.append(callback)

    def slots_of(self, cache: Any) -> tuple[int, ...]:
        """The slots of a cache's lines; ValueError if the run does not know it."""
        ids = self._pool.of(cache)
        if ids is None:
            raise ValueError("this cache was not filled inside the block, so it has no slots yet")
        return ids

    def selection(self, slot: int) -> list[Tensor | None]:
        """Kept neurons of each layer for a slot, int32 [k_l] on the layer's device; None where nothing is pruned.

        With a token selector these are the candidates, among which each token finds its own.
        """
        keep = self._pool.live[slot].keep
        if keep is None:
            return [None] * len(self._parts.layers)
        return [
            layer.selection.kept(slot, count).clone() for layer, count in zip(self._parts.layers, keep, strict=True)
        ]

    def impact(self, slot: int) -> list[tuple[float, float]]:
        """Mean impact terms of each layer's FFN on a slot's traced tokens: `1 - cos(y, z)` and `|z - y| / |y|`."""
        rows = [layer.trace.impact[slot].tolist() for layer in self._parts.layers]
        return [(angle / max(count, 1.0), change / max(count, 1.0)) for angle, change, count in rows]

    def scores(self, slot: int) -> list[Tensor]:
        """The score of every neuron as a slot's trace stands now, float32 [I] of each layer on the layer's device."""
        return [self._renewal.scores(layer, [self._pool.live[slot]])[0].clone() for layer in self._parts.layers]

    # ---- what the model's doors call

    def prepared(self, inputs: dict[str, Any], call: dict[str, Any]) -> None:
        """`generate()` is about to run this forward."""
        cache = inputs.get("past_key_values")
        self._check_usable(cache is not None and inputs.get("use_cache") is not False)
        assert cache is not None
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs["inputs_embeds"]
        first, mask = bool(call.get("is_first_iteration")), call.get("attention_mask")
        self.split = 0
        if first and self._prompt is not None:
            # assisted decoding puts prompt and first candidates into one forward, but masks need the whole prompt first
            given = self._prompt - int(cache.get_seq_length())
            if 0 < given < tokens.shape[1]:
                self.split, tokens = given, tokens[:, :given]
                mask = mask[:, : self._prompt] if isinstance(mask, Tensor) else mask
        self._begin(cache, tokens, mask, first=first, explicit=None)
        self.armed = True

    def candidates(self, inputs: dict[str, Any]) -> None:
        """The candidates that came with the prompt are about to be verified."""
        self._begin(inputs["past_key_values"], inputs["input_ids"], None, first=False, explicit=(Phase.VERIFY, None))
        self.armed = True

    def begin(self, call: dict[str, Any]) -> None:
        """A forward that `generate()` did not announce is about to run."""
        cache = call.get("past_key_values")
        tokens = call.get("input_ids")
        if tokens is None:
            tokens = call.get("inputs_embeds")
        if self._paused and (cache is None or self._pool.of(cache) is None):
            return
        if self._phase is None and not self._paused:
            raise ValueError(WHAT_PHASE)
        asked = call.get("use_cache")
        self._check_usable(getattr(self._core.config, "use_cache", True) if asked is None else asked)
        if tokens is None:
            raise ValueError("the forward got neither input_ids nor inputs_embeds")
        explicit = self._phase if self._phase is not None else (Phase.DECODE, None)
        self._begin(cache, tokens, call.get("attention_mask"), first=False, explicit=explicit)

    def finish(self, output: Any) -> None:
        """The forward has run."""
        self.armed = False
        if self._unbound is not None:
            cache = getattr(output, "past_key_values", None)
            if cache is None and isinstance(output, tuple) and len(output) > 1:
                cache = output[1]
            if cache is not None:
                self._pool.bind(cache, self._unbound)
            self._cache, self._unbound = cache, None
        self._end_forward()

    def abort(self) -> None:
        """The forward has failed."""
        self.armed, self.split = False, 0
        self._unbound = None
        self._stepper.abort()

    def generating(self, prompt: Tensor | None) -> None:
        """`generate()` begins."""
        self._finish_compiled()
        self._generating = True
        self._ended = None
        self._prompt = int(prompt.shape[1]) if prompt is not None and prompt.dim() == 2 else None

    def generated(self) -> None:
        """`generate()` is over, well or not."""
        self._finish_compiled()
        self._settle_candidates()
        self._generating, self._prompt, self._ended, self._cache = False, None, None, None
        self._pool.sweep()

    def stopped(self, done: Tensor) -> None:
        """Which lines have ended, bool [B]."""
        self._ended = done if self._ended is None or self._ended.shape != done.shape else self._ended | done

    def reordered(self, cache: Any, order: Tensor) -> None:
        """Line b of the cache now continues line order[b]."""
        ids = self._pool.of(cache)
        if ids is not None:
            self._finish_compiled()
            self._pool.continue_as(ids, order.flatten())

    # ---- one forward

    def _begin(
        self,
        cache: Any,
        tokens: Tensor,
        mask: Any,
        *,
        first: bool,
        explicit: tuple[Phase, tuple[int, ...] | None] | None,
    ) -> None:
        self._finish_compiled()
        self._settle_candidates()
        self._pool.sweep()
        if first or explicit is not None:
            self._check_unmoved()
        lines, length = int(tokens.shape[0]), int(tokens.shape[1])
        known = self._pool.of(cache) if cache is not None else None
        in_loop = known is not None and length == 1 and not first and (explicit is None or explicit[0] is Phase.DECODE)
        # a static cache keeps its length on the device, which a decoding step must not wait for
        if in_loop and _is_static(cache):
            past = max(1, self._length)
        else:
            past = 0 if cache is None else int(cache.get_seq_length())
        if explicit is not None:
            phase = explicit[0]
        elif first or past == 0:
            phase = Phase.PREFILL
        else:
            phase = Phase.DECODE if length == 1 else Phase.VERIFY
        ids = self._lines_of(cache, known, lines, past, explicit[1] if explicit else None)
        valid = _valid(mask, lines, length) if phase is Phase.PREFILL or explicit is not None else None
        rows = Rows(phase, ids, length, valid)
        if phase is Phase.PREFILL:
            self._check_length(past + length)
            self._ended = None
        slots = [self._pool.live[i] for i in ids]
        if phase is Phase.PREFILL and past == 0 and tokens.dim() == 2 and self.method.scorer == "random":
            for line, slot in enumerate(slots):
                text = tokens[line].cpu()[rows.line(line)]
                slot.noise_seed = zlib.crc32(text.numpy().tobytes())
        ended = self._ended if self._ended is not None and len(self._ended) == lines else None
        self._cache, self._length = cache, past
        self._stepper.begin(rows, slots, ended, paused=self._paused)
        if phase is not Phase.PREFILL:
            self._account.decoded(
                slots, self._renewal.version, pruned=not self._paused, gathered=self._stepper.gathered
            )

    def _lines_of(
        self, cache: Any, known: tuple[int, ...] | None, lines: int, past: int, given: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        if given is not None:
            if len(given) != lines or any(i not in self._pool.live for i in given):
                raise ValueError(f"slots {list(given)} do not fit {lines} lines: use run.slots_of(cache)")
            return given
        if known is not None and past == 0:
            self._pool.drop(cache)
            known = None
        if known is not None:
            if len(known) == lines:
                return known
            if lines % len(known) == 0:
                ids = self._pool.fan_out(known, lines)
                self._pool.drop(cache)
                self._pool.bind(cache, ids)
                return ids
            raise ValueError(f"this cache has {len(known)} sequences, the forward has {lines} lines")
        ids = self._pool.open(lines)
        for i in ids:
            slot = self._pool.live[i]
            slot.position = past
            if past:
                slot.note(f"a cache of {past} tokens was filled outside of the block: only newer tokens are traced")
        if cache is None:
            self._unbound = ids
        else:
            self._pool.bind(cache, ids)
        return ids

    def _check_usable(self, cached: bool) -> None:
        if self._core.training:
            raise ValueError("the model is in training mode: call model.eval() before decoding")
        if not cached:
            raise ValueError(NO_CACHE)

    def _check_unmoved(self) -> None:
        for layer in self._parts.layers:
            if place(layer.layer) != layer.place:
                device, dtype = place(layer.layer)
                raise ValueError(
                    f"the model was moved to {device}, {str(dtype).removeprefix('torch.')} while attached: "
                    "call run.detach(), move it, and attach again"
                )

    def _check_length(self, tokens: int) -> None:
        config = self._core.config
        most = getattr(
            config.get_text_config() if hasattr(config, "get_text_config") else config,
            "max_position_embeddings",
            None,
        )
        if isinstance(most, int) and 0 < most < tokens:
            raise ValueError(f"the prompt has {tokens} tokens, more than the model's context of {most}: shorten it")

    def _end_forward(self) -> None:
        self._stepper.finish(self._cache, self._length)
        self._length += 1
        if not self._generating:
            self._cache = None

    def _finish_compiled(self) -> None:
        # a compiled call ends inside the graph, so its consequences are drawn here, before anything else happens
        if self.armed:
            self.armed = False
            self._end_forward()

    def _settle_candidates(self) -> None:
        pending = self._stepper.pending
        if pending is not None:
            length = int(pending.cache.get_seq_length()) if pending.cache is not None else None
            self._stepper.resolve(length)

    def _new_slot(self, slot: int, sequence: int) -> Slot:
        state = State.LEARNING if self.method.prunes else State.DENSE
        return Slot(slot, sequence, state, self.method.detector.build(), least=self.method.min_traced)

    def _happened(self, slot: Slot, event: Event, changed: Tensor | None) -> None:
        slot.events.append((event, changed))
        if self._callbacks:
            told = replace(event, changed=None if changed is None else int(changed))
            for callback in self._callbacks:
                callback(told)


def _is_static(cache: Any) -> bool:
    return bool(getattr(cache, "is_compileable", False)) and type(cache).__name__ != "DynamicCache"


def _valid(mask: Any, lines: int, length: int) -> Tensor | None:
    """Which tokens of the forward are no padding, bool [B, T] on the host; None if all count."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    valid = mask[:, -length:].to("cpu").bool()
    if valid.shape != (lines, length):
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} does not fit {lines} lines of {length} tokens"
        )
    return None if bool(valid.all()) else valid
