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
    former: `keep` before the last change.  age: decode forwards since the masks were made.  stale: new text was traced,
    so that they must be made anew before the next token.
    """

    keep: list[int] | None = None
    per_token: list[int] | None = None
    former: list[int] | None = None
    age: int = 0
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
    count for the report.  least: tokens that must have been traced before the next mask is made.  dense_left: dense
    tokens still owed to a relearn.
    """

    id: int
    sequence: int
    state: State
    detection: Detection
    least: int
    masks: MaskCounts = field(default_factory=MaskCounts)
    ring: RingPlace = field(default_factory=RingPlace)
    noise_seed: int = 0
    position: int = 0
    prompt_tokens: int = 0
    traced: int = 0
    decoded: int = 0
    dense_left: int = 0
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

    def note(self, text: str) -> None:
        """Remember a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)


class SlotPool:
    """Opens and closes slots; a slot lives as long as the cache of its sequence."""

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
        self._caches: dict[int, tuple[weakref.ref[Any], tuple[int, ...]]] = {}

    def open(self, lines: int) -> tuple[int, ...]:
        """Open a slot for each line; the lowest free ids, their rows cleared."""
        ids: list[int] = []
        candidate = 0
        while len(ids) < lines:
            if candidate not in self.live:
                ids.append(candidate)
            candidate += 1
        for holder in self._holders:
            holder.grow(max(ids) + 1)
            holder.clear(ids)
        for i in ids:
            self.live[i] = self._new(i, self._opened)
            self._opened += 1
        return tuple(ids)

    def bind(self, cache: Any, ids: tuple[int, ...]) -> None:
        """Tie slots to the cache of their sequences."""
        self._caches[id(cache)] = (weakref.ref(cache), ids)

    def of(self, cache: Any) -> tuple[int, ...] | None:
        """The slots of a cache, None if it is not known."""
        known = self._caches.get(id(cache))
        return known[1] if known is not None and known[0]() is cache else None

    def sweep(self) -> None:
        """Close the slots whose cache is gone."""
        for key in [key for key, (cache, _) in self._caches.items() if cache() is None]:
            self.close(self._caches.pop(key)[1])

    def close(self, ids: Sequence[int]) -> None:
        """End these sequences."""
        for i in ids:
            slot = self.live.get(i)
            if slot is not None:
                self._closed(slot)
                del self.live[i]

    def drop(self, cache: Any) -> None:
        """End the sequences of a cache that was emptied."""
        known = self._caches.pop(id(cache), None)
        if known is not None:
            self.close(known[1])

    def continue_as(self, ids: tuple[int, ...], order: Tensor) -> None:
        """Line b goes on as what line order[b] was: statistics, masks, detector and events follow."""
        targets = torch.tensor(ids, dtype=torch.int64)
        host_order = [int(i) for i in order]  # beam search waits for the device at each step anyway
        if host_order == list(range(len(ids))):
            return
        self._copy([ids[i] for i in host_order], list(ids), targets)

    def fan_out(self, ids: tuple[int, ...], lines: int) -> tuple[int, ...]:
        """New slots for `lines` lines, each a copy of the line it was expanded from."""
        each = lines // len(ids)
        sources = [i for i in ids for _ in range(each)]
        opened = self.open(lines)
        self._copy(sources, list(opened), torch.tensor(opened, dtype=torch.int64))
        return opened

    def _copy(self, sources: list[int], targets: list[int], target_rows: Tensor) -> None:
        for holder in self._holders:
            holder.move(torch.tensor(sources, dtype=torch.int64), target_rows)
        before = dict(self.live)
        for source, target in zip(sources, targets, strict=True):
            twin = before[source].onto(target)
            twin.sequence = before[target].sequence
            self.live[target] = twin
