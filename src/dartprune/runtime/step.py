"""What the coming forward asks of the layers: one `Step` for each device, made by the `Planner`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dartprune.model.rows import Phase, Rows
from dartprune.runtime.device_values import DeviceValues
from dartprune.runtime.sample import Sample, sample
from dartprune.runtime.slots import Slot, State


@dataclass
class Step:
    """One forward as the layers see it: B lines of T tokens; all tensors lie on the layer's device.

    slots: int64 [B].  row_slots: int64 [B * T].  weight, impact_weight: float32 [B, T] of 0 and 1, or None: not traced.
    ring: rows, slots and places for `LayerRing.write`, or None.  gathering: the backend computes the FFN from index
    lists.  masking: neurons are zeroed inside the model's own FFN.  staging: inputs are kept until it is known which
    tokens survive.  padded: some tokens are padding, whose values mean nothing.  sample: rows that teach a selector,
    or None.
    """

    slots: Tensor
    row_slots: Tensor
    weight: Tensor | None = None
    impact_weight: Tensor | None = None
    ring: tuple[Tensor, Tensor, Tensor] | None = None
    gathering: bool = False
    masking: bool = False
    staging: bool = False
    padded: bool = False
    sample: Sample | None = None


class DeviceState:
    """What the layers of one device share: the step of the forward under way, and what it leaves behind."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.attention: Tensor | None = None
        self.tracing_seconds = 0.0


Steps = dict[torch.device, Step]


class Planner:
    """Makes steps; a decoding loop whose sequences stay as they are goes on with the step it has."""

    def __init__(self, states: Mapping[torch.device, DeviceState], ring: int, skip_first: int, *, learns: bool) -> None:
        """Set up.

        Args:
            states: of the devices where layers compute.
            ring: length of the ring of inputs, 0 for none.
            skip_first: tokens at the head of a sequence that are not traced.
            learns: whether a token selector learns from the context.
        """
        self._states = dict(states)
        self._ring = ring
        self._skip_first = skip_first
        self._learns = learns
        self.sample: Sample | None = None  # of the forward under way
        self._current: tuple[Any, Steps, list[int]] | None = None
        self._once = DeviceValues()

    def prefill(self, rows: Rows, slots: Sequence[Slot]) -> Tensor:
        """Given text: dense and traced; returns which tokens are traced, float32 [B, T] of 0 and 1."""
        step = self._step(rows, slots)
        step.weight = traced = rows.weight([max(0, self._skip_first - slot.position) for slot in slots])
        step.impact_weight = rows.weight([0] * len(slots))
        step.sample = self._sampled(rows, slots, traced)
        self._tell(self._spread(step))
        return traced

    def decode(self, rows: Rows, slots: Sequence[Slot], ended: Tensor | None, *, gathering: bool) -> None:
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
        self.sample = None
        key = (rows.slots, rows.tokens, rows.phase, tuple(pruned), tuple(learning), gathering)
        places = [slot.ring.next for slot in slots]
        if self._current is not None and self._current[0] == key and self._current[2] == places:
            steps = self._current[1]
        else:
            step = self._step(rows, slots)
            if verify:
                step.ring, step.staging = None, True
            step.gathering = gathering
            step.masking = any(pruned) and not gathering
            steps = self._spread(step)
            self._current = (key, steps, places) if rows.tokens == 1 else None
        if any(learning) and not verify:
            fresh = torch.tensor(learning, dtype=torch.float32, device="cpu")[:, None].expand(-1, rows.tokens)
            sampled = self._sampled(rows, slots, fresh)
            for device, step in steps.items():
                step.sample = None if sampled is None else sampled.to(device)
                counted = self._once(learning, device)
                if ended is not None:
                    counted = counted & ~ended.to(device)
                step.weight = step.impact_weight = counted.float()[:, None].expand(-1, rows.tokens)
        self._tell(steps)

    def _sampled(self, rows: Rows, slots: Sequence[Slot], counted: Tensor) -> Sample | None:
        """The rows that teach a selector, which stay in `sample` until the forward is over."""
        self.sample = sample(rows, slots, counted) if self._learns else None
        return self.sample

    def advance(self) -> None:
        """A decoding step has run: in the one that is kept, the ring's places move on by one token."""
        if self._current is None or not self._ring:
            return
        _, steps, places = self._current
        for step in steps.values():
            if step.ring is not None:
                step.ring[2].add_(1).remainder_(self._ring)
        places[:] = [(place + 1) % self._ring for place in places]

    def forget(self) -> None:
        """The next step is made anew."""
        self._current = None

    def plain(self) -> None:
        """Let the layers be the model's own again."""
        for state in self._states.values():
            state.step = None

    def _tell(self, steps: Steps) -> None:
        for device, state in self._states.items():
            state.step, state.attention = steps[device], None

    def _step(self, rows: Rows, slots: Sequence[Slot]) -> Step:
        ids = torch.tensor(rows.slots, dtype=torch.int64, device="cpu")
        ring = rows.tail(self._ring, [slot.ring.next for slot in slots]) if self._ring else None
        return Step(ids, ids.repeat_interleave(rows.tokens), ring=ring, padded=rows.valid is not None)

    def _spread(self, step: Step) -> Steps:
        def on(value: Any, device: torch.device) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, Sample):
                return value.to(device)
            if isinstance(value, tuple):
                return tuple(on(part, device) for part in value)
            return value

        return {device: Step(**{k: on(v, device) for k, v in vars(step).items()}) for device in self._states}
