"""What happens to a sequence's masks, and when: the first masks, and every refresh (DART section 3.5).

All layers change together between two forwards, never inside one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from dartprune.method import Method
from dartprune.refresh import Action
from dartprune.report import Event
from dartprune.runtime.masks import Masks
from dartprune.runtime.slots import LoggedEvent, Slot, State


class Events:
    """Makes the masks of sequences that are ready for them, and does what the refresh policy says afterwards."""

    def __init__(self, method: Method, masks: Masks, announce: Callable[[LoggedEvent], None]) -> None:
        """Set up; `announce` is told of each event as it happens."""
        self.method = method
        self.masks = masks
        self.seconds = 0.0
        self.one_by_one = False  # whether each sequence's masks are made without the others'
        self._announce = announce

    def make_ready(self, slots: Sequence[Slot]) -> None:
        """First masks, and new ones after more text, before a token is decoded."""
        ready = [slot for slot in slots if self._is_ready(slot)]
        if not ready:
            return
        began = time.perf_counter()
        for slot, changed in zip(ready, self._made(self.masks.build, ready), strict=True):
            slot.state = State.PRUNED
            slot.masks.stale, slot.masks.age, slot.detection.fill = False, 0, 0
            slot.masks.born = slot.decoded
            last = slot.events[-1] if slot.events else None
            if last is not None and last.changed is None and last.event.kind == Action.RELEARN.value:
                last.changed = changed  # these are the masks that the relearn was for
        self.seconds += time.perf_counter() - began

    def _made(self, work: Callable[[Sequence[Slot]], list[Tensor]], slots: Sequence[Slot]) -> list[Tensor]:
        """What `work` gives for these slots."""
        if self.one_by_one:
            return [changed for slot in slots for changed in work([slot])]
        return work(slots)

    def will_prune(self, slot: Slot) -> bool:
        """Whether the next decoded token of a sequence is pruned."""
        return slot.state is State.PRUNED or self._is_ready(slot)

    def _is_ready(self, slot: Slot) -> bool:
        if slot.state is State.PRUNED:
            return slot.masks.stale
        learnt = slot.dense_left == 0 and slot.traced >= slot.least and slot.decoded >= self.method.start
        return slot.state is State.LEARNING and learnt

    def quiet_tokens(self, slots: Sequence[Slot], most: int) -> int:
        """Tokens that all of these may decode in one forward with no mask changing in between, 1 to `most`."""
        return max(1, min(most, *(self._quiet_tokens(slot, most) for slot in slots)))

    def _quiet_tokens(self, slot: Slot, most: int) -> int:
        method, ready = self.method, self._is_ready(slot)
        if slot.state is State.LEARNING and not ready:
            return max(slot.dense_left, slot.least - slot.traced, method.start - slot.decoded)
        if not ready and slot.state is not State.PRUNED:
            return most
        # masks that are about to be made are new, and so is the detector's window
        age, fill = (0, 0) if ready else (slot.masks.age, slot.detection.fill)
        until = min(most, method.detector.window - fill) if method.refresh.detects else most
        changes = (t for t in range(1, until) if method.refresh.due(slot.decoded + t, age + t, False) is not None)
        return next(changes, until)

    def after_tokens(
        self, slots: Sequence[Slot], pruned: Sequence[Slot], fired: set[int], settled: set[int], ended: Tensor | None
    ) -> None:
        """Some tokens were decoded: refresh what is due.

        Args:
            slots: all sequences of the forward.
            pruned: those whose masks were in force.
            fired: ids of the sequences whose detector fired.
            settled: ids of those whose new reference is settled.
            ended: bool [B], the lines of `slots` that are over; None if not known.
        """
        due: dict[Action, list[Slot]] = {}
        for slot in pruned:
            action = self.method.refresh.due(slot.decoded, slot.masks.age, slot.id in fired)
            if action is None and slot.id in settled:
                action = Action.SETTLE
            if action is not None and not slot.finished:
                due.setdefault(action, []).append(slot)
        if not due:
            return
        # a detector that fired has looked already
        if ended is not None and any(slot.id not in fired for group in due.values() for slot in group):
            over = {slot.id for slot, is_over in zip(slots, ended.tolist(), strict=True) if is_over}
            due = {action: [slot for slot in group if slot.id not in over] for action, group in due.items()}
        began = time.perf_counter()
        for action, group in due.items():
            if group:
                self._refresh(action, group, fired)
        self.seconds += time.perf_counter() - began

    def _refresh(self, action: Action, slots: list[Slot], fired: set[int]) -> None:
        changed: list[Tensor | None] = [None] * len(slots)
        if action in (Action.REPLAY, Action.SETTLE):
            changed = list(self._made(self.masks.replay, slots))
        else:
            self.masks.drop(slots)
        for slot, count in zip(slots, changed, strict=True):
            slot.masks.age = 0
            if action is Action.REPLAY and slot.id in fired:  # another one is no new topic
                detection = slot.detection
                detection.drift.restart(detection.recent)
                detection.settling = self.method.refresh.settle_tokens > detection.drift.reference_tokens
            elif action is Action.RELEARN:
                self._learn_anew(slot)
            elif action is Action.RELEASE:
                slot.state = State.RELEASED
            logged = LoggedEvent(_event(action, slot, slot.id in fired), count)
            slot.events.append(logged)
            self._announce(logged)

    def _learn_anew(self, slot: Slot) -> None:
        self.masks.forget([slot])
        slot.state, slot.traced, slot.least = State.LEARNING, 0, 1
        slot.dense_left = self.method.refresh.dense_tokens
        slot.detection.drift = self.method.detector.build()
        slot.detection.drift.restart([])


def _event(action: Action, slot: Slot, fired: bool) -> Event:
    event = Event(action.value, slot.sequence, slot.position, slot.decoded)
    if not fired or not slot.detection.similarities:
        return event
    _, similarity, threshold = slot.detection.similarities[-1]
    return replace(event, similarity=similarity, threshold=threshold)
