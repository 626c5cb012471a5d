"""Slots: one per live sequence; what the host knows of each, and which are live."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from dartprune.drift import AttentionDrift
from dartprune.errors import UserError
from dartprune.model.apart import apart
from dartprune.model.caches import follow, unfollow
from dartprune.report import Event
from dartprune.runtime.slot_tensors import SlotTensors


class State(Enum):
    """How the decoded tokens of a slot are computed."""

    LEARNING = "learning"  # dense and traced, until a mask may be made
    PRUNED = "pruned"
    RELEASED = "released"  # dense for good
    DENSE = "dense"  # the Dense preset: never traced, never pruned


@dataclass
class MaskCounts:
    """How many neurons the masks of one sequence keep, and how old they are.

    keep: of each layer, None while it is dense.  per_token: of these, how many each token uses, with a token selector.
    former: `keep` before the last change.  age: decode forwards since the masks were made or renewed.  born: decode
    forwards before they were made.  stale: new text was traced, so that they must be made anew before the next token.
    """

    keep: list[int] | None = None
    per_token: list[int] | None = None
    former: list[int] | None = None
    age: int = 0
    born: int = 0
    stale: bool = False


@dataclass
class RingPlace:
    """Where a sequence's next FFN input goes in the rings of all layers, and how many they hold of it."""

    next: int = 0
    filled: int = 0

    def advance(self, tokens: int, length: int) -> None:
        """Some tokens were written into rings of that length; 0: there are no rings."""
        if length:
            self.next = (self.next + tokens) % length
            self.filled = min(length, self.filled + tokens)

    def retreat(self, tokens: int, length: int) -> None:
        """The last tokens do not count any longer."""
        if length:
            self.next = (self.next - tokens) % length
            self.filled = max(0, self.filled - tokens)


@dataclass
class Detection:
    """The drift detector of one sequence.

    fill: tokens in the window under way.  recent: means of the last windows, float32 [H] each.  settling: a new
    reference grows, so that the detector rests.  similarities: (decoded, cosine, threshold) of each judged window.
    """

    drift: AttentionDrift
    fill: int = 0
    settling: bool = False
    recent: list[Tensor] = field(default_factory=list)
    similarities: list[tuple[int, float, float]] = field(default_factory=list)

    def copy(self) -> Detection:
        """One that goes its own way from here."""
        return Detection(self.drift.copy(), self.fill, self.settling, list(self.recent), list(self.similarities))


@dataclass
class LoggedEvent:
    """An event and how many neurons it changed: a scalar on the device, unread; None as long as no mask was made."""

    event: Event
    changed: Tensor | None

    def told(self) -> Event:
        """The event with its figure (waits for the device)."""
        return replace(self.event, changed=None if self.changed is None else int(self.changed))


