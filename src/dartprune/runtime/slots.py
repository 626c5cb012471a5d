"""Slots: one per live sequence. Tensors whose first axis is the slot, and what the host knows of each sequence."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from dartprune.drift import AttentionDrift
from dartprune.report import Event


class State(Enum):
    """How the decoded tokens of a slot are computed."""

    LEARNING = "learning"  # dense and traced, until a mask may be made
    PRUNED = "pruned"
    RELEASED = "released"  # dense for good
    DENSE = "dense"  # the Dense preset: never traced, never pruned


class SlotTensors:
    """Tensors with one row per slot, at fixed addresses until the number of slots grows."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._fills: dict[str, float] = {}

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0.0) -> None:
        self._fills[name] = fill
        # a tensor born in inference mode could not be written outside of it
        with torch.inference_mode(False):
            setattr(self, name, torch.full((0, *shape), fill, dtype=dtype, device=self.device))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, each [slots, ...]."""
        return {name: getattr(self, name) for name in self._fills}

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` slots; what is there stays."""
        for name, tensor in self.tensors().items():
            if tensor.shape[0] < capacity:
                with torch.inference_mode(False):
                    larger = torch.full(
                        (capacity, *tensor.shape[1:]),
                        self._fills[name],
                        dtype=tensor.dtype,
                        device=tensor.device,
                    )
                    larger[: tensor.shape[0]] = tensor
                if larger.is_cuda:
                    # a compiled step's CUDA graph then writes here, instead of refusing an input that it changes
                    torch._dynamo.mark_static_address(larger, guard=False)
                setattr(self, name, larger)

    def clear(self, slots: list[int]) -> None:
        """Set the rows of these slots to their first value."""
        for name, tensor in self.tensors().items():
            tensor[slots] = self._fills[name]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` to rows `target` (int64 [n] each), as if all at once."""
        for tensor in self.tensors().values():
            device = tensor.device
            tensor.index_copy_(0, target.to(device), tensor.index_select(0, source.to(device)))

    def bytes_per_slot(self) -> int:
        """Bytes that one slot holds here."""
        return sum(t[0].nbytes if t.shape[0] else t.new_empty(t.shape[1:]).nbytes for t in self.tensors().values())


class Counters(SlotTensors):
    """What must be counted on the device, because only the device knows which lines of a batch are finished."""

    dense: Tensor
    pruned: Tensor
    saved: Tensor
    share: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._allocate("dense", (), torch.int64)
        self._allocate("pruned", (), torch.int64)
        self._allocate("saved", (), torch.float32)  # sum over pruned tokens of the share of FFN weights left out
        self._allocate("share", (), torch.float32)  # that share under the masks in force


@dataclass
class Slot:
    """What the host knows of one sequence."""

    id: int
    sequence: int
    state: State
    drift: AttentionDrift
    noise_seed: int | None = None  # from its first tokens
    position: int = 0  # tokens of this sequence that its cache holds
    prompt_tokens: int = 0
    traced: int = 0
    decoded: int = 0  # decode forwards, padding after the end included: a clock, not a count for the report
    dense_left: int = 0  # dense tokens still owed to a relearn
    since_mask: int = 0  # decode forwards since the masks in force were made
    stale: bool = False  # new tokens were traced: masks must be renewed before the next decode
    settling: bool = False
    window_fill: int = 0
    ring_fill: int = 0
    ring_next: int = 0
    least: int = 8  # tokens that must have been traced before the next mask is made
    finished: bool = False
    keep: list[int] | None = None  # neurons kept in each layer, None while dense
    chosen: list[int] | None = None  # neurons that each token uses of these, with a token selector
    former: list[int] | None = None  # the same before the last change
    recent: list[Tensor] = field(default_factory=list)  # means of the last decoded windows
    events: list[tuple[Event, Tensor | None]] = field(default_factory=list)  # with the neurons changed, unread
    notes: list[str] = field(default_factory=list)
    similarities: list[tuple[int, float, float]] = field(default_factory=list)

    def onto(self, slot_id: int) -> Slot:
        """A copy that lives in another slot (a beam that is continued there)."""
        twin = copy.copy(self)
        twin.id = slot_id
        twin.drift = self.drift.copy()
        twin.keep = list(self.keep) if self.keep is not None else None
        twin.chosen = list(self.chosen) if self.chosen is not None else None
        twin.events, twin.notes, twin.similarities = (
            list(self.events),
            list(self.notes),
            list(self.similarities),
        )
        twin.recent = list(self.recent)
        return twin

    def note(self, text: str) -> None:
        """Remember a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)
