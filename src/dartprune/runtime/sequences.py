"""Sequences that belong to no cache, for a loop that moves lines between caches itself, such as a server's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dartprune.errors import UserError
from dartprune.method import Method
from dartprune.model.apart import apart
from dartprune.report import SequenceReport
from dartprune.runtime.account import Account
from dartprune.runtime.events import Events
from dartprune.runtime.masks import Masks
from dartprune.runtime.slot_pool import SlotPool
from dartprune.runtime.slots import Slot, State


class Sequences:
    """Opens, copies and ends sequences of a run; their forwards are direct calls inside `run.phase(..., slots=...)`."""

    def __init__(
        self, method: Method, pool: SlotPool, masks: Masks, events: Events, account: Account, lock: Any
    ) -> None:
        """Set up; `lock` is held while what is known changes."""
        self._method = method
        self._pool = pool
        self._masks = masks
        self._events = events
        self._account = account
        self._lock = lock

    def open(self, lines: int = 1, sparsity: float | None = None) -> tuple[int, ...]:
        """Open sequences, which last until `close`.

        Args:
            lines: how many.
            sparsity: of these sequences, at least the method's, which room is held for; 0 leaves them dense. None: the
                method's.

        Returns:
            their slots.

        Raises:
            ValueError: a sparsity that lies outside, or that leaves a token selector nothing to choose.
        """
        with self._lock, apart():
            self._check_sparsity(sparsity)
            ids = self._pool.open(lines)
            self._ask(ids, sparsity)
            return ids

    def ask_sparsity(self, slots: Sequence[int], sparsity: float | None) -> None:
        """What `open` says of a sparsity, for sequences that have read text and have no masks yet.

        Raises:
            ValueError: a sparsity that lies outside, or a sequence that has masks.
        """
        with self._lock, apart():
            self._check_sparsity(sparsity)
            for slot in slots:
                if self._slot(slot).masks.keep is not None:
                    raise UserError(f"slot {slot} has masks already: its sparsity stays as it is")
            self._ask(slots, sparsity)

    def _check_sparsity(self, sparsity: float | None) -> None:
        lowest, highest = self._method.sparsity, 1 - self._masks.overhead
        if sparsity is not None and sparsity != 0 and not lowest <= sparsity < highest:
            raise UserError(f"sparsity {sparsity:g}: this run can take 0 or {lowest:g} to under {highest:.3f}")

    def _ask(self, slots: Sequence[int], sparsity: float | None) -> None:
        for i in slots:
            slot = self._slot(i)
            slot.sparsity = sparsity
            self._masks.expect(slot)
            if sparsity == 0 and self._method.prunes:
                slot.state = State.RELEASED

    def fork(self, slots: Sequence[int]) -> tuple[int, ...]:
        """New sequences that go on as these stand, each with a trace, masks and detector of its own from here."""
        with self._lock, apart():
            return self._pool.fan_out([self._slot(slot).id for slot in slots])

    def will_prune(self, slot: int) -> bool:
        """Whether the next decoded token of a live sequence is pruned."""
        return self._events.will_prune(self._slot(slot))

    def close(self, slots: Sequence[int]) -> list[SequenceReport]:
        """End sequences and give what they did; `report()` tells no more of them (waits for the device)."""
        with self._lock, apart():
            ended = [self._slot(slot) for slot in slots]
            self._pool.close(slots)
            return self._account.take(ended)

    def report(self, slot: int) -> SequenceReport:
        """What one live sequence did so far (waits for the device)."""
        with self._lock, apart():
            return self._account.sequence(self._slot(slot))

    def _slot(self, slot: int) -> Slot:
        if slot not in self._pool.live:
            raise UserError(f"slot {slot} is not open")
        return self._pool.live[slot]
