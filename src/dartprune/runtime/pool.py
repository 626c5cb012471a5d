"""The slots of a run: which are live, whose cache they belong to, and their tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dartprune.runtime.slots import Slot, SlotTensors


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
        targets = torch.tensor(ids, dtype=torch.int64, device="cpu")
        host_order = [int(i) for i in order]  # beam search waits for the device at each step anyway
        if host_order == list(range(len(ids))):
            return
        self._copy([ids[i] for i in host_order], list(ids), targets)

    def fan_out(self, ids: tuple[int, ...], lines: int) -> tuple[int, ...]:
        """New slots for `lines` lines, each a copy of the line it was expanded from."""
        each = lines // len(ids)
        sources = [i for i in ids for _ in range(each)]
        opened = self.open(lines)
        self._copy(sources, list(opened), torch.tensor(opened, dtype=torch.int64, device="cpu"))
        return opened

    def _copy(self, sources: list[int], targets: list[int], target_rows: Tensor) -> None:
        for holder in self._holders:
            holder.move(torch.tensor(sources, dtype=torch.int64, device="cpu"), target_rows)
        before = dict(self.live)
        for source, target in zip(sources, targets, strict=True):
            twin = before[source].onto(target)
            twin.sequence = before[target].sequence
            self.live[target] = twin
