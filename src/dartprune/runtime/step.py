"""What the coming forward asks of the layers, as one `Step` for each device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dartprune.model.rows import Phase, Rows
from dartprune.runtime.device_values import Once
from dartprune.runtime.layer_hooks import Step
from dartprune.runtime.slots import Slot, State

Steps = dict[torch.device, Step]


class Planner:
    """Makes steps; a decoding loop whose sequences stay as they are goes on with the step it has."""

    def __init__(self, devices: Iterable[torch.device], ring: int, skip_first: int) -> None:
        """Set up.

        Args:
            devices: where layers compute.
            ring: length of the ring of inputs, 0 for none.
            skip_first: tokens at the head of a sequence that are not traced.
        """
        self.counted: Tensor | None = None  # of the prefill that was planned last: which tokens are traced
        self._devices = list(devices)
        self._ring = ring
        self._skip_first = skip_first
        self._kept: tuple[Any, Steps, list[int]] | None = None
        self._once = Once()

    def prefill(self, rows: Rows, slots: Sequence[Slot]) -> Steps:
        """Given text: dense and traced."""
        step = self._step(rows, slots)
        skip = [max(0, self._skip_first - slot.position) for slot in slots]
        step.weight = self.counted = rows.weight(skip)
        step.impact_weight = rows.weight([0] * len(slots))
        return self._spread(step)

    def decode(self, rows: Rows, slots: Sequence[Slot], ended: Tensor | None, *, gathering: bool) -> Steps:
        """New tokens: each line as its sequence's state says.

        Args:
            rows: of the forward.
            slots: of its lines.
            ended: bool [B], lines that are over and teach nothing more.
            gathering: whether the backends compute from index lists.
        """
        pruned = [slot.state is State.PRUNED for slot in slots]
        learning = [slot.state is State.LEARNING for slot in slots]
        verify = rows.phase is Phase.VERIFY
        key = (rows.slots, rows.tokens, rows.phase, tuple(pruned), tuple(learning), gathering)
        places = [slot.ring_next for slot in slots]
        if self._kept is not None and self._kept[0] == key and self._kept[2] == places:
            steps = self._kept[1]
        else:
            step = self._step(rows, slots)
            if verify:
                step.ring, step.staging = None, True
            step.gathering = gathering
            step.masking = any(pruned) and not gathering
            steps = self._spread(step)
            self._kept = (key, steps, places) if rows.tokens == 1 else None
        if any(learning) and not verify:
            for device, step in steps.items():
                counted = self._once(learning, device)
                if ended is not None:
                    counted = counted & ~ended.to(device)
                step.weight = step.impact_weight = counted.float()[:, None].expand(-1, rows.tokens)
        return steps

    def advance(self) -> None:
        """A decoding step has run: in the one that is kept, the ring's places move on by one token."""
        if self._kept is None or not self._ring:
            return
        _, steps, places = self._kept
        for step in steps.values():
            if step.ring is not None:
                step.ring[2].add_(1).remainder_(self._ring)
        places[:] = [(place + 1) % self._ring for place in places]

    def forget(self) -> None:
        """The next step is made anew."""
        self._kept = None

    def _step(self, rows: Rows, slots: Sequence[Slot]) -> Step:
        ids = torch.tensor(rows.slots, dtype=torch.int64, device="cpu")
        ring = rows.tail(self._ring, [slot.ring_next for slot in slots]) if self._ring else None
        return Step(ids, ids.repeat_interleave(rows.tokens), ring=ring, padded=rows.valid is not None)

    def _spread(self, step: Step) -> Steps:
        def on(value: Any, device: torch.device) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, tuple):
                return tuple(on(part, device) for part in value)
            return value

        return {device: Step(**{k: on(v, device) for k, v in vars(step).items()}) for device in self._devices}
