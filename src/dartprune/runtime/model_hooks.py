"""What each forward of an attached model is: its phase, its lines and their slots, heard at the model's doors."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dartprune.method import Method
from dartprune.model.context import context_length
from dartprune.model.layer_site import Refuses
from dartprune.model.rows import Phase, Rows
from dartprune.runtime.account import Account
from dartprune.runtime.build import place
from dartprune.runtime.forward import Forwards
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.masks import Masks
from dartprune.runtime.slots import SlotPool

NO_CACHE = "use_cache=False would rerun the whole text at every step: pruned decoding needs a cache"
WHAT_PHASE = (
    "this forward needs a phase: wrap it in `with run.phase('prefill'):` for given text or "
    "`with run.phase('decode'):` for new tokens, or use model.generate()"
)
_Method = TypeVar("_Method", bound=Callable[..., Any])
Explicit = tuple[Phase, tuple[int, ...] | None]  # what a forward's tokens are, and its lines' slots where given


def _outside_graphs(method: _Method) -> _Method:
    """Keep torch.compile out of a method."""
    disabled: _Method = torch.compiler.disable(method)
    return disabled


class LiveModel(Refuses):
    """Works out the phase and the slots of each forward, has it planned, and has its consequences drawn.

    explicit: what the user says of direct calls, None outside of `Run.phase`.  paused: whether pruning is.
    lock: held by one thread's forward or `generate()` at a time.  armed: the coming forward is announced.
    split: prompt tokens at the head of a forward whose rest are candidates.
    """

    def __init__(
        self,
        method: Method,
        core: Any,
        layers: Sequence[LiveLayer],
        pool: SlotPool,
        forwards: Forwards,
        account: Account,
        masks: Masks,
    ) -> None:
        self.explicit: Explicit | None = None
        self.paused = False
        self.lock = threading.RLock()
        self.armed = False
        self.split = 0
        self._method = method
        self._core = core
        self._layers = layers
        self._pool = pool
        self._forwards = forwards
        self._account = account
        self._masks = masks
        self._cache: Any = None  # of the forward under way
        self._length = 0
        self._unbound: tuple[int, ...] | None = None
        self._generating = False
        self._prompt: int | None = None
        self._ended: Tensor | None = None

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

    @_outside_graphs
    def candidates(self, inputs: dict[str, Any]) -> None:
        """The candidates that came with the prompt are about to be verified."""
        self._begin(inputs["past_key_values"], inputs["input_ids"], None, first=False, explicit=(Phase.VERIFY, None))
        self.armed = True

    @_outside_graphs
    def begin(self, call: dict[str, Any]) -> None:
        """A forward that `generate()` did not announce is about to run."""
        cache = call.get("past_key_values")
        tokens = call.get("input_ids")
        if tokens is None:
            tokens = call.get("inputs_embeds")
        if self.paused and (cache is None or self._pool.of(cache) is None):
            return
        if self.explicit is None and not self.paused:
            raise ValueError(WHAT_PHASE)
        asked = call.get("use_cache")
        self._check_usable(getattr(self._core.config, "use_cache", True) if asked is None else asked)
        if tokens is None:
            raise ValueError("the forward got neither input_ids nor inputs_embeds")
        explicit = self.explicit if self.explicit is not None else (Phase.DECODE, None)
        self._begin(cache, tokens, call.get("attention_mask"), first=False, explicit=explicit)

    @_outside_graphs
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

    @_outside_graphs
    def abort(self) -> None:
        """The forward has failed."""
        self.armed, self.split = False, 0
        self._unbound = None
        self._forwards.abort()

    def generating(self, prompt: Tensor | None) -> None:
        """`generate()` begins."""
        self._finish_compiled()
        self._generating = True
        self._ended = None
        self._prompt = int(prompt.shape[1]) if prompt is not None and prompt.dim() == 2 else None

    def generated(self) -> None:
        """`generate()` is over, well or not."""
        self._finish_compiled()
        self.settle()
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

    def settle(self) -> None:
        """Count the candidates that stayed, as far as the cache tells by now."""
        waiting = self._forwards.candidates
        if waiting is not None:
            length = int(waiting.cache.get_seq_length()) if waiting.cache is not None else None
            self._forwards.resolve(length)

    # ---- one forward

    def _begin(self, cache: Any, tokens: Tensor, mask: Any, *, first: bool, explicit: Explicit | None) -> None:
        self._finish_compiled()
        self.settle()
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
        if phase is Phase.PREFILL and past == 0 and tokens.dim() == 2 and self._method.scorer == "random":
            for line, slot in enumerate(slots):
                text = tokens[line].cpu()[rows.line(line)]
                slot.noise_seed = zlib.crc32(text.numpy().tobytes())
        ended = self._ended if self._ended is not None and len(self._ended) == lines else None
        self._cache, self._length = cache, past
        self._forwards.begin(rows, slots, ended, paused=self.paused)
        if phase is not Phase.PREFILL:
            self._account.decoded(slots, self._masks.version, pruned=not self.paused, gathered=self._forwards.gathered)

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
        for layer in self._layers:
            if place(layer.parts) != layer.place:
                device, dtype = place(layer.parts)
                raise ValueError(
                    f"the model was moved to {device}, {str(dtype).removeprefix('torch.')} while attached: "
                    "call run.detach(), move it, and attach again"
                )

    def _check_length(self, tokens: int) -> None:
        most = context_length(self._core)
        if most is not None and most < tokens:
            raise ValueError(f"the prompt has {tokens} tokens, more than the model's context of {most}: shorten it")

    def _end_forward(self) -> None:
        self._forwards.finish(self._cache, self._length)
        self._length += 1
        if not self._generating:
            self._cache = None

    def _finish_compiled(self) -> None:
        # a compiled call ends inside the graph, so its consequences are drawn here, before anything else happens
        if self.armed:
            self.armed = False
            self._end_forward()


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
