"""Which neurons are kept: what each event adds and drops, and how many of a topic's own best neurons are among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.evaluation.masks import kept_masks, prompt_masks
from dartprune.pruner import Static
from dartprune.report import Event
from dartprune.run import Run

OWN_TOKENS = 256  # of a stretch that is read for a topic's own best neurons


def own_neurons(model: nn.Module, texts: Sequence[Sequence[int]], sparsity: float) -> list[Tensor]:
    """What DART's mask would keep if each text alone were the prompt: bool [B, I] of each layer."""
    cut = [tuple(text[: OWN_TOKENS + 1]) for text in texts]
    masks: dict[int, list[Tensor]] = {}  # of each text
    for length in sorted({len(text) for text in cut}):
        alike = [number for number, text in enumerate(cut) if len(text) == length]
        tokens = torch.tensor([cut[number] for number in alike])
        kept = prompt_masks(model, Static(sparsity=sparsity), tokens, backend="masked")
        masks |= {number: [layer[row] for layer in kept] for row, number in enumerate(alike)}
    return [torch.stack(layer) for layer in zip(*(masks[number] for number in range(len(cut))), strict=True)]


class NeuronLog:
    """Follows the masks of a batch through its events."""

    def __init__(self, run: Run, slots: Sequence[int], neurons: Sequence[int], own: Sequence[Sequence[Tensor]]) -> None:
        """Set up. own: for each topic, bool [B, I] of each layer; see `own_neurons`."""
        self._run = run
        self._slots = list(slots)
        self._neurons = list(neurons)
        self._own = own
        self._pending: list[Event] = []
        self._relearning: set[int] = set()
        self._kept: list[Tensor] | None = None
        self.rows: list[dict[str, Any]] = []
        run.on_event(self._pending.append)

    def step(self, decoded: int) -> None:
        """Draw the consequences of one decoded token: `decoded` forwards have run."""
        events, self._pending[:] = list(self._pending), []
        if self._kept is None:
            # the first decode forward made the masks; an event of that very forward is compared with nothing
            self._kept = kept_masks(self._run, self._slots, self._neurons)
            return
        again = [line for line in sorted(self._relearning) if self._run.selection(self._slots[line])[0] is not None]
        changed = {event.sequence: event.kind for event in events} | dict.fromkeys(again, "relearned")
        for line, kind in sorted(changed.items()):
            now = [mask[0] for mask in kept_masks(self._run, [self._slots[line]], self._neurons)]
            added = [int((new & ~old[line]).sum()) for new, old in zip(now, self._kept, strict=True)]
            dropped = [int((old[line] & ~new).sum()) for new, old in zip(now, self._kept, strict=True)]
            self.rows.append({"stream": line, "decoded": decoded, "kind": kind, "added": added, "dropped": dropped})
            for mask, new in zip(self._kept, now, strict=True):
                mask[line] = new
            self._relearning.discard(line)
            if kind == "relearn":
                self._relearning.add(line)

    def overlap(self) -> Tensor:
        """Share of each topic's own best neurons that is kept now: float32 [topics, layers, B]."""
        assert self._kept is not None, "no token was decoded"
        return torch.stack(
            [
                torch.stack([(kept & mine).sum(1) / mine.sum(1) for kept, mine in zip(self._kept, topic, strict=True)])
                for topic in self._own
            ]
        )

    def bytes_held(self) -> int:
        """Bytes of the masks; the same however long the text is."""
        return sum(mask.nbytes for mask in self._kept or [])