@dataclass
class Slot:
    """What the host knows of one sequence.

    position: tokens that its cache holds.  decoded: decode forwards, padding after the end included: a clock, not a
    count for the report.  inherited: of these, decoded by the sequence it was copied from.  least: tokens that must
    have been traced before the next mask is made.  dense_left: dense tokens still owed to a relearn.  noise_seed: made
    from its first tokens.  sparsity: asked for this sequence, None for the method's; 0 stays dense.
    """

    id: int
    sequence: int
    state: State
    detection: Detection
    least: int
    masks: MaskCounts = field(default_factory=MaskCounts)
    ring: RingPlace = field(default_factory=RingPlace)
    noise_seed: int | None = None
    sparsity: float | None = None
    position: int = 0
    prompt_tokens: int = 0
    traced: int = 0
    decoded: int = 0
    dense_left: int = 0
    inherited: int = 0
    finished: bool = False
    events: list[LoggedEvent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def onto(self, slot_id: int) -> Slot:
        """A copy that lives in another slot (a beam that is continued there)."""
        return replace(
            self,
            id=slot_id,
            detection=self.detection.copy(),
            masks=copy.deepcopy(self.masks),
            ring=replace(self.ring),
            events=[replace(logged) for logged in self.events],
            notes=list(self.notes),
        )

    def fork(self) -> None:
        """Go on as a sequence of its own: what happened so far is told by the one it was copied from."""
        self.inherited, self.prompt_tokens = self.decoded, 0
        self.events, self.detection.similarities = [], []

    def masked_within(self, decoded: int) -> bool:
        """Whether masks were in force for one of its tokens, if it ended after so many; what follows is padding."""
        return self.masks.keep is not None and (self.masks.born < decoded or self.decoded == decoded)

    def traced_within(self, decoded: int) -> int:
        """Tokens that were traced until then."""
        until = self.decoded if self.masks.keep is None else self.masks.born
        return self.traced - (max(0, until - decoded) if self.state in (State.LEARNING, State.PRUNED) else 0)

    def events_within(self, decoded: int) -> list[LoggedEvent]:
        """Events until then; masks that a relearn was for may have come too late."""
        events = [logged for logged in self.events if logged.event.decoded <= decoded]
        if events and self.masks.keep is not None and not self.masked_within(decoded):
            events[-1] = replace(events[-1], changed=None)
        return events

    def note(self, text: str) -> None:
        """Remember a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)


class SlotPool:
    """Opens and closes slots; a slot lives as long as the cache of its sequence, and follows what that cache does."""

    def __init__(
        self, holders: Sequence[SlotTensors], new: Callable[[int, int], Slot], closed: Callable[[Slot], None]
    ) -> None:
        """Set up an empty pool.

        Args:
            holders: everything that has a row per slot.
            new: makes a Slot from its id and its number in the report.
            closed: told of each slot that ends, while its rows are still there.
        """
        self._holders = list(holders)
        self._new = new
        self._closed = closed
        self._opened = 0
        self.live: dict[int, Slot] = {}
        self._ties: dict[int, CacheTie] = {}
        # set by the run: what must be done before slots move, and what a crop takes back
        self.before_move: Callable[[], None] = lambda: None
        self.taken_back: Callable[[Any, Sequence[int], int], None] = lambda cache, ids, tokens: None

    # ---- slots

    def open(self, lines: int) -> tuple[int, ...]:
        """Open a slot for each line; the lowest free ids, their rows cleared."""
        ids: list[int] = []
        candidate = 0
        while len(ids) < lines:
            if candidate not in self.live:
                ids.append(candidate)
            candidate += 1
        for holder in self._holders if ids else ():
            holder.grow(max(ids) + 1)
            holder.clear(ids)
        for i in ids:
            self.live[i] = self._new(i, self._opened)
            self._opened += 1
        return tuple(ids)

    def close(self, ids: Sequence[int]) -> None:
        """End these sequences."""
        for i in ids:
            slot = self.live.get(i)
            if slot is not None:
                self._closed(slot)
                del self.live[i]

    def continue_as(self, ids: Sequence[int], order: Sequence[int]) -> None:
        """Line b goes on as what line order[b] was: statistics, masks, detector and events follow."""
        if list(order) != list(range(len(ids))):
            self._copy([ids[line] for line in order], list(ids))

    def fan_out(self, ids: Sequence[int]) -> tuple[int, ...]:
        """New slots, each a copy of the one that stands there."""
        opened = self.open(len(ids))
        if opened:
            self._copy(list(ids), list(opened))
        for holder in self._holders:
            holder.fork(list(opened))
        for i in opened:
            self.live[i].fork()
        return opened

    def select(self, ids: Sequence[int], lines: Sequence[int]) -> tuple[int, ...]:
        """The slots of these lines, in their order; one that comes again is copied, one that is left out ends."""
        chosen = [ids[line] for line in lines]
        again = [number for number, slot in enumerate(chosen) if slot in chosen[:number]]
        for number, copied in zip(again, self.fan_out([chosen[number] for number in again]), strict=True):
            chosen[number] = copied
        self.close([slot for slot in ids if slot not in chosen])
        return tuple(chosen)

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        rows = [torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in (sources, targets)]
        for holder in self._holders:
            holder.move(*rows)
        before = dict(self.live)
        for source, target in zip(sources, targets, strict=True):
            twin = before[source].onto(target)
            twin.sequence = before[target].sequence
            self.live[target] = twin

    # ---- caches

    def bind(self, cache: Any, ids: Sequence[int]) -> CacheTie:
        """Tie slots to the cache of their sequences."""
        tie = self.tie(cache)
        if tie is None:
            tie = CacheTie(self, cache, tuple(ids))
            self._ties[id(cache)] = tie
            follow(cache, tie)
        tie.ids = tuple(ids)
        return tie

    def tie(self, cache: Any) -> CacheTie | None:
        """What ties a cache to its slots, None if it is not known."""
        tie = self._ties.get(id(cache))
        return tie if tie is not None and tie.cache() is cache else None

    def of(self, cache: Any) -> tuple[int, ...] | None:
        """The slots of a cache, None if it is not known."""
        tie = self.tie(cache)
        return None if tie is None else tie.ids

    def lines_of(self, cache: Any, lines: int, past: int) -> tuple[int, ...] | None:
        """The slots of a cache that goes on with so many lines; None if it is new here, or was emptied."""
        tie = self.tie(cache)
        if tie is not None and past == 0:
            self.drop(cache)
            tie = None
        if tie is None or len(tie.ids) == lines:
            return None if tie is None else tie.ids
        if lines % len(tie.ids):
            raise UserError(f"this cache has {len(tie.ids)} sequences, the forward has {lines} lines")
        tie.repeated(lines // len(tie.ids))
        return tie.ids

    def sweep(self) -> None:
        """Close the slots whose cache is gone."""
        for key in [key for key, tie in self._ties.items() if tie.cache() is None]:
            self.close(self._ties.pop(key).ids)

    def drop(self, cache: Any) -> None:
        """End the sequences of a cache that was emptied."""
        tie = self.tie(cache)
        if tie is not None:
            del self._ties[id(cache)]
            unfollow(cache)
            self.close(tie.ids)

    def release(self) -> None:
        """Follow no cache any longer; the slots stay as they are."""
        for tie in self._ties.values():
            unfollow(tie.cache())


class CacheTie:
    """Between a cache and the slots of its lines: hears what the cache does, see `model.caches.CacheListener`.

    length: tokens that the cache held when the last forward began, on the host.
    """

    def __init__(self, pool: SlotPool, cache: Any, ids: tuple[int, ...]) -> None:
        self.cache = weakref.ref(cache)
        self.ids = ids
        self.length = 0
        self._pool = pool

    @apart()
    def reordered(self, order: Tensor) -> None:
        """Beams moved."""
        lines = [int(line) for line in order.flatten()]  # beam search waits for the device at each step anyway
        if len(lines) != len(self.ids):
            self.selected(lines)
            return
        self._pool.before_move()
        self._pool.continue_as(self.ids, lines)

    @apart()
    def selected(self, lines: list[int]) -> None:
        """Some lines are left."""
        self._pool.before_move()
        self.ids = self._pool.select(self.ids, lines)

    def repeated(self, times: int) -> None:
        """Every line goes on more than once."""
        self.selected([line for line in range(len(self.ids)) for _ in range(times)])

    @apart()
    def cropped(self, tokens: int) -> None:
        """Tokens were taken back."""
        self._pool.taken_back(self.cache(), self.ids, tokens)

    @apart()
    def copied(self, copy: Any) -> None:
        """The copy brings its trace: slots of its own, as these are now."""
        self._pool.before_move()
        self._pool.bind(copy, self._pool.fan_out(self.ids)).length = self.length
