"""What given text leaves behind: a longer trace, a fuller ring, a reference for the detector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dartprune.model.rows import Rows
from dartprune.runtime.slots import Slot


def prefilled(slots: Sequence[Slot], rows: Rows, traced: Tensor | None, attention: Tensor | None, ring: int) -> None:
    """Given text has run.

    Args:
        slots: of its lines.
        rows: what its tokens were.
        traced: float32 [B, T] of 0 and 1, the tokens that were traced; None where pruning was paused.
        attention: the last layer's attention outputs, [B, T, H]; None likewise.
        ring: length of the rings, 0 for none.
    """
    counts = None if traced is None or attention is None else traced.sum(1).tolist()
    for line, (slot, count) in enumerate(zip(slots, rows.counts(), strict=True)):
        slot.position += count
        slot.prompt_tokens += count
        slot.finished = False
        if counts is None or attention is None:
            continue
        slot.traced += int(counts[line])
        slot.masks.stale = True
        slot.ring.advance(count, ring)
        columns = rows.line(line)
        vectors = attention[line]
        slot.detection.drift.reference(vectors[columns if isinstance(columns, slice) else columns.to(vectors.device)])
