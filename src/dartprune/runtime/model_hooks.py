"""What each forward of an attached model is: its phase, its lines and their slots, heard at the model's doors."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dartprune.errors import UserError
from dartprune.method import Method
from dartprune.model.caches import cache_in, cache_of, is_static
from dartprune.model.changes import Changes
from dartprune.model.context import depth
from dartprune.model.patch import Refuses
from dartprune.model.rows import Phase, Rows
from dartprune.runtime.account import Account
from dartprune.runtime.checks import Checks
from dartprune.runtime.forward import Forwards
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.masks import Masks
from dartprune.runtime.padding import real_tokens
from dartprune.runtime.phases import Explicit, Generation, Phases
from dartprune.runtime.slot_pool import SlotPool
from dartprune.runtime.slots import Slot
from dartprune.runtime.weight_facts import WeightFacts
from dartprune.scoring import NOISE

WHAT_PHASE = (
    "this forward needs a phase: wrap it in `with run.phase('prefill'):` for given text or "
    "`with run.phase('decode'):` for new tokens, or use model.generate()"
)
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _outside_graphs(method: _Method) -> _Method:
    """Keep torch.compile out of a method."""
    disabled: _Method = torch.compiler.disable(method)
    return disabled


class LiveModel(Refuses):
    """Works out the phase and the slots of each forward, has it planned, and has its consequences drawn.

    phases: what the user says of direct calls.  lock: held by one thread's forward or `generate()` at a time.
    state: held for a moment, while what is known changes or is reported.  armed: the coming forward is announced.
    split: prompt tokens at the head of a forward whose rest are candidates.  inside: the thread that runs a forward.
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
        changes: Changes,
        facts: WeightFacts,
    ) -> None:
        self.phases = Phases()
        self.lock = threading.RLock()
        self.state = threading.RLock()
        self.armed = False
        self.inside: int | None = None
        self.split = 0
        self._core = core
        self._pool = pool
        self._forwards = forwards
        self._account = account
        self._masks = masks
        self._noisy = NOISE in masks.scorer.inputs
        self._depth = depth(core)
        self._changes = changes
        self._checks = Checks(core, layers, changes, facts, sketched=method.token is not None)
        self._cache: Any = None  # of the forward under way
        self._length = 0  # tokens that it held before
        self._began: float | None = None  # when the decode forward under way began
        self._unbound: tuple[int, ...] | None = None
        self._generations: list[Generation] = []
        pool.before_move, pool.taken_back = self._finish_compiled, self._taken_back

    # ---- what the model's doors call

    def prepared(self, inputs: dict[str, Any], call: dict[str, Any]) -> None:
        """`generate()` is about to run this forward."""
        if self._drafts:
            self.armed = True
            return
        cache = cache_in(inputs)
        self._checks.usable(cached=inputs.get("use_cache") is not False)
        tokens = inputs.get("input_ids")
        # transformers before 5.23 does not announce the later chunks of a prompt
        first = bool(call.get("is_first_iteration")) or self._is_prompt(cache, tokens)
        mask = call.get("attention_mask")
        self.split = 0
        prompt = self._generation.prompt
        if first and prompt is not None and tokens is not None and cache is not None:
            # assisted decoding puts prompt and first candidates into one forward, but masks need the whole prompt first
            given = prompt - int(cache.get_seq_length())
            if 0 < given < tokens.shape[1]:
                self.split, tokens = given, tokens[:, :given]
                mask = mask[:, :prompt] if isinstance(mask, Tensor) else mask
        self._begin(cache, inputs["inputs_embeds"] if tokens is None else tokens, mask, first=first, explicit=None)
        self.armed = True

    def _is_prompt(self, cache: Any, tokens: Tensor | None) -> bool:
        """Whether these tokens lie inside the prompt that `generate()` was given."""
        prompt = self._generation.prompt
        if prompt is None or cache is None or tokens is None or is_static(cache):
            return False
        return int(cache.get_seq_length()) + int(tokens.shape[1]) <= prompt

    @_outside_graphs
    def candidates(self, inputs: dict[str, Any]) -> None:
        """The candidates that came with the prompt are about to be verified."""
        self._begin(cache_in(inputs), inputs["input_ids"], None, first=False, explicit=(Phase.VERIFY, None))
        self.armed = True

    @_outside_graphs
    def begin(self, call: dict[str, Any]) -> None:
        """A forward that `generate()` did not announce is about to run.

        Direct calls say what they are. Inside `generate()`, adapters and logits processors make calls of their own: a
        cache that is new here begins a text, one that is known goes on.
        """
        cache = cache_in(call)
        explicit, first = self.phases.here, False
        known = (cache is not None and self._pool.tie(cache) is not None) or bool(explicit and explicit[1])
        if (self.phases.paused and not known) or self._drafts:
            return
        if explicit is None and self._generations:
            first = not self._generation.begun or not known
        elif explicit is None:
            if not self.phases.paused:
                raise UserError(WHAT_PHASE)
            explicit = (Phase.DECODE, None)
        asked = call.get("use_cache")
        self._checks.usable(cached=getattr(self._core.config, "use_cache", True) if asked is None else asked)
        tokens = call.get("inputs_embeds") if call.get("input_ids") is None else call.get("input_ids")
        if tokens is None:
            raise UserError("the forward got neither input_ids nor inputs_embeds")
        self._begin(cache, tokens, call.get("attention_mask"), first=first, explicit=explicit)

    def concerns(self, call: dict[str, Any]) -> bool:
        """Whether a direct call of the decoder without its head is one to be followed."""
        cache = cache_in(call)
        return self.phases.here is not None or (cache is not None and self._pool.tie(cache) is not None)

    @_outside_graphs
    def finish(self, output: Any) -> None:
        """The forward has run."""
        with self.state:
            self.armed = False
            if self._began is not None:
                self._account.timed(time.perf_counter() - self._began)
                self._began = None
            if self._unbound is not None:
                self._cache = cache_of(output)
                if self._cache is not None:
                    self._pool.bind(self._cache, self._unbound)
                self._unbound = None
            self._end_forward()

    @_outside_graphs
    def abort(self) -> None:
        """The forward has failed."""
        self.armed, self.split = False, 0
        self._unbound = None
        self._forwards.abort()

    def generating(self, prompt: Tensor | None) -> None:
        """`generate()` begins."""
        with self.state:
            self._finish_compiled()
            known = prompt is not None and prompt.dim() == 2 and not prompt.is_floating_point()
            self._generations.append(Generation(int(prompt.shape[1]) if known and prompt is not None else None))

    def generated(self) -> None:
        """`generate()` is over, well or not."""
        with self.state:
            self._finish_compiled()
            self.settle()
            self._generations.pop()
            self._pool.sweep()

    def stopped(self, done: Tensor) -> None:
        """Which lines have ended, bool [B]."""
        before = self._generation.ended
        self._generation.ended = done if before is None or before.shape != done.shape else before | done

    def settle(self) -> None:
        """Count the candidates that stayed, as far as the cache tells by now."""
        waiting = self._forwards.candidates
        if waiting is not None:
            length = int(waiting.cache.get_seq_length()) if waiting.cache is not None else None
            self._forwards.resolve(length)

    # ---- one forward

    @property
    def _drafts(self) -> bool:
        """Whether the first layers alone draft candidates (early exit): plain, and no text of its own."""
        return bool(self._generations) and depth(self._core) != self._depth

    @property
    def _generation(self) -> Generation:
        return self._generations[-1] if self._generations else Generation(None)

    def _begin(self, cache: Any, tokens: Tensor, mask: Any, *, first: bool, explicit: Explicit | None) -> None:
        with self.state:
            self._finish_compiled()
            self.settle()
            self._pool.sweep()
            if first or explicit is not None:
                self._checks.unchanged()
            self._forwards.heard = self._changes.heard()
            if self._forwards.heard is not None:
                self._account.note(
                    f"{self._forwards.heard} while attached: masks stand in for the row kernels meanwhile"
                )
            lines, length = int(tokens.shape[0]), int(tokens.shape[1])
            tie = self._pool.tie(cache) if cache is not None else None
            in_loop = length == 1 and not first and (explicit is None or explicit[0] is Phase.DECODE)
            # a static cache keeps its length on the device, which a decoding step must not wait for
            if tie is not None and in_loop and tie.length and is_static(cache):
                past = tie.length
            else:
                past = 0 if cache is None else int(cache.get_seq_length())
            phase = _phase(explicit, first=first, past=past, tokens=length)
            ids = self._slots(cache, lines, past, explicit[1] if explicit else None)
            slots = [self._pool.live[i] for i in ids]
            checked = phase is Phase.PREFILL or explicit is not None
            rows = Rows(phase, ids, length, real_tokens(mask, lines, length, past) if checked else None)
            if phase is Phase.PREFILL:
                self._generation.begun, self._generation.ended = True, None
                self._checks.note_length(slots, past + length)
            if self._noisy:
                _seed(rows, slots, tokens)
            ended = self._generation.ended
            self._cache, self._length = cache, past
            paused = self.phases.paused
            self._forwards.begin(
                rows, slots, ended if ended is not None and len(ended) == lines else None, paused=paused
            )
            self._began = None if phase is Phase.PREFILL else time.perf_counter()
            if phase is not Phase.PREFILL:
                self._account.decoded(
                    slots,
                    self._masks.version,
                    pruned=not paused,
                    gathered=self._forwards.gathered,
                    chosen=self._forwards.heard is None,
                )

    def _slots(self, cache: Any, lines: int, past: int, given: tuple[int, ...] | None) -> tuple[int, ...]:
        if given is not None:
            if len(given) != lines or any(i not in self._pool.live for i in given):
                raise UserError(f"slots {list(given)} do not fit {lines} lines: use run.slots_of(cache)")
            return given
        known = None if cache is None else self._pool.lines_of(cache, lines, past)
        if known is not None:
            return known
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

    def _end_forward(self) -> None:
        tie = None if self._cache is None else self._pool.tie(self._cache)
        if tie is not None and self._forwards.rows is not None:
            tie.length = self._length + self._forwards.rows.tokens
        self._forwards.finish(self._cache, self._length)
        self._cache = None

    def _finish_compiled(self) -> None:
        # a compiled call ends inside the graph, so its consequences are drawn here, before anything else happens
        if self.armed:
            self.armed, self._began = False, None
            self._end_forward()

    def _taken_back(self, cache: Any, ids: Sequence[int], tokens: int) -> None:
        """A cache was cropped."""
        with self.state:
            self._finish_compiled()
            waiting = self._forwards.candidates
            if waiting is not None and waiting.cache is cache:
                self.settle()
            elif tokens:
                self._forwards.take_back([self._pool.live[i] for i in ids], tokens)
            tie = self._pool.tie(cache)
            if tie is not None:
                tie.length = max(0, tie.length - tokens)


def _seed(rows: Rows, slots: Sequence[Slot], tokens: Tensor) -> None:
    """Noise belongs to a text, so that a batch draws what its sequences draw alone."""
    for line, slot in enumerate(slots):
        if slot.noise_seed is None:
            text = tokens[line].cpu()[rows.line(line)].contiguous()
            slot.noise_seed = zlib.crc32(text.view(torch.uint8).numpy().tobytes())


def _phase(explicit: Explicit | None, *, first: bool, past: int, tokens: int) -> Phase:
    if explicit is not None:
        return explicit[0]
    if first or past == 0:
        return Phase.PREFILL
    return Phase.DECODE if tokens == 1 else Phase.VERIFY
