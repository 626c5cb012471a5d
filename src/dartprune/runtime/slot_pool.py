"""Which slots are live, and what ties them to the caches of their sequences."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dartprune.errors import UserError
from dartprune.model.apart import apart
from dartprune.model.caches import follow, unfollow
from dartprune.runtime.slot_tensors import SlotTensors
from dartprune.runtime.slots import Slot


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
